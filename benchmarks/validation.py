"""The published validation of semantic bases: do latent vectors come back from their components along the bases?

For each layer of a model and each place where vectors are added to the residual stream, this takes the vectors that
held-out text makes there, resolves them into several sets of vectors, and keeps the cosine of each with its
recomposition (``sum_i <r, x_i> x_i`` over unit vectors ``x_i``):

- ``output``: semantic bases, the rows of the head's pseudo-inverse with the final norm's gain folded in;
- ``output, plain``: the same of the head alone;
- ``head rows``, ``embedding rows``: the rows themselves; the embedding is the published input side;
- ``random``: as many random vectors as there are labels;
- ``16 random``: as few as the published control seems to have;
- ``dual``: ``output`` recomposed in the dual frame, which is exact.

``python -m benchmarks.validation`` trains small Llama models for it, with the text and the trainer of ``seme demo``, or
takes folders given with ``--model``. Results go to ``benchmarks/results/validation.json``, the picture to
``docs/images/semantic-validation.svg``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, Results, load, provenance, table
from seme import SemanticBases, demo
from seme.semantics.resolve import normalized, round_trip

IMAGE = ROOT / "docs" / "images" / "semantic-validation.svg"
FRAMES = ("output", "output, plain", "head rows", "embedding rows", "random", "16 random")
PLACES = ("stream", "attention", "mlp")
CONTEXT = 64

ABOUT = {
    "layers": "per layer and place (stream: what leaves the layer; attention, mlp: what they add to the stream) and "
    "set of vectors: mean, 10th and 90th percentile of the cosine over positions; last: after the final norm",
    "frames": "per set of vectors x_i: isotropic, the mean cosine of random directions; mean_length, the length of "
    "the mean unit vector (0: no common direction); top, the share of the frame's trace in its strongest direction",
    "along": "share of the energy of the vectors along the 1/16 strongest directions of the head (1/16 if they know "
    "nothing of it), by place",
    "loss": "nats per token on the text that the vectors are from",
}

# Vocabulary, width, tied, trained: v/d from 4 to 64 with the same text, a tied one, and one as it was initialised.
MODELS: dict[str, tuple[int, int, bool, bool]] = {
    "v/d = 16": (2048, 128, False, True),
    "v/d = 4": (1024, 256, False, True),
    "v/d = 64": (4096, 64, False, True),
    "v/d = 16, tied": (2048, 128, True, True),
    "v/d = 16, untrained": (2048, 128, False, False),
}


def train(folder: Path, vocabulary: int, width: int, tied: bool, trained: bool, steps: int, seed: int = 0) -> Path:
    """A small Llama of six layers, trained on prose, Python and C++ of this installation."""
    sizes = demo.Sizes(vocabulary=vocabulary, hidden=width, layers=6, base_steps=steps, train_chars=1_500_000)
    with demo._settings(seed):
        texts = {name: demo._texts(name, sizes, seed)[0] for name in demo.SOURCES}
        tokenizer = demo._train_tokenizer((text for found in texts.values() for text in found), vocabulary)
        model = demo._new_model(tokenizer, sizes)
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        if trained:
            tokens = {name: demo._tokens(tokenizer, found) for name, found in texts.items()}
            mixture = dict.fromkeys(tokens, 1 / len(tokens))
            demo._train(model, folder.name, mixture, tokens, 4e-3, steps, sizes, demo._Progress(quiet=False))
        demo._save(model, tokenizer, folder)
    return folder


def held_out(folder: Path, count: int = 32) -> torch.Tensor:
    """Windows [n, CONTEXT] of token ids: ``count`` of each domain, from files no model here was trained on."""
    tokenizer = demo._load_tokenizer(folder)
    windows = []
    for name in demo.SOURCES:
        text = "\n\n".join(demo._texts(name, demo.Sizes(), 0)[1])
        tokens = torch.tensor(tokenizer(text)["input_ids"])
        starts = torch.linspace(0, len(tokens) - CONTEXT, count).long()
        windows.append(demo._windows(tokens, starts, CONTEXT))
    return torch.cat(windows)


@contextmanager
def recorded(model: Any) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What layers, attentions and MLPs of a decoder give, and the final norm, per place in the order of the layers."""
    size = model.config.num_hidden_layers
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == size)
    trunk = next(m for m in model.modules() if layers in m.children())
    found: dict[str, list[torch.Tensor]] = {place: [] for place in (*PLACES, "final")}

    def keep(place: str) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, result: Any) -> None:
            found[place].append((result[0] if isinstance(result, tuple) else result).detach())

        return hook

    handles = []
    for layer in layers:
        parts = dict(layer.named_children())
        handles.append(next(parts[n] for n in ("self_attn", "attn", "attention") if n in parts).register_forward_hook(
            keep("attention")))  # fmt: skip
        handles.append(parts["mlp"].register_forward_hook(keep("mlp")))
        handles.append(layer.register_forward_hook(keep("stream")))
    norm = next(m for n, m in trunk.named_children() if n in ("norm", "ln_f", "final_layer_norm"))
    handles.append(norm.register_forward_hook(keep("final")))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def operator(rows: torch.Tensor) -> torch.Tensor:
    """``X^T X`` of the rows at length one, [d, d] float64."""
    unit = normalized(rows.double())
    return unit.T @ unit


def cosines(r: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """Cosine of each vector with its recomposition, [n] float64."""
    r = r.double()
    return torch.nn.functional.cosine_similarity(r, r @ frame, dim=-1)


def summary(values: torch.Tensor) -> dict[str, float]:
    """Mean and the 10th and 90th percentile."""
    low, high = values.quantile(torch.tensor([0.1, 0.9], dtype=values.dtype)).tolist()
    return {"mean": float(values.mean()), "p10": low, "p90": high}


def measure(folder: Path, windows: torch.Tensor | None = None) -> dict[str, Any]:
    """The validation on one model folder; an entry of the results file.

    Args:
        folder: a decoder that transformers loads, with its tokenizer.
        windows: token ids [n, length]; default: :func:`held_out`. The first position of each is left out.
    """
    windows = held_out(folder) if windows is None else windows
    model = demo._load(folder).eval()
    with recorded(model) as places, torch.inference_mode():
        loss = float(model(input_ids=windows, labels=windows).loss)
    folded = SemanticBases.from_checkpoint(folder, cache=False)
    plain = SemanticBases.from_checkpoint(folder, cache=False, fold_norm=False)
    every = slice(0, folded.size)
    generator = torch.Generator().manual_seed(0)
    rows = {
        "head rows": folded.rows(every),
        "embedding rows": model.get_input_embeddings().weight.detach(),
        "random": torch.randn(folded.size, folded.width, generator=generator),
        "16 random": torch.randn(16, folded.width, generator=generator),
    }
    frames = {"output": folded.frame, "output, plain": plain.frame, **{name: operator(x) for name, x in rows.items()}}
    rows = {"output": folded.matrix(), "output, plain": plain.matrix(), **rows}
    isotropic = torch.randn(4096, folded.width, generator=generator)

    def compare(vectors: torch.Tensor, *, normed: bool = False) -> dict[str, dict[str, float]]:
        r = vectors[:, 1:].flatten(0, 1)
        found = {name: summary(cosines(r, frame)) for name, frame in frames.items()}
        # The gain is in the vectors once they are normalised, so it is the plain head that reads them.
        found["dual"] = summary(round_trip(r, plain if normed else folded, "dual"))
        return found

    strong = torch.linalg.eigh(torch.linalg.inv(folded.inverse))[1][:, -(folded.width // 16) :]

    def along(vectors: torch.Tensor) -> float:
        r = normalized(vectors[:, 1:].double())
        return float((r @ strong).square().sum(-1).mean())

    return {
        "v": folded.size,
        "d": folded.width,
        "rank": folded.rank,
        "condition": folded.condition**0.5,
        "tied": bool(model.config.tie_word_embeddings),
        "loss": loss,
        "positions": windows[:, 1:].numel(),
        "layers": {place: [compare(x) for x in places[place]] for place in PLACES},
        "last": compare(places["final"][-1], normed=True),
        "along": {place: [along(x) for x in places[place]] for place in PLACES},
        "frames": {
            name: {
                "isotropic": float(cosines(isotropic, frame).mean()),
                "mean_length": float(normalized(rows[name].double()).mean(0).norm()),
                "top": float(torch.linalg.eigvalsh(frame)[-1] / frame.trace()),
            }
            for name, frame in frames.items()
        },
    }


def over(entry: Mapping[str, Any], place: str, frame: str) -> list[float]:
    """Mean cosines at a place, per layer."""
    return [layer[frame]["mean"] for layer in entry["layers"][place]]


def report(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: least and greatest layer mean of the cosine, per model, place and set of vectors."""
    lines = []
    for name, e in entries.items():
        for place in PLACES:
            ranges = [(min(x), max(x)) for x in (over(e, place, frame) for frame in FRAMES)]
            lines.append([f"{name}: {place}", *(f"{low:.2f} to {high:.2f}" for low, high in ranges)])
        lines.append([f"{name}: after the norm", *(f"{e['last'][frame]['mean']:.2f}" for frame in FRAMES)])
        lines.append([f"{name}: random directions", *(f"{e['frames'][frame]['isotropic']:.2f}" for frame in FRAMES)])
    return table(["model: vectors", *FRAMES], lines)


def report_frames(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of what explains the first: anisotropy of the sets (mean length / top share), of the vectors."""
    lines = []
    sets = ("output", "head rows", "embedding rows", "random")
    for name, e in entries.items():
        shape = [f"{e['frames'][frame]['mean_length']:.2f} / {e['frames'][frame]['top']:.2f}" for frame in sets]
        energy = [sum(e["along"][place]) / len(e["along"][place]) for place in PLACES]
        lines.append([name, str(e["d"]), f"{e['condition']:.0f}", *shape, *(f"{x:.2f}" for x in energy)])
    return table(["model", "d", "condition", *sets, *(f"{place} along" for place in PLACES)], lines)


STYLE = {
    "output": ("#1f6feb", "-", 2.2),
    "output, plain": ("#7aa7f0", "-", 1.2),
    "head rows": ("#bf8700", "-", 1.6),
    "embedding rows": ("#cf222e", "-", 1.6),
    "random": ("#656d76", "--", 1.4),
    "16 random": ("#b8bec8", "--", 1.4),
}


def draw(data: Mapping[str, Any], image: Path) -> None:
    """Cosine over the layers: one row of panels per model, one column per place."""
    import matplotlib.pyplot as plt

    from benchmarks.plot import FAINT, INK, where

    entries = data["entries"]
    plt.switch_backend("svg")
    plt.rcParams.update(
        {
            "font.family": "sans-serif",
            "font.size": 9,
            "text.color": INK,
            "axes.labelcolor": FAINT,
            "xtick.color": FAINT,
            "ytick.color": FAINT,
            "svg.hashsalt": "seme",
        }
    )
    figure, axes = plt.subplots(
        len(entries), len(PLACES), figsize=(7.2, 0.9 + 1.45 * len(entries)), sharey=True, squeeze=False,
        layout="constrained", facecolor="white",
    )  # fmt: skip
    titles = {"stream": "leaves the layer", "attention": "attention adds", "mlp": "MLP adds"}
    for line, (name, entry) in zip(axes, entries.items(), strict=True):
        for axis, place in zip(line, PLACES, strict=True):
            for frame, (color, dash, width) in STYLE.items():
                means = over(entry, place, frame)
                x = range(1, len(means) + 1)
                axis.plot(x, means, color=color, linestyle=dash, linewidth=width, label=frame)
                if frame in ("output", "embedding rows"):
                    low, high = ([layer[frame][p] for layer in entry["layers"][place]] for p in ("p10", "p90"))
                    axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
            axis.set_ylim(0, 1.03)
            axis.set_xticks(range(1, len(means) + 1))
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["bottom", "left"]].set_color("#d0d7de")
            axis.tick_params(length=0)
            axis.set_title(f"{name}: {titles[place]}", loc="left", fontsize=8, color=INK)
    for axis in axes[:, 0]:
        axis.set_ylabel("cosine", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=6, frameon=False, fontsize=8)
    run = data["runs"][max(e["run"] for e in entries.values())]
    figure.supxlabel(
        "layer; cosine of a latent vector with its recomposition, mean over held-out text (band: 10th to 90th "
        f"percentile)\n{where(run)}",
        fontsize=8,
        color=FAINT,
    )
    image.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"metadata": {"Date": None}} if image.suffix == ".svg" else {"dpi": 130}
    figure.savefig(image, **options)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.validation", description="the published validation of semantic bases"
    )
    parser.add_argument("--model", nargs="+", type=Path, metavar="PATH", help="folders to take instead of training")
    parser.add_argument("--steps", type=int, default=1500, help="of training (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where trained models are kept, and found again")
    parser.add_argument("--out", type=Path, default=RESULTS / "validation.json")
    parser.add_argument("--image", type=Path, default=IMAGE, help=".svg or .png")
    parser.add_argument("--draw", action="store_true", help="only draw and print what was measured before")
    options = parser.parse_args(arguments)
    if not options.draw:
        results = Results(options.out, provenance(), ABOUT)
        with tempfile.TemporaryDirectory() as scratch:
            if options.model:
                folders = {path.name: path for path in options.model}
            else:
                folders = {}
                for number, (name, shape) in enumerate(MODELS.items()):
                    folders[name] = (options.keep or Path(scratch)) / f"model-{number}"
                    if not (folders[name] / "config.json").exists():
                        train(folders[name], *shape, steps=options.steps)
            for name, folder in folders.items():
                results.put(name, measure(folder))
                print(f"{name}: measured", flush=True)
    data = load(options.out)
    draw(data, options.image)
    print(report(data["entries"]))
    print()
    print(report_frames(data["entries"]))


if __name__ == "__main__":
    main()
