"""LoRA adapters as PEFT stores them, applied to a model's tensors while these are read.

An adapted matrix is ``W + scale B A`` with ``scale = alpha / r`` (``alpha / sqrt(r)`` with rsLoRA); nothing of it is
ever stored. Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seme.checkpoint.index import read_json
from seme.checkpoint.reader import Checkpoint
from seme.errors import CheckpointError, brief
from seme.patterns import TooSlow, ending, search
from seme.sources import LowRank, Source, StoredTensor

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."

_REFUSED = {
    "use_dora": "DoRA rescales whole columns, which is no low-rank change",
    "trainable_token_indices": "rows of single tokens are trained",
    "target_parameters": "parameters that are no layer's weight are trained",
    "layer_replication": "layers are repeated",
    "lora_bias": "biases of the product are trained",
    "use_qalora": "it is for quantised models",
    "arrow_config": "it routes between adapters",
    "alora_invocation_tokens": "it is switched on by tokens of the text",
}
"""Options of PEFT that make an adapter more than matrices of low rank, and replaced tensors."""

_OTHER_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to begin the training that change the model which the adapter is for."""

_WRAPPED = re.compile(r"\.(?:modules_to_save\.default|base_layer)(?=\.)")
"""What PEFT puts into the names of tensors that it replaces."""

_PART = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.weight)?$")


def apply(folder: Path, tensors: Mapping[str, Source]) -> tuple[dict[str, Source], Checkpoint]:
    """A model's tensors with an adapter, and the adapter's open file.

    Args:
        folder: the adapter's folder.
        tensors: those of the model it was trained on.

    Raises:
        CheckpointError: it is no LoRA adapter, has options that no low-rank product can have, or does not fit.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: no {CONFIG} in it; name the folder of a LoRA adapter after '+'")
    config = read_json(folder / CONFIG)
    _check(folder / CONFIG, config)
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: no {WEIGHTS[0]} or {WEIGHTS[1]}; download the adapter again")
    adapter = Checkpoint(file)
    try:
        return _applied(adapter, file, config, tensors), adapter
    except BaseException:
        adapter.close()
        raise


def _check(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is no plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type {brief(kind)}; expected LORA: merge the adapter with PEFT first")
    reasons = [f"{key}: {why}" for key, why in _REFUSED.items() if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        reasons.append(f"init_lora_weights {start}: it is for a base model that PEFT changed")
    if reasons:
        raise CheckpointError(f"{file}: {reasons[0]}; merge the adapter with PEFT first")


def _applied(
    adapter: Checkpoint, file: Path, config: Mapping[str, Any], tensors: Mapping[str, Source]
) -> dict[str, Source]:
    found = dict(tensors)
    adapted: dict[str, None] = {}
    for key, stored in adapter.tensors.items():
        name = key.removeprefix(PREFIX)
        part = _PART.search(name)
        if part is not None:
            adapted[name[: part.start()]] = None
        elif "lora_" in name:
            raise CheckpointError(f"{file}: tensor {key}: not known as a part of LoRA; merge it with PEFT first")
        else:
            target = _target(_WRAPPED.sub("", name), tensors, file)
            if stored.shape != tensors[target].shape:
                raise CheckpointError(
                    f"{file}: tensor {key} has shape {list(stored.shape)}, {list(tensors[target].shape)} in "
                    f"{tensors[target].file}; take the model that the adapter was trained on"
                )
            found[target] = StoredTensor(adapter, stored)

    @functools.lru_cache(8)  # tensors that are read at about the same time
    def factors(names: tuple[str, str], turned: bool) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (_matrix(adapter, name) for name in names)
        return (a.T.contiguous(), b.T.contiguous()) if turned else (b, a)

    alphas = _alphas(file.parent / CONFIG, config, list(adapted))
    for module in adapted:
        target = _target(f"{module}.weight", tensors, file)
        names, turned, scale = _product(adapter, file, config, module, alphas[module], found[target])
        found[target] = LowRank(found[target], functools.partial(factors, names, turned), scale)
    return found


def _target(name: str, tensors: Mapping[str, Source], file: Path) -> str:
    """The model's tensor that an adapter's is about; a prefix such as ``model.`` may be missing on either side."""
    if name in tensors:
        return name
    near = [t for t in tensors if t.endswith(f".{name}") or name.endswith(f".{t}")]
    if len(near) != 1:
        what = f"several of the model's tensors end so: {', '.join(near[:3])}" if near else "the model has none such"
        raise CheckpointError(f"{file}: {name} is adapted, and {what}; take the model that it was trained on")
    return near[0]


def _product(
    adapter: Checkpoint, file: Path, config: Mapping[str, Any], module: str, alpha: Any, base: Source
) -> tuple[tuple[str, str], bool, float]:
    """Names of a module's A and B, whether its weight is stored as the transpose of their product, and the scale."""
    embedding = f"{PREFIX}{module}.lora_embedding_A" in adapter.tensors
    kind = "embedding_{}" if embedding else "{}.weight"
    names = (f"{PREFIX}{module}.lora_{kind.format('A')}", f"{PREFIX}{module}.lora_{kind.format('B')}")
    for name in names:
        if name not in adapter.tensors:
            raise CheckpointError(f"{file}: tensor {name} is missing; download the adapter again")
    a, b = (adapter.tensors[name] for name in names)
    if len(a.shape) != 2 or len(b.shape) != 2 or len(base.shape) != 2:
        raise CheckpointError(f"{file}: tensor {names[0]}: adapts a convolution; merge the adapter with PEFT first")
    product = (b.shape[0], a.shape[1])
    # Embeddings and GPT-2's Conv1D store the transpose; of matrices that are not square the shape says so as well.
    turned = embedding or (base.shape == product[::-1] != product)
    turned = turned or (base.shape == product[::-1] and bool(config.get("fan_in_fan_out")))
    if a.shape[0] == 0:
        raise CheckpointError(f"{file}: {module}: rank 0; download the adapter again")
    if a.shape[0] != b.shape[1] or base.shape != (product[::-1] if turned else product):
        raise CheckpointError(
            f"{file}: {module}: A {list(a.shape)} and B {list(b.shape)} do not fit {base.name} {list(base.shape)} of "
            f"{base.file}; take the model that the adapter was trained on"
        )
    if not base.dtype.mergeable:
        raise CheckpointError(f"{base.file}: tensor {base.name} is {base.dtype}, to which no adapter can be added")
    rank = a.shape[0]
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e300:
        raise CheckpointError(f"{file.parent / CONFIG}: lora_alpha {brief(alpha)} of {module}; expected a number")
    return names, turned, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _alphas(config: Path, said: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """alpha of each module: the entry of the first pattern that its name, or the end of it, matches, as in PEFT."""
    patterns = said.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{config}: alpha_pattern {brief(patterns)}; expected an object")
    keys = list(patterns)
    try:
        found = search([ending(key) for key in keys], modules)
    except TooSlow as e:
        raise CheckpointError(
            f"{config}: alpha_pattern {brief(keys[e.number])}: the search for it in the modules' names does not end; "
            "write it without repetitions of repetitions"
        ) from e
    except (re.error, OverflowError, RecursionError) as e:
        raise CheckpointError(f"{config}: alpha_pattern {brief(patterns)}: no regular expressions: {e}") from e
    default = said.get("lora_alpha", 8)
    return {m: next((patterns[k] for k, names in zip(keys, found) if m in names), default) for m in modules}


def _matrix(adapter: Checkpoint, name: str) -> torch.Tensor:
    """A factor, float32."""
    import torch

    stored = adapter.tensors[name]
    raw = bytearray(stored.nbytes)
    adapter.read_into(stored, 0, memoryview(raw))
    return torch.frombuffer(raw, dtype=stored.dtype.to_torch()).view(stored.shape).float()
