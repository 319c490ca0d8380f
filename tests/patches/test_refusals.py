"""Models and calls of families that are refused, in one line, with the model as it was."""

from types import SimpleNamespace

import pytest
import torch

import vis_sparse
from vis_sparse import LayoutError, PatchError
from vis_sparse.patches.qwen_vl import QWEN2_VL

from .cases import CASES, WIDTH
from .scenarios import SCENARIOS, make_request

BY_NAME = {case.name: case for case in CASES}


def norm_over_all_heads(text_model):
    text_model.layers[0].self_attn.q_norm = torch.nn.RMSNorm(WIDTH)


def extra_norm(text_model):
    text_model.layers[1].pre_feedforward_layernorm = torch.nn.RMSNorm(WIDTH)


def dropout(text_model):
    text_model.config.resid_pdrop = 0.1


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("Qwen3VL", norm_over_all_heads, r"q_norm of shape \(64,\), expected a norm of each head, \(12,\)"),
        ("Llava", extra_norm, "LlamaDecoderLayer with input_layernorm.*pre_feedforward_layernorm"),
        ("InternVL (Phi3)", dropout, "resid_pdrop=0.1"),
    ],
)
def test_decoders_of_another_structure(name, change, message):
    model = BY_NAME[name].build(torch.float32)
    change(model.model.language_model)
    with pytest.raises(PatchError, match=message) as error:
        vis_sparse.patch(model)
    assert "\n" not in str(error.value) and vis_sparse.inspect(model) is None


def test_a_model_of_no_family_names_those_there_are():
    with pytest.raises(PatchError, match="got Linear.*LlavaForC.*LlavaLlamaForC.*Qwen3VLForC.*InternVLForC"):
        vis_sparse.patch(torch.nn.Linear(2, 2))


@torch.no_grad()
def test_deepstack_rows_that_are_not_the_layouts():
    case = BY_NAME["Qwen3VL"]
    model = vis_sparse.patch(case.build(torch.float32), "dense")
    request = make_request(case, SCENARIOS["prefill"], torch.float32)
    half = vis_sparse.VisualLayout.from_grids([[(request.layout.segments[0].start, (1, 1, 3))]])
    with vis_sparse.use_layout(model, half), pytest.raises(LayoutError, match="got 6 rows, expected.*3 visual tokens"):
        model(**request.inputs)


def test_features_that_do_not_tell_their_grids():
    """A prefill in chunks cuts them up."""
    outer, ids = SimpleNamespace(config=SimpleNamespace(image_token_id=7)), torch.tensor([[1, 7, 7, 2]])
    arguments = dict(input_ids=ids, mm_encoder_outputs={"image": SimpleNamespace()})
    with pytest.raises(LayoutError, match="mm_encoder_outputs.*do not tell their grids.*prefill_chunk_size=None"):
        QWEN2_VL.read_layout(outer, arguments, 0)
