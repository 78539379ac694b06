"""The merge report: what a matrix method kept of each expert, how far the experts overlap, and on which labels.

``merge_report.json`` and a section of the model card. Per tensor and per layer: ``norm``, the Frobenius norm of each
task vector; ``kept``, the share ``|T_m P_m|^2 / |T_m|^2`` of it that the merge keeps (the rest is erased);
``overlap``, the cosine ``<M_i, M_j> / (|M_i| |M_j|)`` of the second moments of two experts' directions. Per layer and
expert also the vocabulary labels on whose semantic bases the task vectors of what reads the residual stream have the
largest energy: ``labels``, and among them ``distinct``, where the expert exceeds the others most. Shares, overlaps
and energies are estimated from random sign combinations of rows (see :mod:`seme.methods.seme`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seme.roles import layer as layer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from seme.plan import Plan
    from seme.semantics.bases import SemanticBases

Layer = tuple[str, int]
"""A stack of layers, e.g. ``model.layers``, and the number of one."""
LABELS = 8
"""Labels listed per layer and expert."""
KEYS = ("labels", "distinct")
CARD_LAYERS = 12
"""Layers in the model card; of deeper models evenly spaced ones."""


class MergeReport:
    """Collects what a method tells of each tensor.

    Attributes:
        experts: names of the merged models.
        extra: further entries of the report.
    """

    def __init__(self, plan: Plan) -> None:
        base = plan.models[plan.donor]
        self.experts = [str(m.ref) for m in plan.models if m is not base]
        self._plan = plan
        self._rules = {t.name: (t.role.role.value if t.role else "", t.rule) for t in plan.tensors if not t.copy}
        self.extra: dict[str, Any] = {}
        self._tensors: dict[str, dict[str, Any]] = {}
        self._sketches: dict[tuple[Layer, int], torch.Tensor] = {}

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Take an entry of one matrix: ``norm``, ``kept``, ``overlap``, and ``rows``, its sketches or None.

        Of a stack of matrices the entries are averaged by energy.
        """
        rows = entry.pop("rows")
        layer = layer_of(name)
        if rows is not None and layer is not None:
            self._add_rows(layer, rows, entry["norm"])
        if name in self._tensors:
            entry = _average([self._tensors[name], entry])
        self._tensors[name] = entry

    def _add_rows(self, layer: Layer, rows: Sequence[torch.Tensor], norms: Sequence[float]) -> None:
        for m, (sketch, norm) in enumerate(zip(rows, norms)):
            if norm > 0:
                # Sums of sketches with independent signs are sketches of the matrices below one another.
                scaled = sketch / (norm * len(sketch) ** 0.5)
                found = self._sketches.get((layer, m))
                self._sketches[layer, m] = scaled if found is None else found + scaled

    def finish(self, bases: Callable[[], SemanticBases]) -> dict[str, Any] | None:
        """The whole report, or None if no tensor has an entry. ``bases`` of the base model name the labels."""
        if not self._tensors:
            return None
        layers: dict[Layer, list[dict[str, Any]]] = {}
        for name, entry in self._tensors.items():
            layer = layer_of(name)
            if layer is not None:
                layers.setdefault(layer, []).append(entry)
        found = []
        labels = self._labels(bases)
        for layer, entries in sorted(layers.items()):
            item = {"layer": f"{layer[0]}.{layer[1]}", **_average(entries)}
            if layer in labels:
                item["experts"] = labels[layer]
            found.append(item)
        tensors = {
            name: {"role": role, "rule": rule, **self._tensors.get(name, {})}
            for name, (role, rule) in self._rules.items()
        }
        return {
            "method": self._plan.method.name,
            "base": str(self._plan.models[self._plan.donor].ref),
            "experts": self.experts,
            "layers": found,
            "tensors": tensors,
            **self.extra,
        }

    def _labels(self, bases: Callable[[], SemanticBases]) -> dict[Layer, list[dict[str, Any]]]:
        """Layer -> for each expert its labels."""
        import torch

        from seme.errors import SemeError

        if not self._sketches:
            return {}
        try:
            found = bases()
        except SemeError:  # a model without a head has no labels
            return {}
        layers = sorted({layer for layer, _ in self._sketches})
        best = {(layer, m, key): _Best() for layer in layers for m in range(len(self.experts)) for key in KEYS}
        for index in found.head.tiles():
            frame = found.units(index)
            for layer in layers:
                rows = [self._sketches.get((layer, m)) for m in range(len(self.experts))]
                energies = torch.stack(
                    [
                        torch.zeros(len(frame), dtype=frame.dtype)
                        if r is None
                        else (frame @ r.to(frame.dtype).T).square_().sum(1)
                        for r in rows
                    ]
                )
                others = (energies.sum(0) - energies) / max(len(energies) - 1, 1)
                for m, energy in enumerate(energies):
                    best[layer, m, "labels"].add(index.start, energy, energy)
                    best[layer, m, "distinct"].add(index.start, energy - others[m], energy)
        return {
            layer: [{key: best[layer, m, key].listed(found.labels) for key in KEYS} for m in range(len(self.experts))]
            for layer in layers
        }


class _Best:
    """The labels of largest value, kept while tiles of all labels go by."""

    def __init__(self) -> None:
        import torch

        self._value, self._energy = torch.empty(0), torch.empty(0)
        self._label = torch.empty(0, dtype=torch.int64)

    def add(self, start: int, value: torch.Tensor, energy: torch.Tensor) -> None:
        """Take a tile's values, and the energies that are shown for them; ``start`` is its first label."""
        import torch

        top = value.topk(min(LABELS, len(value))).indices
        values = torch.cat([self._value, value[top].float()])
        energies, labels = torch.cat([self._energy, energy[top].float()]), torch.cat([self._label, top + start])
        kept = values.topk(min(LABELS, len(values))).indices
        self._value, self._energy, self._label = values[kept], energies[kept], labels[kept]

    def listed(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Entries of the report, the largest value first."""
        pairs = zip(self._label.tolist(), self._energy.tolist())
        return [{"id": i, "token": texts[i], "energy": energy} for i, energy in pairs]


def _average(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Entries as one: norms of all together, shares weighted by energy, overlaps averaged."""
    count = len(entries[0]["norm"])
    norm = [sum(e["norm"][m] ** 2 for e in entries) ** 0.5 for m in range(count)]
    kept: list[float | None] = []
    for m in range(count):
        known = [e for e in entries if e["kept"][m] is not None]
        energy = sum(e["norm"][m] ** 2 for e in known)
        kept.append(sum(e["kept"][m] * e["norm"][m] ** 2 for e in known) / energy if energy > 0 else None)
    overlap = [[sum(e["overlap"][i][j] for e in entries) / len(entries) for j in range(count)] for i in range(count)]
    return {"norm": norm, "kept": kept, "overlap": overlap}


def card_section(report: dict[str, Any]) -> list[str]:
    """Lines of Markdown for the model card."""
    layers = report["layers"]
    if not layers:
        return []
    step = max(1, -(-len(layers) // CARD_LAYERS))
    short = [e.rstrip("/").rpartition("/")[2] for e in report["experts"]]
    lines = [
        "## What was merged",
        "",
        "Share of each model's task vector that the merge keeps, mean overlap of the models' directions, and the "
        "vocabulary labels where a model exceeds the others most; `merge_report.json` has every tensor.",
        "",
        f"| layer | {' | '.join(f'kept of {s}' for s in short)} | overlap | labels |",
        f"| ---: | {' | '.join('---:' for _ in short)} | ---: | --- |",
    ]
    for item in layers[::step]:
        kept = [f"{k:.0%}" if k is not None else "-" for k in item["kept"]]
        pairs = [item["overlap"][i][j] for i in range(len(short)) for j in range(i)]
        overlap = f"{sum(pairs) / len(pairs):.2f}" if pairs else "-"
        words = "; ".join(
            f"{s}: {' '.join(_code(w['token']) for w in e['distinct'][:4])}"
            for s, e in zip(short, item.get("experts", ()))
        )
        lines.append(f"| {item['layer']} | {' | '.join(kept)} | {overlap} | {words} |")
    return [*lines, ""]


def _code(token: str) -> str:
    text = token.encode("unicode_escape").decode().replace("`", "'").replace("|", "\\|")
    return f"`{text}`"
