"""What one sample shows about a dense model: who looks at visual tokens, and what layers do to them.

One forward pass of the unpatched model with hooks; nothing of the size of an attention matrix is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..executor.decoder import Decoder
from ..layout.layout import VisualLayout
from ..patches import family_of, inspect
from ..patches.decoder import read_decoder
from ..patches.errors import PatchError
from ..patches.family import Family
from .attention_mass import replaced_attention, visual_mass
from .records import SampleError
from .samples import answer_rows


@dataclass(frozen=True)
class Target:
    """An unpatched model and where its parts are."""

    family: Family
    model: nn.Module
    outer: nn.Module
    text_model: nn.Module
    decoder: Decoder

    @classmethod
    def of(cls, model: nn.Module) -> Target:
        """Raises PatchError if the model is not supported, or patched."""
        family = family_of(model)
        if inspect(model) is not None:
            raise PatchError("model: got a patched model, expected a dense one (vis_sparse.unpatch(model) before)")
        outer = family.outer_model(model)
        text_model = family.text_model(outer)
        return cls(family, model, outer, text_model, read_decoder(text_model))

    def layout(self, sample: dict) -> VisualLayout:
        """Where the sample's visual tokens lie. Raises SampleError if there are none or no answer."""
        ids = sample["input_ids"]
        if ids.shape[0] != 1:
            raise SampleError(f"input_ids: got {ids.shape[0]} sequences, expected samples of one")
        layout = self.family.read_layout(self.outer, arguments_of(sample), 0)
        if layout is None or not layout.segments:
            raise SampleError("got no visual tokens, expected a sample with an image")
        if not len(answer_rows(sample)):
            raise SampleError("got an empty answer, expected labels at one token at least")
        return layout

    def encode(self, sample: dict) -> None:
        """The dense forward pass up to the LM head."""
        self.outer(**arguments_of(sample), use_cache=False)


def arguments_of(sample: dict) -> dict:
    """What the outer model is called with."""
    return {name: value for name, value in sample.items() if name != "labels"}


@dataclass(frozen=True)
class Profile:
    """Measurements of one sample, float64 on the CPU.

    ratios (layers, heads): visual mass over other mass at the answer's rows. text_mass (layers,): visual share of the
    attention of text rows after the first image, mean over rows and heads. attention_change, ffn_change (layers, 2):
    cosine between visual rows before and after the part, and the norm of what it added over that of the row; means
    over rows. neurons (layers, neurons): mean |activation| on visual rows times the norm of the output column.
    """

    ratios: torch.Tensor
    text_mass: torch.Tensor
    attention_change: torch.Tensor
    ffn_change: torch.Tensor
    neurons: torch.Tensor


def column_kinds(layout: VisualLayout, sample: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(length,) bool each: which columns of a sample are visual, and which are not padding."""
    is_visual = torch.zeros_like(sample["input_ids"][0], dtype=torch.bool)
    for segment in layout.segments:
        is_visual[segment.start : segment.end] = True
    mask = sample.get("attention_mask")
    return is_visual, torch.ones_like(is_visual) if mask is None else mask[0].bool()


class _Recorder:
    """Takes one sample's measurements from hooks, layer after layer, and keeps them on the model's device."""

    def __init__(self, target: Target, sample: dict):
        layout = target.layout(sample)
        self.is_visual, self.is_real = column_kinds(layout, sample)
        answer = torch.zeros_like(self.is_visual)
        answer[answer_rows(sample)] = True
        is_text = ~self.is_visual & self.is_real
        is_text[: layout.segments[0].start] = False
        self.columns = (answer | is_text).nonzero()[:, 0]
        self.of_answer, self.of_text = answer[self.columns], is_text[self.columns]
        self.ratios, self.text_mass, self.changes, self.activations = [], [], [], []
        self._before = None

    def attention(self, module, query, key, value, attention_mask, scaling, **kwargs):
        own = query[0][:, self.columns]
        visual, other = visual_mass(own, key[0], self.columns, self.is_visual, self.is_real, scaling)
        self.ratios.append(visual[:, self.of_answer].sum(1) / other[:, self.of_answer].sum(1))
        self.text_mass.append(visual[:, self.of_text].mean())
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    def state(self, module, args) -> None:
        """The residual stream before a norm: at attention, at the FFN, at attention, ..., at the final norm."""
        after = args[0][0][self.is_visual].float()
        before, self._before = self._before, after
        if before is not None:
            cosine = nn.functional.cosine_similarity(before, after, dim=-1)
            added = (after - before).norm(dim=-1) / before.norm(dim=-1)
            self.changes.append(torch.stack([cosine.mean(), added.mean()]))

    def inner(self, module, args) -> None:
        self.activations.append(args[0][0][self.is_visual].abs().float().mean(0))

    def profile(self, column_norms: torch.Tensor) -> Profile:
        def stacked(values) -> torch.Tensor:
            return torch.stack(values).double().cpu()

        of_attention, of_ffn = rearrange(stacked(self.changes), "(layer part) kind -> part layer kind", part=2)
        return Profile(
            stacked(self.ratios),
            stacked(self.text_mass),
            of_attention,
            of_ffn,
            stacked(self.activations) * column_norms,
        )


@contextmanager
def hooked(places: list[tuple[nn.Module, Callable]]):
    """Within the block, each function is a forward pre-hook of its module."""
    with ExitStack() as stack:
        for module, function in places:
            stack.callback(module.register_forward_pre_hook(function).remove)
        yield


def column_norms(target: Target) -> torch.Tensor:
    """(layers, neurons) norms of the output columns of the FFN neurons, float64 on the CPU."""
    weights = (layer.module("down").weight for layer in target.decoder.layers)
    return torch.stack([weight.detach().double().norm(dim=0).cpu() for weight in weights])


@torch.no_grad()
def profile(target: Target, sample: dict, norms: torch.Tensor) -> Profile:
    """One sample's measurements. norms: `column_norms(target)`."""
    recorder = _Recorder(target, sample)
    places = []
    for layer in target.decoder.layers:
        places += [(layer.module("input_norm"), recorder.state), (layer.module("post_norm"), recorder.state)]
        places.append((layer.module("down"), recorder.inner))
    places.append((target.decoder.norm, recorder.state))
    with hooked(places), replaced_attention(target.text_model, recorder.attention):
        target.encode(sample)
    return recorder.profile(norms)
