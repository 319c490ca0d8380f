"""Whether a decoder does what its modules' names say: a few rows through the text model, as it is and in lanes.

Names of children tell nothing of multipliers, of rotary pairs that interleave, of layers without rotary embedding. So
`patch` runs a small image between text through a few layers, those of every kind that the model has among them, and a
decode step after it through one of each kind, both ways, and refuses a model where they differ. That takes less than a
decode step of the whole model (`python -m tests.check_cost`).
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig

from ..executor.call import Call
from ..executor.decoder import Decoder
from ..executor.lanes import LaneExecutor
from ..executor.transformers_internals import CACHE, new_cache
from ..executor.weights import is_plain, product
from ..kernels import Backend
from ..layout.layout import VisualLayout
from ..layout.packing import pack
from ..plans.plan import VisualPlan
from .errors import PatchError

_TEXT, _SIDE = 3, 2  # text rows before and after an image of _SIDE x _SIDE tokens
_LENGTH = 2 * _TEXT + _SIDE**2
_FIRST = 4
# of the largest difference to the root mean square of the hidden states; what is wrong differs by 0.01 to 5
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
# from this width on, products are what takes time
_WIDE = 1024
_MOVED, _MARGIN = 8, 2  # of the rows, in units in the last place; of how far that moves the hidden states

# what tells kinds of layers apart among a module's attributes, and what does not
_PLAIN = frozenset((int, float, str, bool, type(None)))
_PLACES = frozenset(("layer_idx", "training", "_is_hf_initialized"))

_known: weakref.WeakKeyDictionary[nn.Module, list] = weakref.WeakKeyDictionary()


def check_behaviour(text_model: nn.Module, decoder: Decoder, backend: Backend) -> None:
    """Raise PatchError if lanes that compute everything differ from an unpatched text model's forward.

    Asked once for the same layers of the same settings. A model on the meta device, or without an embedding of its own,
    is not asked; one whose weights are offloaded is, since hooks load them.
    """
    kinds = [_kind(layer) for layer in text_model.layers]
    asked = [*kinds, *text_model.layers, *(_kind(part) for part in (text_model.norm, text_model.rotary_emb))]
    embedding = getattr(text_model, "embed_tokens", None)
    if embedding is None or _known.get(text_model) == asked:
        return
    chosen, of_each_kind = _chosen(kinds)
    layers = [text_model.layers[index] for index in chosen]
    if _are_empty((embedding, *layers, text_model.norm)):
        return
    parts = ("query", "output", "up", "down")
    plain = all(is_plain(decoder.layers[index].module(part)) for index in chosen for part in parts)
    # under inference, quantised layers may pack their weights into a form that trains no longer
    with _quiet(text_model, layers), torch.inference_mode(False), torch.set_grad_enabled(not plain):
        rows, positions = _rows(text_model, embedding)
        rows = rows.detach().requires_grad_(not plain)
        steps = _steps(rows, positions, chosen, of_each_kind)
        try:
            runner = "forward fails (vis_sparse.patch runs it on a few rows)"
            with _QuickProducts() if plain and rows.shape[-1] >= _WIDE else nullcontext():
                expected = _unpatched(text_model, steps)
            runner = "lanes fail"
            given = _in_lanes(text_model, decoder, backend, steps)
        except Exception as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise PatchError(f"model: got a {type(text_model).__name__} whose {runner}: {why}") from error
        off, limit = _difference(given, expected), _TOLERANCES.get(rows.dtype, 0.1)
        if not plain:
            # layers that round what goes in make much of little
            moved = rows * (1 + _MOVED * torch.finfo(rows.dtype).eps)
            moved = _unpatched(text_model, _steps(moved, positions, chosen, of_each_kind))
            limit = max(limit, _MARGIN * _difference(moved, expected))
        if not off <= limit:
            where = _first_difference(text_model, decoder, backend, steps[:1], limit)
            raise PatchError(
                f"model: got a {type(text_model).__name__} that differs from its lanes by {off:.3g} of the size of its "
                f"hidden states, {where}, expected at most {limit:.3g}: its decoder computes something that its "
                f"modules do not show by their names{_likely(text_model.config)}"
            )
    _known[text_model] = asked


def _difference(given: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, of the size of what is expected."""
    given, expected = given.detach().float(), expected.detach().float()
    return float((given - expected).abs().max() / expected.square().mean().sqrt().clamp_min(1e-12))


def _are_empty(parts: Sequence[nn.Module]) -> bool:
    return any(
        parameter is not None and parameter.is_meta and not hasattr(module, "_hf_hook")
        for part in parts
        for module in part.modules()
        for parameter in module._parameters.values()
    )


def _chosen(kinds: list[tuple]) -> tuple[list[int], list[int]]:
    """Indices of the layers that a prompt runs through: the first of every kind, the first few and the last of all; and
    of those for a decode step, the first of every kind.

    What a layer does may hang on its number alone; such patterns repeat every few layers.
    """
    first = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())
    last = len(kinds) - 1
    return sorted({*range(min(_FIRST, last)), *first, last}), first


def _kind(part: nn.Module) -> tuple:
    """What a part is, but for its weights and its place: its modules' classes, settings, shapes and own forwards."""
    return tuple(map(_settings, part.modules()))


def _settings(module: nn.Module) -> tuple:
    held = vars(module)
    plain = [item for item in held.items() if type(item[1]) in _PLAIN and item[0] not in _PLACES]
    shapes = [(name, tensor.shape) for name, tensor in held["_parameters"].items() if tensor is not None]
    return type(module), held.get("forward"), tuple(plain), tuple(shapes)


@contextmanager
def _quiet(text_model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """The text model and some of its layers without dropout and checkpointing, for the length of the block."""
    rotary = text_model.rotary_emb
    others = (module for name, module in text_model.named_children() if name != "layers")
    called = (text_model, *layers, *(getattr(layer, part) for layer in layers for part in ("self_attn", "mlp")))
    drops = (module for part in (*others, *layers) for module in part.modules() if "Dropout" in type(module).__name__)
    training = [module for module in (*called, *drops) if module.training]
    text_model.rotary_emb = copy.deepcopy(rotary)  # some keep what they were called with last
    for module in training:
        module.training = False
    try:
        yield
    finally:
        text_model.rotary_emb = rotary
        for module in training:
            module.training = True


@contextmanager
def _only(text_model: nn.Module, chosen: list[int]) -> Iterator[None]:
    """The text model with some of its layers, for the length of the block."""
    layers = text_model.layers
    text_model.layers = nn.ModuleList(layers[index] for index in chosen)
    try:
        yield
    finally:
        text_model.layers = layers


class _QuickProducts(TorchFunctionMode):
    """Linear layers by the lanes' products: few rows take `linear` up to four times as long as they need."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (product if func is functional.linear else func)(*args, **(kwargs or {}))


def _rows(text_model: nn.Module, embedding: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of random words (1, _LENGTH + 1, hidden), and their positions, the last that the model has: what is
    done from some position on shows there."""
    config = text_model.config
    words = torch.from_numpy(np.random.default_rng(0).integers(config.vocab_size, size=(1, _LENGTH + 1)))
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    rows = embedding(words.to(next(embedding.parameters()).device if device is None else device))
    columns = torch.arange(_LENGTH + 1, device=rows.device)
    start = max(0, (getattr(config, "max_position_embeddings", None) or 0) - len(columns))
    if "mrope_section" not in (getattr(config, "rope_parameters", None) or {}):
        return rows, start + columns[None]
    planes = (columns - _SIDE**2 + _SIDE).clamp_min(0).where(columns >= _TEXT + _SIDE**2, columns).repeat(3, 1)
    grid = torch.arange(_SIDE**2, device=rows.device)
    image = slice(_TEXT, _TEXT + _SIDE**2)
    planes[0, image], planes[1, image], planes[2, image] = _TEXT, _TEXT + grid // _SIDE, _TEXT + grid % _SIDE
    return rows, start + planes[:, None]


def _steps(rows: torch.Tensor, positions: torch.Tensor, *layers: list[int]) -> list[tuple[list[int], dict]]:
    """Layers and arguments of the two calls: a prompt, and a decode step."""
    steps = []
    for indices, columns in zip(layers, (slice(0, _LENGTH), slice(_LENGTH, _LENGTH + 1))):
        arguments = {
            "inputs_embeds": rows[:, columns],
            "position_ids": positions[..., columns],
            "use_cache": True,
            # asked for, transformers puts hooks on the layers that there are, once and for all
            "output_hidden_states": False,
            "output_attentions": False,
        }
        steps.append((indices, arguments))
    return steps


def _unpatched(text_model: nn.Module, steps) -> torch.Tensor:
    cache, hidden = new_cache(text_model.config), []
    for indices, arguments in steps:
        with _only(text_model, indices):
            hidden.append(text_model(**arguments, **{CACHE: cache}).last_hidden_state)
    return torch.cat(hidden, 1)


def _in_lanes(text_model: nn.Module, decoder: Decoder, backend: Backend, steps, inputs: list | None = None):
    """Final hidden states of the calls in lanes. Appends the inputs of each layer, and what the last gives, to `inputs`
    if given."""
    layout = VisualLayout.from_grids([[(_TEXT, (1, _SIDE, _SIDE))]])
    cached, hidden, past = {}, [], 0
    for indices, arguments in steps:
        some = dataclasses.replace(decoder, layers=tuple(decoder.layers[index] for index in indices))
        executor = LaneExecutor(some, VisualPlan.dense(len(indices)), backend)
        cached = cached or dict(zip(indices, executor.new_cache_layers(1)))
        layers = [cached[index] for index in indices]
        embeds, ids = arguments["inputs_embeds"], arguments["position_ids"]
        length = embeds.shape[1]
        packing = pack(layout if not past else VisualLayout(1), length, past)
        layers[0].book.append(packing.slots(), length)
        call = Call.over(packing, layers[0].book, None, embeds.device)
        cos, sin = text_model.rotary_emb(embeds, position_ids=ids)
        out = executor.run(embeds, cos, sin, call, layers, inputs)
        if inputs is not None:
            inputs.append(out)
        hidden.append(text_model.norm(out))
        past += length
    return torch.cat(hidden, 1)


def _first_difference(text_model, decoder, backend, steps, limit: float) -> str:
    """Where in the prompt's pass the two part, in words. steps: the prompt alone."""
    inputs: list[torch.Tensor] = []
    own: list[torch.Tensor] = []
    chosen, arguments = steps[0]

    def note(module, args, kwargs):
        inputs.append(args[0] if args else kwargs["hidden_states"])

    handles = [text_model.layers[index].register_forward_pre_hook(note, with_kwargs=True) for index in chosen]
    try:
        with _only(text_model, chosen):
            text_model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    _in_lanes(text_model, decoder, backend, steps, own)
    for number, (theirs, ours) in enumerate(zip(inputs, own)):
        if not _difference(ours, theirs) <= limit:
            return "before its first layer" if number == 0 else f"first in layer {chosen[number - 1]}"
    return f"first in layer {chosen[-1]}, after it or in the decode step"


def _likely(config) -> str:
    """The settings that Llama's config does not have, which may be what it is."""
    known = set(LlamaConfig().to_dict())
    words = ("mult", "scal", "soft", "rope", "rotary", "norm", "window", "lambda", "factor", "residual")
    found = [
        f"{name}={value}"
        for name, value in config.to_dict().items()
        if name not in known and any(word in name for word in words) and np.isscalar(value)
    ]
    return f" (its config has {', '.join(sorted(found))})" if found else ""
