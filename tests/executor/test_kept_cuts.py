"""Weights are what they are now: whatever changes them, a kept copy is not used after it."""

import gc
import weakref

import peft
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import vis_sparse
from vis_sparse.executor.kept_cuts import KeptCuts, fingerprint
from vis_sparse.executor.weights import CutLinear
from vis_sparse.plans.layer_plan import LayerPlan
from vis_sparse.plans.plan import VisualPlan

from ..marks import slow_but
from ..models import HEADS, IMAGE, LAYERS, NEURONS, make_batch, make_model, run

# heads and neurons that do not follow one another: every cut is a copy
SCATTERED = VisualPlan(
    (LayerPlan(heads=tuple(i % 2 == 0 for i in range(HEADS)), ffn=tuple(range(0, NEURONS, 3))),) * LAYERS
)
EXACT = dict(atol=1e-9, rtol=1e-9)


def fresh(model, batch):
    """Logits of the same weights patched anew: no copy is older than the call."""
    with vis_sparse.patched(model, SCATTERED), torch.no_grad():
        return run(model, batch)[0]


def layers(model):
    return model.model.language_model.layers


def by_data(model):
    for layer in layers(model):
        for module in (layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            module.weight.data.mul_(1.5)


def by_init(model):
    for layer in layers(model):
        nn.init.normal_(layer.mlp.up_proj.weight.data, std=0.1, generator=torch.Generator().manual_seed(3))


def by_new_data(model):
    for layer in layers(model):
        layer.self_attn.k_proj.weight.data = -layer.self_attn.k_proj.weight.data.clone()


def by_copy_in_storage(model):
    for layer in layers(model):
        weight = layer.self_attn.v_proj.weight
        weight.data.numpy()[:] = weight.data.numpy() * 0.5


def by_conversion(model):
    model.to(torch.bfloat16).to(torch.float64)


def by_loading(model):
    model.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()})


def by_new_parameter(model):
    for layer in layers(model):
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.detach() * 2)


def by_new_module(model):
    for layer in layers(model):
        other = nn.Linear(64, NEURONS, bias=False, dtype=torch.float64)
        layer.mlp.up_proj = other


def by_one_row(model):
    layers(model)[0].mlp.gate_proj.weight.data[21] = 0.5


def by_one_column(model):
    layers(model)[1].self_attn.q_proj.weight.data[:, 13] += 0.5


def by_bias(model):
    for layer in layers(model):
        layer.self_attn.q_proj.bias.data[3] += 1


CHANGES = [
    by_data, by_init, by_new_data, by_copy_in_storage, by_conversion, by_loading, by_new_parameter, by_new_module,
    by_one_row, by_one_column, by_bias,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_no_change_of_weights_is_missed(change):
    model = vis_sparse.patch(make_model("llama-bias"), SCATTERED)
    batch = make_batch(model, [(3, IMAGE, 4)])
    before = run(model, batch)[0]
    assert vis_sparse.inspect(model)["extra_bytes"] > 0
    change(model)
    after = run(model, batch)[0]
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, fresh(model, batch), **EXACT)


@torch.no_grad()
def test_copies_are_made_once_while_weights_stay():
    model = vis_sparse.patch(make_model(), SCATTERED)
    batch, made = make_batch(model, [(3, IMAGE, 4)]), []
    cuts = [cut for lane in _executor(model).layers for cut in lane.cuts.values() if cut.copies]
    assert cuts
    _executor(model).kept_cuts.forget()
    keep = CutLinear.keep
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(CutLinear, "keep", lambda cut, modules: made.append(cut) or keep(cut, modules))
        for _ in range(3):
            run(model, batch)
        assert len(made) == len(cuts)
        layers(model)[0].mlp.up_proj.weight.mul_(2)
        run(model, batch)
    assert len(made) == 2 * len(cuts)


def _executor(model):
    state = model.model.language_model._vis_sparse
    return state.executors[state.default]


# those of transformers that need no further package
RUNNABLE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")
RUNNABLE = tuple(name for name in RUNNABLE if name in {each.value for each in OptimizerNames})


@pytest.mark.parametrize("optimizer", slow_but(["adamw_torch_fused"], RUNNABLE))
def test_evaluation_after_the_trainers_optimizers(optimizer, tmp_path):
    """What a trained model answers is what a freshly patched copy of its weights answers."""
    model = vis_sparse.patch(make_model(dtype=torch.float32), SCATTERED)
    batch = make_batch(model, [(3, IMAGE, 4)])
    sample = {name: tensor[0] for name, tensor in batch.by_ids().items() if name != "position_ids"}
    sample["labels"] = sample["input_ids"].clone()
    with torch.no_grad():
        before = run(model, batch)[0]  # copies are made
    arguments = TrainingArguments(
        tmp_path, max_steps=2, optim=optimizer, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no",
        eval_strategy="steps", eval_steps=1, disable_tqdm=True, per_device_train_batch_size=2, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[sample] * 4, eval_dataset=[sample])
    trainer.train()
    model.eval()
    loss = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        after = run(model, batch)[0]
    assert not torch.allclose(after, before, atol=1e-4)
    torch.testing.assert_close(after, fresh(model, batch), atol=1e-5, rtol=1e-5)
    with vis_sparse.patched(model, SCATTERED):
        again = Trainer(model, arguments, eval_dataset=[sample]).evaluate()["eval_loss"]
    assert loss == pytest.approx(again, rel=1e-5)


@torch.no_grad()
def test_a_merged_adapter_is_in_the_visual_lane():
    model = vis_sparse.patch(make_model(), SCATTERED)
    batch = make_batch(model, [(3, IMAGE, 4)])
    run(model, batch)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with_adapter = run(model, batch)[0]
    torch.testing.assert_close(with_adapter, fresh(model, batch), **EXACT)
    merged = adapted.merge_and_unload()
    assert merged is model
    torch.testing.assert_close(run(model, batch)[0], with_adapter, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(run(model, batch)[0], fresh(model, batch), **EXACT)


def test_training_keeps_no_copies():
    """Neither those of an evaluation before, nor of frozen weights beside: only of what asks for no gradient."""
    model = vis_sparse.patch(make_model(), SCATTERED)
    batch = make_batch(model, [(3, IMAGE, 4)])
    with torch.no_grad():
        run(model, batch)
    everything = vis_sparse.inspect(model)["extra_bytes"]
    model(**batch.by_ids(), labels=batch.input_ids).loss.backward()
    assert vis_sparse.inspect(model)["extra_bytes"] == 0 < everything
    model.requires_grad_(False)
    for layer in layers(model):
        layer.mlp.up_proj.weight.requires_grad_(True)
    model(**batch.by_ids(), labels=batch.input_ids).loss.backward()
    frozen = vis_sparse.inspect(model)["extra_bytes"]
    assert 0 < frozen < everything
    with torch.no_grad():
        run(model, batch)
    assert vis_sparse.inspect(model)["extra_bytes"] == everything


def test_gradients_reach_the_parameters_after_an_evaluation():
    model = vis_sparse.patch(make_model(), SCATTERED)
    batch = make_batch(model, [(3, IMAGE, 4)])
    with torch.no_grad():
        run(model, batch)
    model(**batch.by_ids(), labels=batch.input_ids).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with vis_sparse.patched(model, SCATTERED):
        model(**batch.by_ids(), labels=batch.input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, **EXACT)


@torch.no_grad()
def test_old_storages_are_released():
    """After a conversion nothing holds the tensors from before it: no view, no copy."""
    first = VisualPlan((LayerPlan(heads=tuple(i < 4 for i in range(HEADS)), ffn=0.5),) * LAYERS)
    for plan in (first, SCATTERED):
        model = vis_sparse.patch(make_model(), plan)
        batch = make_batch(model, [(3, IMAGE, 4)])
        run(model, batch)
        old = [weakref.ref(p.data.untyped_storage()) for p in model.model.language_model.parameters()]
        sizes = {p.untyped_storage().data_ptr() for p in model.model.language_model.parameters()}
        model.to(torch.float32)
        gc.collect()
        held = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta]
        assert old and not [t for t in held if t.untyped_storage().data_ptr() in sizes and t.dtype == torch.float64]
        assert vis_sparse.inspect(model)["extra_bytes"] == 0


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (64, 48), (48, 64), (1, 9), (9, 1), (6, 6), (2, 100), (30, 12)])
def test_the_fingerprint_looks_at_every_row_and_column(shape):
    weight = torch.zeros(shape)
    (before,) = fingerprint([weight])
    for axis, size in enumerate(shape):
        for index in range(size):
            changed = weight.clone()
            changed.select(axis, index).fill_(1)
            assert not torch.equal(fingerprint([changed])[0], before), (axis, index)
    assert before.numel() <= 4 * 4 * max(shape), "bytes: few elements of fp32 for each row and column"


def test_cuts_that_are_views_keep_nothing():
    linear = nn.Linear(8, 8)
    cuts = [CutLinear(lambda name: linear, ["up"], rows=[rows]) for rows in (range(2, 6), (1, 3))]
    kept = KeptCuts(cuts)
    with torch.no_grad():
        kept.refresh()
    assert [cut.extra_bytes for cut in cuts] == [0, 2 * 9 * 4] and kept.bytes == 72


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_on_projections_run(register):
    model = vis_sparse.patch(make_model(), SCATTERED)
    batch, calls = make_batch(model, [(3, IMAGE, 4)]), []
    getattr(layers(model)[0].mlp.up_proj, register)(lambda *given: calls.append(1) and None)
    model(**batch.by_ids(), labels=batch.input_ids).loss.backward()
    assert calls
