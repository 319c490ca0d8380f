"""The unpatched decoder on a sequence without the visual tokens that left: what tokens before the decoder mean.

A call of a model is taken down where its text model begins: embeddings, mask, positions, DeepStack's rows. Columns are
taken out of all of them, samples padded on the left again, and the unpatched text model is called with what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Taken:
    """What a text model is called with, (batch, length, ...) each; positions (planes, batch, length)."""

    embeds: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    deepstack: list[torch.Tensor]


def taken(model, inputs: dict, text_model=None) -> Taken:
    """The text model's call within a call of the model."""
    text_model = model.model.language_model if text_model is None else text_model
    seen = {}

    def keep(module, args, kwargs):
        seen.update(kwargs)

    handle = text_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(**inputs)
    finally:
        handle.remove()
    embeds, positions = seen["inputs_embeds"], seen.get("position_ids")
    mask = inputs["attention_mask"]
    if positions is None:
        positions = torch.arange(embeds.shape[1])[None]
    if positions.dim() == 2:
        positions = positions[None]
    return Taken(embeds, mask, positions.expand(-1, *mask.shape), seen.get("deepstack_visual_embeds") or [])


def without(call: Taken, stays: torch.Tensor, visual: torch.Tensor) -> Taken:
    """The call without the columns where `stays` (batch, length) is False. visual: (batch, length), where DeepStack's
    rows belong."""
    stays = stays & call.mask.bool()
    length = int(stays.sum(1).max())
    batch, width = len(stays), call.embeds.shape[-1]
    embeds, mask = call.embeds.new_zeros(batch, length, width), call.mask.new_zeros(batch, length)
    positions = call.positions.new_zeros(len(call.positions), batch, length)
    for sample, own in enumerate(stays):
        count = int(own.sum())
        embeds[sample, length - count :] = call.embeds[sample, own]
        mask[sample, length - count :] = 1
        positions[:, sample, length - count :] = call.positions[:, sample, own]
    return Taken(embeds, mask, positions, [rows[stays[visual]] for rows in call.deepstack])


def logits(model, call: Taken, visual: torch.Tensor) -> torch.Tensor:
    """(batch, length, vocabulary) of the unpatched decoder."""
    more = {}
    if call.deepstack:
        more = {"deepstack_visual_embeds": call.deepstack, "visual_pos_masks": visual}
    positions = call.positions if len(call.positions) > 1 else call.positions[0]
    out = model.model.language_model(
        inputs_embeds=call.embeds, attention_mask=call.mask, position_ids=positions, use_cache=False, **more
    )
    return model.lm_head(out.last_hidden_state)


def greedy(model, call: Taken, visual: torch.Tensor, steps: int) -> torch.Tensor:
    """(batch, steps) tokens, each from the whole sequence anew."""
    found = []
    for _ in range(steps):
        tokens = logits(model, call, visual)[:, -1].argmax(-1)
        found.append(tokens)
        call = with_token(model, call, tokens)
        visual = torch.cat([visual, torch.zeros_like(visual[:, :1])], 1)
    return torch.stack(found, 1)


def with_token(model, call: Taken, tokens: torch.Tensor) -> Taken:
    """The call with a token of text more in every sample, (batch,): one behind the last position, in every plane."""
    return Taken(
        torch.cat([call.embeds, model.get_input_embeddings()(tokens)[:, None]], 1),
        torch.cat([call.mask, torch.ones_like(call.mask[:, :1])], 1),
        torch.cat([call.positions, call.positions[:, :, -1:] + 1], 2),
        call.deepstack,
    )
