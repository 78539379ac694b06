"""The small Llama models: sizes, training, files, losses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.corpus import BASE, DOMAINS, Amounts, Corpus

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Drift:
    """How far experts move from the base: AdamW steps and highest rate (a cosine to zero, so that they converge)."""

    steps: int
    rate: float


@dataclass(frozen=True)
class Settings:
    """What is trained.

    Attributes:
        sizes: width of each size; all have 4 layers unless ``layers`` says otherwise.
        layers: transformer layers.
        batch: windows of a step.
        base: steps and rate of the base.
        drifts: steps and rate of the experts, by name.
        amounts: text.
    """

    sizes: Mapping[str, int] = field(default_factory=lambda: {"d64": 64, "d128": 128, "d192": 192})
    layers: int = 4
    batch: int = 8
    base: Drift = Drift(1000, 3e-3)
    drifts: Mapping[str, Drift] = field(default_factory=lambda: {"strong": Drift(300, 8e-4), "mild": Drift(600, 3e-4)})
    amounts: Amounts = field(default_factory=Amounts)


SMOKE = Settings(
    sizes={"d32": 32},
    layers=2,
    batch=8,
    base=Drift(60, 5e-3),
    drifts={"strong": Drift(40, 3e-3)},
    amounts=Amounts(base_chars=200_000, chars=100_000, files=60, vocabulary=512, context=32, windows=32),
)


def new(settings: Settings, size: str) -> Any:
    """An untrained model: Llama with grouped-query attention and an untied head."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = settings.sizes[size]
    heads = max(2, hidden // 32)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.amounts.vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 16 * 16,
            num_hidden_layers=settings.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=settings.amounts.context,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def batches(tokens: torch.Tensor, settings: Settings, seed: int) -> Callable[[], torch.Tensor]:
    """A source of random training batches [batch, context], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    context = settings.amounts.context

    def draw() -> torch.Tensor:
        starts = torch.randint(len(tokens) - context, (settings.batch, 1), generator=generator)
        return tokens[starts + torch.arange(context)].long()

    return draw


def train(model: Any, tokens: torch.Tensor, drift: Drift, settings: Settings, seed: int) -> float:
    """Train in place: AdamW, warm-up over 5 % of the steps, cosine to zero. Returns the last losses' mean."""
    draw = batches(tokens, settings, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=drift.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, drift.rate, total_steps=drift.steps, pct_start=0.05, cycle_momentum=False, final_div_factor=1e9
    )
    model.train()
    losses = []
    for _ in range(drift.steps):
        batch = draw()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:])


class Trained:
    """Base and experts of one size and seed, each trained once and kept in ``folder``."""

    def __init__(
        self, folder: Path, corpus: Corpus, settings: Settings, size: str, seed: int, say: Callable[[str], None]
    ) -> None:
        self.folder = folder / size
        self.corpus = corpus
        self.settings = settings
        self.size = size
        self.seed = seed
        self.say = say
        self.model = new(settings, size)

    @cached_property
    def base(self) -> State:
        """The base, trained on English."""
        return self._make("base", None, BASE, self.settings.base, 0)

    def expert(self, drift: str, domain: str) -> State:
        """The base fine-tuned on one domain."""
        number = 1 + 10 * list(self.settings.drifts).index(drift) + DOMAINS.index(domain)
        return self._make(f"{drift}-{domain}", self.base, domain, self.settings.drifts[drift], number)

    def _make(self, name: str, start: State | None, domain: str, drift: Drift, number: int) -> State:
        from safetensors.torch import load_file, save_file

        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            begun = time.monotonic()
            seed = 1000 * self.seed + number
            torch.manual_seed(seed)
            model = new(self.settings, self.size)
            if start is not None:
                model.load_state_dict(start)
            loss = train(model, self.corpus.train[domain], drift, self.settings, seed)
            self.folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, part)
            part.replace(file)
            took = time.monotonic() - begun
            self.say(f"{self.size}/{self.seed}: {name} trained to {loss:.3f} nats per token in {took:.0f} s")
        state: State = load_file(file)
        return state


def loss(model: Any, state: Mapping[str, torch.Tensor], windows: torch.Tensor) -> float:
    """Mean nats per token of the model with these weights; float32 forward, the mean in float64."""
    model.load_state_dict(state)
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for batch in windows.split(16):
            logits = model(input_ids=batch).logits[:, :-1]
            each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            total += float(each.double().sum())
    return total / windows[:, 1:].numel()
