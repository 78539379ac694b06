"""``seme demo``: the main job, from nothing, on any machine.

Three small Llama models are trained on text that every Python installation with torch has: a base on English prose,
and two experts, fine-tuned from the base on Python source and on C++ headers. A recipe then merges the experts onto
the base, transformers loads the result, and a table shows the loss of all four on text none of them was trained on.
Everything happens offline and on the CPU.
"""

from __future__ import annotations

import os
import random
import shlex
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seme.errors import SemeError, TargetError

if TYPE_CHECKING:
    import torch

MODELS = ("base", "python-expert", "cpp-expert", "merged")
END, TURN, TURN_END, PAD = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPTS = ("def __init__(self", "namespace c10 {")

RECIPE = """\
# Adds 0.6 of what each expert learned to the base they both started from.
merge_method: task_arithmetic
base_model: "{base}"
models:
  - model: "{python-expert}"
    parameters: {{weight: 0.6}}
  - model: "{cpp-expert}"
    parameters: {{weight: 0.6}}
dtype: float32
out_dtype: bfloat16
"""


@dataclass(frozen=True)
class Sizes:
    """How much is trained; the defaults take about a minute on two cores.

    Attributes:
        vocabulary: tokens of the byte-level BPE tokenizer.
        hidden: width of the models, a multiple of 64.
        layers: number of transformer layers.
        context: tokens per training sequence.
        batch: sequences per step.
        base_steps: optimizer steps of the base.
        expert_steps: optimizer steps of each expert.
        train_bytes: characters of each domain to train on.
        valid_bytes: characters of each domain to measure on, from other files.
    """

    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 2
    context: int = 128
    batch: int = 8
    base_steps: int = 500
    expert_steps: int = 200
    train_bytes: int = 600_000
    valid_bytes: int = 50_000


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
        ``folder``, ``recipe``, ``command`` (repeats the merge), ``models`` (name -> folder), ``loss`` (model ->
        domain -> mean nats per token on held-out files, and their ``mean``), ``samples`` (prompt -> model ->
        continuation), ``seconds`` (of ``training``, ``merge``, ``total``).

    Raises:
        SemeError: transformers is missing, or this Python has too little text.
        TargetError: ``out`` is not empty, or not a folder.
    """
    out = Path("seme-demo") if out is None else Path(out)
    sizes = sizes or Sizes()
    started = time.monotonic()
    if out.exists() and not out.is_dir():
        raise TargetError(f"{out}: not a folder; name another one")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise TargetError(f"{out}: folder is not empty; choose another one or pass --overwrite")
    with _offline():
        return _run(out, seed, sizes, overwrite, _Progress(quiet), as_json, started)


def _run(
    out: Path, seed: int, sizes: Sizes, overwrite: bool, progress: _Progress, as_json: bool, started: float
) -> dict[str, Any]:
    progress.say("loading torch and transformers")
    try:
        import transformers
    except ImportError as e:
        raise SemeError(f"demo: transformers cannot be imported ({e}): pip install 'seme[demo]'") from e
    import torch

    import seme

    texts = {domain: _texts(domain, sizes, seed) for domain in DOMAINS}
    tokenizer = _train_tokenizer((doc for train, _ in texts.values() for doc in train), sizes.vocabulary)
    train = {domain: _tokens(tokenizer, docs) for domain, (docs, _) in texts.items()}
    valid = {domain: _tokens(tokenizer, docs) for domain, (_, docs) in texts.items()}
    paths = {name: out / name for name in MODELS}

    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def load(name: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(paths[name], dtype=torch.float32)

    def save(model: Any, name: str) -> None:
        model.to(torch.bfloat16)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(paths[name], max_shard_size=int(0.6 * size))  # two shards, as large models have
        tokenizer.save_pretrained(paths[name])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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
        model = transformers.LlamaForCausalLM(config)
        _train(model, {"prose": 1.0}, train, 5e-3, sizes.base_steps, sizes, progress, "base")
        save(model, "base")
        for name, domain in (("python-expert", "Python"), ("cpp-expert", "C++")):
            model = load("base")
            # A quarter of prose keeps what the base knows, as fine-tunes commonly do.
            _train(model, {domain: 0.75, "prose": 0.25}, train, 1e-3, sizes.expert_steps, sizes, progress, name)
            save(model, name)
    trained = time.monotonic()

    recipe = out / "recipe.yml"
    quoted = {name: str(path.resolve()).replace("\\", "\\\\").replace('"', '\\"') for name, path in paths.items()}
    recipe.write_text(RECIPE.format(**quoted), encoding="utf-8")
    merge = seme.merge(recipe, paths["merged"], overwrite=overwrite)
    progress.say(f"merged {merge.tensors} tensors in {merge.seconds:.2f} s")

    progress.say("measuring the four models on held-out files")
    loss: dict[str, dict[str, float]] = {}
    samples: dict[str, dict[str, str]] = {prompt: {} for prompt in PROMPTS}
    for name in MODELS:
        model = load(name)
        reloaded = transformers.AutoTokenizer.from_pretrained(paths[name])
        loss[name] = {domain: _loss(model, tokens, sizes) for domain, tokens in valid.items()}
        loss[name]["mean"] = sum(loss[name].values()) / len(valid)
        for prompt in PROMPTS:
            samples[prompt][name] = _continue(model, reloaded, prompt)
    transformers.logging.set_verbosity(verbosity)
    if bars:
        transformers.logging.enable_progress_bar()

    result = {
        "folder": str(out),
        "recipe": str(recipe),
        "command": f"seme merge {shlex.quote(str(recipe))} {shlex.quote(str(paths['merged']))} --overwrite",
        "models": {name: str(path) for name, path in paths.items()},
        "sizes": asdict(sizes),
        "loss": loss,
        "samples": samples,
        "seconds": {
            "training": trained - started,
            "merge": merge.seconds,
            "total": time.monotonic() - started,
        },
    }
    if not as_json:
        _print(result)
    return result


@contextmanager
def _offline() -> Iterator[None]:
    """The hub is not to be asked for anything: everything is local."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


# --- text ---------------------------------------------------------------------------------------------------------


def _files(folder: Path, pattern: str, skip: Iterable[str] = ()) -> list[Callable[[], str]]:
    """Readers of the files below ``folder``, in the order of their names; folders named in ``skip`` are left out."""

    def reader(path: Path) -> Callable[[], str]:
        return lambda: path.read_text(encoding="utf-8", errors="replace")

    found = sorted((p.relative_to(folder).as_posix(), p) for p in folder.rglob(pattern) if p.is_file())
    return [reader(path) for name, path in found if not set(name.split("/")[:-1]) & set(skip)]


def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def _language_reference() -> list[Callable[[], str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [lambda text=text: text for _, text in sorted(topics.items())]


NO_SOURCES = ("site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data")

# Where the text of each domain is looked for; the first place with enough of it is taken.
DOMAINS: Mapping[str, tuple[tuple[str, Callable[[], list[Callable[[], str]]]], ...]] = {
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
    """Documents to train on and, from other files, to measure on; about as long as ``sizes`` says.

    Raises:
        SemeError: no place has enough text of the domain.
    """
    found = []
    for place, readers_of in DOMAINS[domain]:
        readers = readers_of()
        random.Random(seed).shuffle(readers)
        documents = (read()[:40_000] for read in readers)  # no single file is to dominate
        valid = _take(documents, sizes.valid_bytes)
        train = _take(documents, sizes.train_bytes)
        if sum(map(len, train)) >= sizes.train_bytes // 4:
            return train, valid
        found.append(f"{place} ({len(readers)} files)")
    raise SemeError(
        f"demo: too little {domain} text in this Python: {', '.join(found)}; use one with its standard library as files"
    )


def _take(documents: Iterator[str], length: int) -> list[str]:
    taken: list[str] = []
    while length > 0 and (document := next(documents, None)) is not None:
        taken.append(document)
        length -= len(document)
    return taken


# --- models -------------------------------------------------------------------------------------------------------


def _train_tokenizer(documents: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with special tokens and a chat template, as AutoTokenizer loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tokens(tokenizer: Any, documents: list[str]) -> torch.Tensor:
    """The documents as one sequence of token ids, each after an end-of-text token."""
    import torch

    return torch.tensor([i for ids in tokenizer(documents)["input_ids"] for i in (tokenizer.eos_token_id, *ids)])


def _train(
    model: Any,
    mixture: Mapping[str, float],
    tokens: Mapping[str, torch.Tensor],
    rate: float,
    steps: int,
    sizes: Sizes,
    progress: _Progress,
    name: str,
) -> None:
    """Train ``model`` in place, each batch made of the domains in the shares of ``mixture``."""
    import torch

    progress.say(f"training {name}: {steps} steps on {' and '.join(mixture)}")
    started = time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
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


def _loss(model: Any, tokens: torch.Tensor, sizes: Sizes) -> float:
    """Mean loss per token, in nats, over up to 64 evenly spaced windows."""
    import torch

    starts = torch.linspace(0, len(tokens) - sizes.context, min(64, len(tokens) // sizes.context)).long()
    batch = _windows(tokens, starts, sizes.context)
    with torch.inference_mode():
        return float(model(input_ids=batch, labels=batch).loss)


def _continue(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model writes after the prompt, the most likely token each time."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
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
    table = Table(title="Loss in nats per token on held-out files (lower is better)", title_justify="left")
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
