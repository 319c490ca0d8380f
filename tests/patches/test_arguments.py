"""What a patched model is called with, and what is changed on it after patch: obeyed, or refused by name."""

from types import MethodType

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

import vis_sparse
from vis_sparse import PatchError
from vis_sparse.patches import unpatched

from ..models import IMAGE, LAYERS, Batch, make_batch, make_model, random_plan


@pytest.fixture
def model():
    return vis_sparse.patch(make_model("llama-gqa"), "dense")


@pytest.fixture
def batch(model) -> Batch:
    with unpatched(model):
        return make_batch(model, [(5, IMAGE, 6)])


def text_batch(model) -> Batch:
    with unpatched(model):
        return make_batch(model, [(12,)])


def check_as_unpatched(model, call: dict) -> torch.Tensor:
    """A patched model obeys; returns the logits."""
    actual = model(**call).logits
    with unpatched(model):
        expected = model(**call).logits
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    return actual


PACKED = torch.tensor([0, 12, 27], dtype=torch.int32)
REFUSED = {
    "is_causal": (dict(is_causal=False), "is_causal: got False"),
    "cu_seq_lens": (dict(cu_seq_lens_q=PACKED, cu_seq_lens_k=PACKED), "cu_seq_lens_q: got packed sequences"),
    "max_length": (dict(max_length_q=15, max_length_k=15), "max_length_q: got packed sequences"),
    "seq_idx": (dict(seq_idx=torch.zeros(1, 27)), "seq_idx: got packed sequences"),
    "unknown": (dict(block_size=4), "block_size: got 4 on a patched model.*output_hidden_states"),
    "unknown tensor": (dict(bias=torch.ones(3, 27)), r"bias: got a tensor of shape \(3, 27\)"),
    "attentions": (dict(output_attentions=True), "output_attentions: got True"),
    "some hidden states": (dict(output_hidden_states=[-2]), r"output_hidden_states: got \[-2\]"),
}


@pytest.mark.parametrize("case", REFUSED)
@torch.no_grad()
def test_refused_arguments(model, batch, case):
    given, message = REFUSED[case]
    before = model(**batch.by_ids()).logits
    with pytest.raises(PatchError, match=message) as error:
        model(**batch.by_ids(), **given)
    assert "\n" not in str(error.value)
    assert torch.equal(model(**batch.by_ids()).logits, before)


@pytest.mark.parametrize(
    "given",
    [
        dict(is_causal=True),
        dict(is_causal=None, block_size=None, cu_seq_lens_q=None),
        dict(output_attentions=False, output_hidden_states=True),
        dict(logits_to_keep=0),
        dict(num_items_in_batch=torch.tensor(7)),
    ],
    ids=lambda given: ",".join(given),
)
@torch.no_grad()
def test_obeyed_arguments(model, batch, given):
    check_as_unpatched(model, batch.by_ids() | given)


@torch.no_grad()
def test_arguments_of_prompts_without_an_image_are_the_original_forwards(model):
    """No lanes run, so nothing is refused."""
    call = text_batch(model).by_ids() | dict(attention_mask=None)
    packed = torch.cat([torch.arange(5), torch.arange(7)])[None]
    in_pieces = check_as_unpatched(model, call | dict(position_ids=packed))
    assert float((in_pieces - model(**call).logits).abs().max()) > 0.1
    check_as_unpatched(model, call | dict(is_causal=False))


def positions(length: int, start_again: int) -> torch.Tensor:
    return torch.cat([torch.arange(start_again), torch.arange(length - start_again)])[None]


@torch.no_grad()
def test_packed_positions(model, batch):
    call = batch.by_ids() | dict(attention_mask=None, position_ids=positions(batch.length, 22))
    with pytest.raises(PatchError, match="position_ids: got positions that start again .*packed"):
        model(**call)


@torch.no_grad()
def test_packed_positions_in_a_row_of_several(model):
    with unpatched(model):
        two = make_batch(model, [(5, IMAGE, 6), (5, IMAGE, 6)])
    ids = torch.cat([torch.arange(two.length)[None], positions(two.length, 22)])
    with pytest.raises(PatchError, match="position_ids: got positions that start again"):
        model(**two.by_ids() | dict(attention_mask=None, position_ids=ids))


@torch.no_grad()
def test_positions_that_start_elsewhere(model, batch):
    call = batch.by_ids() | dict(attention_mask=None, position_ids=torch.arange(7, 7 + batch.length)[None])
    check_as_unpatched(model, call)


@torch.no_grad()
def test_positions_with_gaps_beside_a_mask(model, batch):
    gaps = torch.arange(batch.length) + (torch.arange(batch.length) > 22) * 9
    check_as_unpatched(model, batch.by_ids() | dict(position_ids=gaps[None]))


def test_the_trainers_number_of_items(model, batch, tmp_path):
    """`Trainer` hands `num_items_in_batch` down to the text model, and the loss is divided by it."""

    def loss() -> float:
        labels = batch.input_ids.clone()
        sample = dict(input_ids=batch.input_ids[0], labels=labels[0], pixel_values=batch.pixel_values[0])
        settings = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1, learning_rate=0.0)
        arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, logging_steps=1, **settings)
        trainer = Trainer(model, arguments, train_dataset=[sample] * 2)
        return trainer.train().training_loss

    seen = []
    patched_loss = loss()
    with unpatched(model):
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append("num_items_in_batch" in kwargs), with_kwargs=True
        )
        assert patched_loss == pytest.approx(loss(), rel=1e-6)
    assert all(seen) and seen


# Structure


def text(model):
    return model.model.language_model


def replace_layer(model):
    text(model).layers[1] = LlamaDecoderLayer(model.config.text_config, 1).to(torch.float64)


def shorten(model):
    text(model).layers = text(model).layers[:-1]
    model.config.text_config.num_hidden_layers -= 1


def leave_early(model):
    model.config.text_config.num_hidden_layers -= 1


def lengthen(model):
    text(model).layers.append(LlamaDecoderLayer(model.config.text_config, LAYERS).to(torch.float64))
    model.config.text_config.num_hidden_layers += 1


def swap_layers(model):
    layers = text(model).layers
    layers[0], layers[1] = layers[1], layers[0]


def replace_attention(model):
    text(model).layers[2].self_attn = type(text(model).layers[2].self_attn)(model.config.text_config, 2).double()


def replace_ffn(model):
    text(model).layers[0].mlp = type(text(model).layers[0].mlp)(model.config.text_config).double()


def rescale(model):
    text(model).layers[1].self_attn.scaling *= 2


@pytest.mark.parametrize(
    "change", [replace_layer, shorten, lengthen, leave_early, swap_layers, replace_attention, replace_ffn, rescale]
)
@torch.no_grad()
def test_refused_changes(model, batch, change):
    model(**batch.by_ids())
    change(model)
    with pytest.raises(PatchError, match="layers: got .* at vis_sparse.patch.*patch the model again"):
        model(**batch.by_ids())
    if change is leave_early:
        with pytest.raises(PatchError, match="LlamaModel: got 3 layers, expected the 2 of its config"):
            vis_sparse.patch(model, "dense")
        return
    # as it says, and then it is obeyed
    vis_sparse.patch(model, vis_sparse.VisualPlan.dense(len(text(model).layers)))
    for index, layer in enumerate(text(model).layers):
        layer.self_attn.layer_idx = index
    check_as_unpatched(model, batch.by_ids() | dict(use_cache=False))


@torch.no_grad()
def test_another_text_model(model, batch):
    """It would run dense, with nothing said; unpatch still finds what it put on the old one and the models around."""
    old = text(model)
    model.model.language_model = text(make_model("llama-gqa", seed=5))
    with pytest.raises(PatchError, match="LlavaModel: got another text model than at vis_sparse.patch"):
        model(**batch.by_ids())
    assert vis_sparse.inspect(model) is not None
    vis_sparse.unpatch(model)
    for module in (model, model.model, old):
        assert not {"forward", "generate", "_vis_sparse"} & vars(module).keys()
    check_as_unpatched(vis_sparse.patch(model, "dense"), batch.by_ids())


@torch.no_grad()
def test_the_text_model_in_a_wrapper(model, batch):
    expected = model(**batch.by_ids()).logits
    model.model.language_model = torch.compile(text(model), backend="eager")
    torch.testing.assert_close(model(**batch.by_ids()).logits, expected)
    vis_sparse.unpatch(model)
    assert not {"forward", "_vis_sparse"} & vars(text(model)._orig_mod).keys()


@torch.no_grad()
def test_changes_between_the_prompt_and_a_decode_step(model, batch):
    cache = model(**batch.by_ids(), use_cache=True).past_key_values
    replace_ffn(model)
    with pytest.raises(PatchError, match="layers: got another layer 0"):
        model(input_ids=torch.ones(1, 1).long(), past_key_values=cache, use_cache=True)


def new_norm(model):
    norm = LlamaRMSNorm(64).double()
    norm.weight.data.mul_(3)
    text(model).norm = norm


def new_rotary(model):
    config = LlamaConfig(**model.config.text_config.to_dict() | dict(rope_parameters=None, rope_theta=7.0))
    config.rope_parameters = dict(rope_type="default", rope_theta=7.0)
    text(model).rotary_emb = LlamaRotaryEmbedding(config)


def new_input_norm(model):
    norm = nn.LayerNorm(64).double()
    norm.bias.data.fill_(0.1)
    text(model).layers[1].input_layernorm = norm


def new_query(model):
    text(model).layers[0].self_attn.q_proj = nn.Linear(64, 64).double()


def adapted_query(model):
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) * 2

    text(model).layers[1].self_attn.q_proj = Adapted(text(model).layers[1].self_attn.q_proj)


def new_activation(model):
    text(model).layers[2].mlp.act_fn = nn.Tanh()


def new_embedding(model):
    model.set_input_embeddings(nn.Embedding(96, 64).double())


@pytest.mark.parametrize(
    "change", [new_norm, new_rotary, new_input_norm, new_query, adapted_query, new_activation, new_embedding]
)
@torch.no_grad()
def test_obeyed_changes(model, batch, change):
    before = model(**batch.by_ids()).logits
    change(model)
    after = check_as_unpatched(model, batch.by_ids())
    assert float((after - before).abs().max()) > 1e-3
    # lanes that cut compute with it too
    cut = random_plan(5)
    vis_sparse.patch(model, cut)
    changed = model(**batch.by_ids()).logits
    fresh = make_model("llama-gqa")
    change(fresh)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(changed, vis_sparse.patch(fresh, cut)(**batch.by_ids()).logits)


def test_a_second_patch_checks_again_what_has_changed():
    """Once a model, but not whatever was done to it since."""
    model = vis_sparse.patch(make_model("llama-gqa"), "dense")
    vis_sparse.unpatch(model)
    attention = text(model).layers[1].self_attn
    plain = attention.forward

    def halved(self, *args, **kwargs):
        out, weights = plain(*args, **kwargs)
        return out / 2, weights

    attention.forward = MethodType(halved, attention)
    with pytest.raises(PatchError, match="differs from its lanes.*first in layer 1"):
        vis_sparse.patch(model, "dense")
    del attention.forward
    vis_sparse.patch(model, "dense")
