"""Running a model of transformers layer by layer, with weights that every call brings along.

The model is built without memory for its parameters (they are on the meta device), so rotary embeddings, masks and
everything else of its forward pass are transformers' own, whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from seme.checkpoint.reader import Checkpoint
from seme.errors import CheckpointError, SemeError

if TYPE_CHECKING:
    import torch

    Weights = Mapping[str, torch.Tensor]
    Call = tuple[tuple[Any, ...], dict[str, Any]]


_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
"""What families call the number of positions in ``config.json``."""


class _Stop(Exception):
    """Not an error: it ends a forward pass at the module that was asked for."""

    def __init__(self, value: Any) -> None:
        self.value = value


@contextmanager
def _weightless() -> Iterator[None]:
    """Models built inside have their parameters on the meta device, their buffers where they belong."""
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def to_meta(_: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        # The same object if it is there already, or tied weights would come apart.
        return parameter if parameter.is_meta else torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # it may give a parameter
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _watched(modules: Mapping[str, torch.nn.Module], see: Callable[[str, Any], None]) -> Iterator[None]:
    """Inside, ``see(name, first argument)`` is called before each run of one of the modules."""

    def watch(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else next(iter(kwargs.values()), None))

        return hook

    handles = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Maps:
    """Linear maps of a layer that get the same input.

    Attributes:
        names: in the order they run in.
        adds_to: the module that gets the residual stream which their output is added to, unchanged; "" is the layer
            itself; None if their output goes elsewhere.
    """

    names: tuple[str, ...]
    adds_to: str | None


class Skeleton:
    """A model as transformers runs it, without its weights, which each call brings along.

    Attributes:
        where: folder of the checkpoint.
        vocabulary: number of token ids.
        positions: tokens of the longest text that its config allows; None if it does not say.
        stored: by the name that transformers has for a parameter, the checkpoint's name.
        layers: the decoder layers, ``prefix`` their name.
        outside: names of the parameters outside the layers, without an untied head's.
        head: name of the untied head's weight; None if it is tied to the embedding.
        maps: by layer, the linear maps in it by their names.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Build it from ``config.json``.

        Raises:
            CheckpointError: transformers cannot build it, or its layers have other weights than linear maps and
                vectors.
            SemeError: transformers is not installed.
        """
        transformers = _transformers()
        self.checkpoint = checkpoint
        self.where = checkpoint.path
        try:
            config = transformers.AutoConfig.from_pretrained(self.where, local_files_only=True, trust_remote_code=False)
            with _weightless():
                self.model = (
                    transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval().float()
                )
            text = config.get_text_config()
            count = text.num_hidden_layers
        except Exception as e:
            raise self._unsupported(f"transformers cannot build it as a causal model ({_first_line(e)})") from e
        limits = [getattr(text, name, None) for name in _POSITIONS]
        self.positions = min((n for n in limits if isinstance(n, int) and n > 0), default=None)
        self.prefix, self.layers = self._find_layers(count)
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self._head = self.model.get_output_embeddings()
        if self._head is None:
            raise self._unsupported("it has no LM head")
        names = {id(p): n for n, p in self.model.named_parameters()}
        embedding = self.model.get_input_embeddings().weight
        self.head = None if self._head.weight is embedding else names[id(self._head.weight)]
        inside = f"{self.prefix}."
        self.outside = [n for n in names.values() if not n.startswith(inside) and n != self.head]
        self.maps = [self._find_maps(i) for i in range(count)]
        self.stored = self._find_stored()
        self._calls: list[Call] = []
        self._tuple = False  # whether a layer gives a tuple

    def _unsupported(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: rule sequence cannot run this model: {why}; use rule: project")

    def _find_layers(self, count: int) -> tuple[str, Any]:
        import torch

        lists = [(n, m) for n, m in self.model.named_modules() if isinstance(m, torch.nn.ModuleList)]
        lists = [(n, m) for n, m in lists if len(m) == count]
        if not lists:
            raise self._unsupported(f"it has no list of {count} decoder layers")
        return max(lists, key=lambda named: sum(p.numel() for p in named[1].parameters()))

    def _find_stored(self) -> dict[str, str]:
        """The checkpoint's names: those of transformers, maybe without the model's prefix.

        Where a family has renamed a tensor (GPT-NeoX's ``embed_out`` is ``lm_head`` now), it is the one left over of
        that shape.
        """
        shapes = {n: t.shape for n, t in self.checkpoint.tensors.items()}
        wanted = dict(self.model.named_parameters())
        prefix = f"{self.model.base_model_prefix}."
        stored = {}
        for name in wanted:
            known = name if name in shapes else name.removeprefix(prefix)
            if known in shapes:
                stored[name] = known
        left = {n: shape for n, shape in shapes.items() if n not in stored.values()}
        missing = {n: tuple(p.shape) for n, p in wanted.items() if n not in stored}
        for name, shape in missing.items():
            renamed = [n for n, other in left.items() if other == shape]
            if len(renamed) != 1 or list(missing.values()).count(shape) != 1:
                model = type(self.model).__name__
                raise self._unsupported(f"{model} wants a tensor {name} {list(shape)}, which the checkpoint has not")
            stored[name] = renamed[0]
        return {n: stored[n] for n in wanted}

    def _find_maps(self, i: int) -> dict[str, torch.nn.Module]:
        import torch

        layer = self.layers[i]
        maps = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear) or is_transposed(m)}
        for name, parameter in layer.named_parameters():
            if parameter.ndim > 1 and name.removesuffix(".weight") not in maps:
                what = f"{self.prefix}.{i}.{name} {list(parameter.shape)}"
                raise self._unsupported(f"{what} is no linear map (a mixture of experts?)")
        return maps

    def weights(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """These parameters from the checkpoint, float32."""
        return {n: read(self.checkpoint, self.stored[n]) for n in names}

    def inside(self, i: int) -> list[str]:
        """Names of the parameters of a layer within it."""
        return [n for n, _ in self.layers[i].named_parameters()]

    def layer(self, i: int) -> dict[str, torch.Tensor]:
        """The parameters of a layer by their names within it, float32."""
        return {n: read(self.checkpoint, self.stored[f"{self.prefix}.{i}.{n}"]) for n in self.inside(i)}

    def write(self, rows: int, length: int, temperature: float, generator: torch.Generator) -> torch.Tensor:
        """Text that the model writes: ids [rows, length], each row from a random first token on.

        All of its weights and the keys and values of all rows are in memory meanwhile: in bfloat16 if the embedding is
        stored in 16 bits, else in float32.
        """
        import torch

        embedding = self.checkpoint.tensors[self.stored[self.outside[0]]]
        dtype = torch.bfloat16 if embedding.dtype.itemsize == 2 else torch.float32
        weights = {n: read(self.checkpoint, stored).to(dtype) for n, stored in self.stored.items()}
        token = torch.randint(self.vocabulary, (rows, 1), generator=generator)
        ids, past = [token], None
        while len(ids) < length:
            out = self._call(weights, input_ids=token, past_key_values=past, use_cache=True)
            past = out.past_key_values
            chances = (out.logits[:, -1].float() / temperature).softmax(-1)
            token = torch.multinomial(chances, 1, generator=generator)
            ids.append(token)
        return torch.cat(ids, 1)

    def _call(self, weights: Weights, **kwargs: Any) -> Any:
        import torch

        return torch.func.functional_call(self.model, dict(weights), (), kwargs)

    @contextmanager
    def _stubs(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Layers replaced by ``forward(i, hidden, *args, **kwargs)``."""
        for i, layer in enumerate(self.layers):
            layer.forward = partial(forward, i)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def enter(self, weights: Weights, ids: torch.Tensor) -> torch.Tensor:
        """What the first layer gets for these ids; ``weights`` are those outside the layers."""

        def first(i: int, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            raise _Stop(hidden)

        with self._stubs(first):
            try:
                self._call(weights, input_ids=ids, use_cache=False)
            except _Stop as reached:
                hidden: torch.Tensor = reached.value
                return hidden
        raise self._unsupported("its forward pass does not reach its layers")

    def leave(self, weights: Weights, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What the head gets, [tokens, d], if the last layer gives ``hidden``."""

        def stop(name: str, value: torch.Tensor) -> None:
            raise _Stop(value)

        with (
            self._stubs(lambda i, *args, **kwargs: (hidden,) if self._tuple else hidden),
            _watched({"": self._head}, stop),
        ):
            try:
                self._call(weights, input_ids=ids, use_cache=False)
            except _Stop as reached:
                value: torch.Tensor = reached.value
                return value.flatten(0, -2)
        raise self._unsupported("its forward pass does not reach its head")

    def prepare(self, outside: Weights, first: Weights, ids: torch.Tensor) -> None:
        """Learn, from one batch, what the model passes to each layer besides the hidden state, and what a layer gives.

        Raises:
            CheckpointError: that depends on the text, or layers do not run once each in order.
        """
        hidden = self.enter(outside, ids)
        self._calls = self._record(outside, ids, 1)
        out = self._layer(0, first, hidden)
        self._tuple = isinstance(out, tuple)
        self._calls = self._record(outside, ids, len(self.layers))
        other = self._record(outside, (ids + 1) % self.vocabulary, len(self.layers))
        if not _same(self._calls, other):
            raise self._unsupported("its layers see more of the text than the hidden state")

    def _record(self, outside: Weights, ids: torch.Tensor, count: int) -> list[Call]:
        """Arguments of the first ``count`` layers."""
        calls: list[Call] = []

        def record(i: int, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if i != len(calls):
                raise self._unsupported(f"layer {i} runs where layer {len(calls)} was expected")
            calls.append((args, kwargs))
            if len(calls) == count:
                raise _Stop(None)
            return (hidden,) if self._tuple else hidden

        with self._stubs(record), suppress(_Stop):
            self._call(outside, input_ids=ids, use_cache=False)
        if len(calls) < count:
            raise self._unsupported(f"its forward pass runs {len(calls)} of its layers")
        return calls

    def _layer(self, i: int, weights: Weights, hidden: torch.Tensor) -> Any:
        import torch

        args, kwargs = self._calls[i]
        return torch.func.functional_call(self.layers[i], dict(weights), (hidden, *args), kwargs)

    def run(self, i: int, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """Layer ``i`` with these weights: [batch, length, d] to the same."""
        out = self._layer(i, weights, hidden)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def inputs(self, i: int, weights: Weights, hidden: torch.Tensor, maps: Maps) -> tuple[torch.Tensor, ...]:
        """What ``maps`` of layer ``i`` get, [tokens, in]; and the stream that they add to, [tokens, d], if they do."""
        stream: list[torch.Tensor] = [hidden] if maps.adds_to == "" else []

        def see(name: str, value: torch.Tensor) -> None:
            if name == maps.names[0]:
                raise _Stop(value)
            stream.append(value)

        seen = {n: self.layers[i].get_submodule(n) for n in (maps.adds_to, maps.names[0]) if n}
        with _watched(seen, see):
            try:
                self._layer(i, weights, hidden)
            except _Stop as reached:
                return tuple(t.flatten(0, -2) for t in (reached.value, *stream))
        raise self._unsupported(f"{self.prefix}.{i}.{maps.names[0]} does not run")

    def groups(self, i: int, weights: Weights, hidden: torch.Tensor) -> list[Maps]:
        """The linear maps of a layer in the order they run in, those with the same input together."""
        import torch

        inputs: list[tuple[str, torch.Tensor]] = []
        outputs: dict[str, torch.Tensor] = {}
        modules = {n: m for n, m in self.layers[i].named_modules() if n}

        def keep(name: str) -> Callable[..., None]:
            # A copy, as some models add to it in place; as rows, as some run their maps on rows.
            return lambda module, args, output: outputs.update({name: output.flatten(0, -2).clone()})

        def see(name: str, value: Any) -> None:
            if isinstance(value, torch.Tensor):
                inputs.append((name, value.flatten(0, -2)))

        handles = [m.register_forward_hook(keep(n)) for n, m in self.maps[i].items()]
        try:
            with _watched(modules, see):
                end = self.run(i, weights, hidden)
        finally:
            for handle in handles:
                handle.remove()
        ran = [(n, x) for n, x in inputs if n in self.maps[i]]
        if sorted(n for n, _ in ran) != sorted(self.maps[i]):
            raise self._unsupported(f"not every linear map of {self.prefix}.{i} runs once")
        # Which maps add to the residual stream, and where that can be seen: the sum is the input of a later module.
        adds_to: dict[str, str] = {}
        stream, seen_by = hidden.flatten(0, -2), ""
        for name, _ in ran:
            if outputs[name].shape != stream.shape:
                continue
            after = stream + outputs[name]
            reader = next((n for n, x in inputs if torch.equal(x, after)), None)
            if reader is not None or torch.equal(end.flatten(0, -2), after):
                adds_to[name] = seen_by
            if reader is not None:
                stream, seen_by = after, reader
        groups: list[Maps] = []
        previous = None
        for name, value in ran:
            if previous is not None and torch.equal(value, previous):
                groups[-1] = Maps((*groups[-1].names, name), None)
            else:
                groups.append(Maps((name,), adds_to.get(name)))
            previous = value
        return groups


def is_transposed(module: torch.nn.Module) -> bool:
    """True for GPT-2's ``Conv1D``, a linear map whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of a checkpoint in float32."""
    import torch

    stored = checkpoint.tensors[name]
    tensor = torch.empty(stored.shape, dtype=stored.dtype.to_torch())
    if tensor.numel():
        checkpoint.read_into(stored, 0, memoryview(tensor.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return tensor.float()


def _same(a: Any, b: Any) -> bool:
    """Whether all tensors in two nests of tuples, lists and dicts are equal."""
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return True


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as e:
        raise SemeError(f"rule sequence: transformers cannot be imported ({e}): pip install 'seme[demo]'") from e


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
