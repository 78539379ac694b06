"""``seme demo``: the main job, from nothing, on any machine.

Three small Llama models are trained on text that every Python installation with torch has: a base on English prose,
and two experts, fine-tuned from the base on Python source and on C++ headers. A recipe then merges the experts onto
the base, transformers loads the result, and a table shows the loss of all four on text none of them was trained on.
Everything happens offline and on the CPU.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import seme
from seme.errors import SemeError, TargetError

if TYPE_CHECKING:
    import torch

MODELS = ("base", "python-expert", "cpp-expert", "merged")
END, TURN, TURN_END, PAD = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPTS = ("    def close(self):\n        if self.", "  return std::")

RECIPE = """\
# Adds 0.6 of what each expert learned to the base they both started from.
merge_method: task_arithmetic
base_model: {base}
models:
  - model: {python-expert}
    parameters: {{weight: 0.6}}
  - model: {cpp-expert}
    parameters: {{weight: 0.6}}
dtype: float32
out_dtype: bfloat16
"""


@dataclass(frozen=True)
class Sizes:
    """How much is trained; the defaults take about 40 seconds of one core.

    Attributes:
        vocabulary: tokens of the byte-level BPE tokenizer.
        hidden: width of the models, a multiple of 64.
        layers: number of transformer layers.
        context: tokens per training sequence.
        batch: sequences per step.
        base_steps: optimizer steps of the base.
        expert_steps: optimizer steps of each expert.
        train_chars: characters of each domain to train on.
        valid_chars: characters of each domain to measure on, from other files.
    """

    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 2
    context: int = 64
    batch: int = 8
    base_steps: int = 700
    expert_steps: int = 300
    train_chars: int = 600_000
    valid_chars: int = 50_000


def run(
    out: Path | None = None,
    *,
    seed: int = 0,
    overwrite: bool = False,
    quiet: bool = False,
    as_json: bool = False,
    sizes: Sizes | None = None,
) -> dict[str, Any]:
    """Train the models, merge the experts onto the base, compare.

    Args:
        out: folder for the models, the recipe and the result; default ``seme-demo``.
        seed: chooses texts, initial weights and batches; on one machine the same seed gives the same models.
        overwrite: use ``out`` even if it is not empty. Only the files the demo writes are replaced.
        quiet: no progress (it goes to stderr).
        as_json: do not print the result; the caller does.
        sizes: how much to train.

    Returns:
        ``folder``, ``recipe``, ``command`` (repeats the merge), ``models`` (name -> folder), ``sizes``, ``loss``
        (model -> domain -> mean nats per token on held-out text, and their ``mean``), ``samples`` (prompt -> model ->
        continuation), ``seconds`` (``merge`` and ``total``).

    Raises:
        SemeError: transformers is missing, or this Python has too little text.
        TargetError: ``out`` is not empty, or cannot be written to.
    """
    started = time.monotonic()
    out = Path("seme-demo") if out is None else Path(out)
    sizes = sizes or Sizes()
    try:
        if not overwrite and out.exists() and any(out.iterdir()):
            raise TargetError(f"{out}: not empty; name another folder or pass --overwrite")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise TargetError(f"{out}: {e.strerror}; name a folder that can be written to") from e
    progress = _Progress(quiet)
    progress.say("loading torch and transformers")
    with _settings(seed):
        domains = {name: _texts(name, sizes, seed) for name in SOURCES}
        tokenizer = _train_tokenizer((text for train, _ in domains.values() for text in train), sizes.vocabulary)
        train = {name: _tokens(tokenizer, texts) for name, (texts, _) in domains.items()}
        valid = {name: _tokens(tokenizer, texts) for name, (_, texts) in domains.items()}
        paths = {name: out / name for name in MODELS}

        model = _new_model(tokenizer, sizes)
        _train(model, "base", {"prose": 1.0}, train, 5e-3, sizes.base_steps, sizes, progress)
        _save(model, tokenizer, paths["base"])
        for name, domain in (("python-expert", "Python"), ("cpp-expert", "C++")):
            model = _load(paths["base"])
            # A quarter of prose keeps what the base knows, as fine-tunes commonly do.
            mixture = {domain: 0.75, "prose": 0.25}
            _train(model, name, mixture, train, 2e-3, sizes.expert_steps, sizes, progress)
            _save(model, tokenizer, paths[name])

        recipe = out / "recipe.yml"
        recipe.write_text(RECIPE.format_map({n: _quoted(p) for n, p in paths.items()}), encoding="utf-8")
        merge = seme.merge(recipe, paths["merged"], overwrite=overwrite)
        progress.say(f"merged the experts onto the base: {merge.tensors} tensors in {merge.seconds:.2f} s")

        progress.say("measuring all four on held-out text")
        loss: dict[str, dict[str, float]] = {}
        samples: dict[str, dict[str, str]] = {prompt: {} for prompt in PROMPTS}
        for name, path in paths.items():
            model, own_tokenizer = _load(path), _load_tokenizer(path)
            loss[name] = {domain: _loss(model, tokens, sizes.context) for domain, tokens in valid.items()}
            loss[name]["mean"] = sum(loss[name].values()) / len(valid)
            for prompt in PROMPTS:
                samples[prompt][name] = _continue(model, own_tokenizer, prompt)

    result = {
        "folder": str(out),
        "recipe": str(recipe),
        "command": shlex.join([*_program(), "merge", str(recipe), str(paths["merged"]), "--overwrite"]),
        "models": {name: str(path) for name, path in paths.items()},
        "sizes": asdict(sizes),
        "loss": loss,
        "samples": samples,
        "seconds": {"merge": merge.seconds, "total": time.monotonic() - started},
    }
    if not as_json:
        _print(result)
    return result


def _program() -> list[str]:
    """How to call this interpreter's ``seme`` from the current folder."""
    script = Path(sys.executable).with_name("seme")
    if not script.is_file():
        return [sys.executable, "-m", "seme"]
    found = shutil.which("seme")
    if found is not None and script.samefile(found):
        return ["seme"]
    relative = os.path.relpath(script)
    return [relative if os.sep in relative and len(relative) < len(str(script)) else str(script)]


@contextmanager
def _settings(seed: int) -> Iterator[None]:
    """No network, no chatter, one thread, own random numbers; all as before afterwards.

    One thread, because a model this small gains little from more, and because then the number of cores does not
    change the result.
    """
    offline = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported, which reads it once
    try:
        import torch

        logging = _transformers().utils.logging
        verbosity, bars, threads = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(1)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                yield
        finally:
            torch.set_num_threads(threads)
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
    finally:
        if offline is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = offline


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as e:
        raise SemeError(f"demo: transformers cannot be imported ({e}): pip install 'seme[demo]'") from e


def _quoted(path: Path) -> str:
    """The absolute path as a YAML string: JSON's strings are."""
    return json.dumps(str(path.resolve()), ensure_ascii=False)


# --- text ---------------------------------------------------------------------------------------------------------


def _files(folder: Path, pattern: str, skip: Iterable[str] = ()) -> list[Path | str]:
    """Files below ``folder`` in the order of their names, without those in folders named in ``skip``."""
    found = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob(pattern) if path.is_file())
    return [path for name, path in found if not set(name.split("/")[:-1]) & set(skip)]


def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def _language_reference() -> list[Path | str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [text for _, text in sorted(topics.items())]


NO_SOURCES = ("site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data")

# Where the text of each domain is looked for, as files or as text; the first place with enough of it is taken.
SOURCES: dict[str, tuple[tuple[str, Callable[[], list[Path | str]]], ...]] = {
    "prose": (
        ("the topics of pydoc", _language_reference),
        ("the descriptions of installed packages", lambda: _files(_torch_folder().parent, "*.dist-info/METADATA")),
    ),
    "Python": (
        ("the standard library", lambda: _files(Path(sysconfig.get_path("stdlib")), "*.py", NO_SOURCES)),
        ("torch", lambda: _files(_torch_folder(), "*.py", NO_SOURCES)),
    ),
    "C++": (
        ("torch/include/c10", lambda: _files(_torch_folder() / "include" / "c10", "*.h")),
        ("Python's headers", lambda: _files(Path(sysconfig.get_path("include")), "*.h")),
    ),
}


def _texts(domain: str, sizes: Sizes, seed: int) -> tuple[list[str], list[str]]:
    """Texts to train on and texts to measure on, about as long as ``sizes`` says.

    The two come from different files, and paragraphs that files share are not trained on if they are measured on.

    Raises:
        SemeError: no place has enough text of the domain.
    """
    tried = []
    for place, find in SOURCES[domain]:
        found = find()
        random.Random(seed).shuffle(found)
        # No single file is to dominate, hence the cut.
        texts = ((x if isinstance(x, str) else x.read_text(encoding="utf-8", errors="replace"))[:40_000] for x in found)
        valid = _take(texts, sizes.valid_chars)
        held_out = {paragraph for text in valid for paragraph in _paragraphs(text) if len(paragraph) > 80}
        train = _take((_without(text, held_out) for text in texts), sizes.train_chars)
        if sum(map(len, train)) >= sizes.train_chars // 4:
            return train, valid
        tried.append(f"{place} ({len(found)} files)")
    raise SemeError(
        f"demo: too little {domain} text in this Python: {', '.join(tried)}; use one with its standard library as files"
    )


def _take(texts: Iterator[str], length: int) -> list[str]:
    """The next texts until they have ``length`` characters together."""
    taken: list[str] = []
    while length > 0 and (text := next(texts, None)) is not None:
        taken.append(text)
        length -= len(text)
    return taken


def _paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


def _without(text: str, held_out: set[str]) -> str:
    return "\n\n".join(paragraph for paragraph in _paragraphs(text) if paragraph not in held_out)


# --- models -------------------------------------------------------------------------------------------------------


def _train_tokenizer(documents: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with special tokens and a chat template, as AutoTokenizer loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    tokenizer = _transformers().PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=PAD
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tokens(tokenizer: Any, documents: list[str]) -> torch.Tensor:
    """The documents as one sequence of token ids, each after an end-of-text token."""
    import torch

    return torch.tensor([i for ids in tokenizer(documents)["input_ids"] for i in (tokenizer.eos_token_id, *ids)])


def _new_model(tokenizer: Any, sizes: Sizes) -> Any:
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 5 // 2,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 32,
        num_key_value_heads=sizes.hidden // 64,
        max_position_embeddings=4 * sizes.context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.LlamaForCausalLM(config)


def _save(model: Any, tokenizer: Any, path: Path) -> None:
    """Save in bfloat16 and, as large models are, in shards: two."""
    import torch

    model.to(torch.bfloat16)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(path, max_shard_size=int(0.7 * size))
    tokenizer.save_pretrained(path)


def _load(path: Path) -> Any:
    import torch

    return _transformers().AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )


def _load_tokenizer(path: Path) -> Any:
    return _transformers().AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _train(
    model: Any,
    name: str,
    mixture: Mapping[str, float],
    tokens: Mapping[str, torch.Tensor],
    rate: float,
    steps: int,
    sizes: Sizes,
    progress: _Progress,
) -> None:
    """Train ``model`` in place, each batch made of the domains in the shares of ``mixture``."""
    import torch

    progress.say(f"training {name}: {steps} steps on {' and '.join(mixture)}")
    started = time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    model.train()
    losses = []
    for _ in progress.track(range(steps), name):
        rows = []
        for domain, share in mixture.items():
            starts = torch.randint(len(tokens[domain]) - sizes.context, (round(share * sizes.batch),))
            rows.append(_windows(tokens[domain], starts, sizes.context))
        batch = torch.cat(rows)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    progress.say(f"  loss {losses[0]:.2f} -> {losses[-1]:.2f} in {time.monotonic() - started:.0f} s")


def _windows(tokens: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    import torch

    return tokens[starts[:, None] + torch.arange(length)]


def _loss(model: Any, tokens: torch.Tensor, context: int) -> float:
    """Mean loss per token, in nats, over up to 128 evenly spaced windows."""
    import torch

    starts = torch.linspace(0, len(tokens) - context, min(128, len(tokens) // context)).long()
    batch = _windows(tokens, starts, context)
    with torch.inference_mode():
        return float(model(input_ids=batch, labels=batch).loss)


def _continue(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model writes after the prompt: the likeliest token each time, those already there made less likely."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, repetition_penalty=1.2)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


# --- terminal -----------------------------------------------------------------------------------------------------


class _Progress:
    """Progress on stderr: lines, and on a terminal a bar for each training."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def track(self, steps: range, name: str) -> Iterable[int]:
        from rich.progress import track

        if self.console.quiet or not self.console.is_terminal:
            return steps
        return track(steps, name, console=self.console, transient=True)


def _print(result: Mapping[str, Any]) -> None:
    """The result for a person, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    loss = result["loss"]
    table = Table(title="Loss in nats per token on held-out text (lower is better)", title_justify="left")
    table.add_column("model")
    for column in loss["merged"]:
        table.add_column(column, justify="right")
    for name, row in loss.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()), style="bold" if name == "merged" else "")
    console.print()
    console.print(table)
    for prompt, continuations in result["samples"].items():
        console.print(f"\nAfter {prompt!r}")
        for name in ("base", "merged"):
            console.print(f"  {name:6} writes {continuations[name]!r}")
    seconds = result["seconds"]
    console.print(
        f"\nTook {seconds['total']:.0f} s, of which the merge {seconds['merge']:.2f} s."
        f"\nThe models and the recipe are in {result['folder']}. To repeat the merge:\n  {result['command']}"
    )
