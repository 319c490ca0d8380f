"""What `vis_sparse` uses of transformers beyond its documented face, in one place: what a new release may change.

Written against transformers 5.10 to 5.24.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

OLDEST, NEWEST = "5.10", "5.24"
_NOTE = "vis_sparse_grids"

_release, _oldest, _newest = (Version(text).release[:2] for text in (transformers.__version__, OLDEST, NEWEST))
if _release < _oldest:
    raise ImportError(f"transformers: got {transformers.__version__}, expected {OLDEST} to {NEWEST}")
if _release > _newest:
    # not refused: `make test-next` is how the next one is found out about
    warnings.warn(
        f"vis_sparse: got transformers {transformers.__version__}, which it has not been tried with, expected "
        f"{OLDEST} to {NEWEST}",
        stacklevel=2,
    )

# What the cache is called among the arguments and outputs of models: `cache` since 5.24, where the old name is taken
# with a warning.
_OLD_NAME = "past_key_values"
CACHE = "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else _OLD_NAME


def cache_among(arguments: Mapping):
    """The cache among a model's arguments, by either name that this transformers takes; None if there is none."""
    cache = arguments.get(CACHE)
    return arguments.get(_OLD_NAME) if cache is None else cache


def traced_as_before(arguments: dict) -> dict:
    """`named_as_before` for a call that is being compiled: without a warning, which would break its graph."""
    others = {name: value for name, value in arguments.items() if name not in (CACHE, _OLD_NAME)}
    return {**others, _OLD_NAME: cache_among(arguments)}


if CACHE == _OLD_NAME:

    def named_as_before(arguments: dict) -> dict:
        """Keyword arguments of a text model, its cache as `past_key_values`."""
        return arguments

else:
    from transformers.utils.deprecation import deprecate_kwarg

    @torch.compiler.disable
    def named_as_before(arguments: dict) -> dict:
        """Keyword arguments of a text model, its cache as `past_key_values`; the old name is warned of as transformers
        does."""
        return _renamed(**arguments)

    @deprecate_kwarg(_OLD_NAME, "5.40.0", new_name=CACHE)
    def _renamed(cache=None, **others) -> dict:
        return {**others, _OLD_NAME: cache}


def output_of(last_hidden_state, cache, hidden_states) -> BaseModelOutputWithPast:
    """What a text model gives."""
    given = {"last_hidden_state": last_hidden_state, CACHE: cache, "hidden_states": hidden_states}
    return BaseModelOutputWithPast(**given)


class LaneLayerBase(CacheLayerMixin):
    """What a layer of a transformers cache must have, for one that holds lanes: lengths, and no `keys` and `values`.

    Code that looks for those finds an error that says what is there instead.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self):
        self.is_initialized = True

    def _no_tensor(self):
        raise AttributeError(
            "keys, values: this cache layer holds lanes of a model patched by vis_sparse (text and visual slots apart, "
            "other heads for each); expected code that uses the cache's methods, or a cache of the unpatched model"
        )

    keys = property(_no_tensor)
    values = property(_no_tensor)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.20

    def offload(self):
        raise NotImplementedError("offload: got a cache layer that holds lanes, expected one of an unpatched model")

    prefetch = offload

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing to do: the stores take their shape from the first call."""

    def update(self, key_states, value_states, *args, **kwargs):
        raise RuntimeError(
            "cache: this KV cache holds the lanes of a model patched by vis_sparse, got a call from an unpatched "
            "forward; expected the patched model, or a new cache after unpatch"
        )


def new_cache(config) -> DynamicCache:
    return DynamicCache(config=config)


def cache_layers(cache) -> list:
    """The layers of a cache; [] for none."""
    return [] if cache is None else cache.layers


def set_cache_layers(cache, layers: list) -> None:
    cache.layers = layers


def holds_lanes(cache) -> bool:
    layers = cache_layers(cache)  # all of them do, or none
    return len(layers) > 0 and isinstance(layers[0], LaneLayerBase)


def holds_plain_or_lanes(cache) -> bool:
    """Whether lanes can live in a cache: none, a DynamicCache whose layers are plain (a sliding window is, until it is
    full) or lanes, or a StaticCache that is empty or holds lanes."""
    if cache is None or static_columns(cache) is not None:
        return True
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    plain = all(type(layer) in kinds or isinstance(layer, LaneLayerBase) for layer in cache_layers(cache))
    holds = isinstance(cache, DynamicCache) or isinstance(cache, StaticCache) and holds_lanes(cache)
    return holds and plain and not getattr(cache, "offloading", False)


def static_columns(cache) -> int | None:
    """Columns that an empty static cache has room for; None of another cache."""
    layers = cache_layers(cache)
    plain = isinstance(cache, StaticCache) and all(type(layer) is StaticLayer for layer in layers)
    if not plain or getattr(cache, "offloading", False):
        return None
    return None if any(layer.is_initialized for layer in layers) else min(layer.max_cache_len for layer in layers)


def is_fixed(cache) -> bool:
    """Whether a cache holds lanes of one size, between decode steps of one shape."""
    return holds_lanes(cache) and cache_layers(cache)[0].is_compileable


def describe_cache(cache) -> str:
    kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())})
    return f"{type(cache).__name__} of {', '.join(kinds)}" if kinds else type(cache).__name__


def keeps_no_activations(block: nn.Module) -> bool:
    """Whether gradient checkpointing runs the block again in the backward pass."""
    return torch.is_grad_enabled() and block.training and getattr(block, "gradient_checkpointing", False)


def note(encoded, grids: list, said: np.ndarray | None, travels: bool = False) -> None:
    """Write on an encoder's output the grids of what it encoded, and what it said of their tokens. travels: as one of
    its entries, which copies have."""
    if travels:
        encoded[_NOTE] = grids, said
    else:
        setattr(encoded, _NOTE, (grids, said))


def noted_grids(encoded) -> list | None:
    return getattr(encoded, _NOTE, (None, None))[0]


def noted_said(encoded) -> np.ndarray | None:
    return getattr(encoded, _NOTE, (None, None))[1]
