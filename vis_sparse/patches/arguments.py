"""What a text model is called with: obeyed by the lanes, or refused with what to do instead."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..executor.bound import Bound
from ..executor.transformers_internals import CACHE, describe_cache, holds_plain_or_lanes
from ..layout.layout import LayoutError, VisualLayout
from .errors import PatchError

# Keyword arguments of a text model that the lanes obey, or that say nothing about its computation: what transformers'
# outer models, `generate` and `Trainer` hand down.
_OBEYED = ("output_hidden_states", "return_dict", "deepstack_visual_embeds")
_SILENT = (
    "cache_position", "visual_pos_masks", "num_items_in_batch", "mm_token_type_ids", "token_type_ids", "logits_to_keep",
)  # fmt: skip
# What a caller may say that is so anyway.
_SAME = {"is_causal": True, "output_attentions": False}
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class Asked(NamedTuple):
    """A call in lanes: its plan's name, its own segments, its columns and those cached before; the mask of all of them,
    on the host, or as it was given to a decode step (one column of text after a cache of lanes). capacity: columns of a
    static cache. kept: the packed visual rows that come into the decoder, None for all."""

    name: str
    layout: VisualLayout
    length: int
    past: int
    mask: np.ndarray | torch.Tensor | None
    is_step: bool
    bound: Bound
    capacity: int | None
    kept: np.ndarray | None = None


def check_arguments(config, attention_mask, position_ids, cache, length: int, past: int, kwargs: dict) -> None:
    """Raise PatchError for an argument of the text model that the lanes do not implement."""
    attentions = kwargs.get("output_attentions")
    if config.output_attentions if attentions is None else attentions:
        raise PatchError(
            "output_attentions: got True on a patched model, expected False (no attention matrix is ever formed; "
            "unpatch the model to get them)"
        )
    hidden = kwargs.get("output_hidden_states")
    if not isinstance(hidden, bool | None):
        raise PatchError(f"output_hidden_states: got {_short(hidden)} on a patched model, expected True or False")
    for name, value in kwargs.items():
        if value is None or name in _OBEYED or name in _SILENT or name in _SAME and value == _SAME[name]:
            continue
        if name in _PACKED:
            raise PatchError(f"{name}: got packed sequences, expected one sequence a batch row")
        raise PatchError(
            f"{name}: got {_short(value)} on a patched model, expected an argument that the lanes know "
            f"({', '.join(_OBEYED)}); unpatch the model for calls with it"
        )
    if not holds_plain_or_lanes(cache):
        raise PatchError(
            f"{CACHE}: got {describe_cache(cache)}, expected a DynamicCache (a static, quantised or offloaded "
            "cache cannot hold the lanes)"
        )
    if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.dim() != 2):
        given = "a dict" if isinstance(attention_mask, dict) else f"{attention_mask.dim()} dimensions"
        raise PatchError(f"attention_mask: got {given}, expected 2 dimensions (batch, columns) of ones and zeros")
    if attention_mask is None and not past:
        _check_not_packed(position_ids)
    window = getattr(config, "sliding_window", None)
    if window is not None and past + length > window:
        raise PatchError(
            f"sliding_window: got {past + length} columns, expected at most the {window} of the model's window (lanes "
            "have no sliding window; unpatch the model for longer sequences)"
        )


def _check_not_packed(position_ids: torch.Tensor | None) -> None:
    """transformers takes positions that do not go up by one for several sequences in a row, where nothing is masked."""
    if position_ids is None or position_ids.is_meta:
        return
    if position_ids.dim() == 3:
        if position_ids.shape[0] != 4:
            return  # M-RoPE's planes alone say nothing
        position_ids = position_ids[0]
    if bool((position_ids.diff(dim=-1) != 1).any()):
        raise PatchError(
            "position_ids: got positions that start again (samples packed in a row), expected one sequence a batch "
            "row, or an attention_mask where positions have gaps"
        )


def check_mask(attention_mask: torch.Tensor | None, columns: int) -> None:
    """Raise PatchError for a mask of another number of columns."""
    if attention_mask is not None and attention_mask.shape[1] != columns:
        raise PatchError(
            f"attention_mask: got {attention_mask.shape[1]} columns, expected {columns} (cached ones and the call's)"
        )


def host_mask(attention_mask: torch.Tensor | None) -> np.ndarray | None:
    """(batch, columns) bool on the host, or None if nothing is padding."""
    if attention_mask is None:
        return None
    mask = attention_mask.cpu().numpy().astype(bool)
    return None if mask.all() else mask


def _short(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value) if len(repr(value)) <= 40 else f"a {type(value).__name__}"


def added_rows(deepstack, layout: VisualLayout, embeds: torch.Tensor) -> list[torch.Tensor]:
    """What DeepStack adds to the visual rows after each of the first layers: theirs in sequence order, as packed."""
    added = [rows.to(embeds.device, embeds.dtype) for rows in deepstack or ()]
    if added and len(added[0]) != layout.num_visual:
        raise LayoutError(
            f"deepstack_visual_embeds: got {len(added[0])} rows, expected one for each of the call's "
            f"{layout.num_visual} visual tokens"
        )
    return added


def planes(config, position_ids: torch.Tensor) -> torch.Tensor:
    """Positions as the text model's rotary embedding takes them: (batch, length), or of M-RoPE (3, batch, length)."""
    if position_ids.dim() == 3:
        return position_ids[-3:]  # a plane of text positions may lie before M-RoPE's
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return position_ids.expand(3, -1, -1)  # older transformers' M-RoPE takes nothing else
    return position_ids


def wants_hidden(config, kwargs: dict) -> bool:
    """Whether a call asks for the hidden states of all layers."""
    wanted = kwargs.get("output_hidden_states")
    return config.output_hidden_states if wanted is None else wanted


def unbound(module, args: tuple) -> tuple:
    """The arguments of a call without the module itself, to which accelerate's `unwrap_model` binds what it finds as
    the module's forward."""
    return args[1:] if args and args[0] is module else args
