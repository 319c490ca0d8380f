"""Models that something else has wrapped, in either order: right, or refused by name. The table of docs/wraps.md."""

import pytest
import torch
from torch import nn

import vis_sparse
from vis_sparse import PatchError
from vis_sparse.patches.wraps import check_devices

from ..marks import slow_but
from ..models import IMAGE, make_batch, random_plan
from . import wraps
from .wrap_kinds import WRAPS, linears, lora, small_model
from .wraps import NOT_UNPATCHED, PAGE, RIGHT

ALONE = [wrap for wrap in WRAPS if wrap.ranks == 1]
TOGETHER = [wrap for wrap in WRAPS if wrap.ranks > 1]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_on_page(name: str, row: dict) -> None:
    """No word but the three, and the page says the same."""
    words = {word for order in wraps.ORDERS for word in row[order].values()}
    assert words <= {RIGHT, "refused", NOT_UNPATCHED}, row
    assert ("refused" in words) == bool(row["says"]), row
    written = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in written if line.startswith(f"| {name} |")] == wraps.lines_of(name, row)
    for message in row["says"]:
        assert "\n" not in message and any(f"`{message}`" in line and name in line for line in written)


def test_the_page_has_all_wraps_and_no_others():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert names == [wrap.name for wrap in WRAPS for _ in wraps.ORDERS]


_FAST = ("PEFT LoRA", "quantised, buffers only (GPTQ, AWQ)", "only `v_proj` trains")


@pytest.mark.parametrize("wrap", slow_but([w for w in ALONE if w.name in _FAST], ALONE), ids=[w.name for w in ALONE])
def test_one_process(wrap):
    check_on_page(wrap.name, wraps.cells(wrap))


@pytest.mark.slow
def test_two_processes():
    for name, row in wraps.measure(TOGETHER).items():
        check_on_page(name, row)


# What the table does not show


@pytest.mark.parametrize(
    "device_map,message",
    [
        (None, None),
        ({"": 0}, None),
        ({"": "cpu"}, None),
        ({"model.vision_tower": 0, "model.language_model": "cpu", "lm_head": "disk"}, None),
        ({"model.vision_tower": 0, "model.language_model": 1}, "over 2 devices"),
        ({"model.vision_tower": "cuda:0", "model.language_model": "cuda:1", "lm_head": "cpu"}, "over 2 devices"),
    ],
)
def test_what_lies_on_the_cpu_or_disk_computes_elsewhere(device_map, message):
    if message is None:
        check_devices(device_map)
        return
    with pytest.raises(PatchError, match=message):
        check_devices(device_map)


def test_copies_over_threads_are_refused():
    """DataParallel makes them on GPUs alone; a copy's lanes would use the original's weights."""
    model = vis_sparse.patch(small_model(), "dense")
    with pytest.raises(PatchError, match="DataParallel: got a patched model.*DistributedDataParallel"):
        model.model.language_model._replicate_for_data_parallel()


class Packs(nn.Module):
    """A quantised layer that packs its weights at the first call under inference, as bitsandbytes' do on a CPU; they
    train no longer then."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.is_packed = linear, False

    def forward(self, x):
        self.is_packed |= not self.training and not x.requires_grad
        return self.linear(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_check_packs_no_weights(context, training):
    model = small_model()
    for owner, name in linears(model):
        setattr(owner, name, Packs(getattr(owner, name)))
    model.train(training)
    modes = [module.training for module in model.modules()]
    with context():
        vis_sparse.patch(model, "dense")
    assert not any(getattr(owner, name).is_packed for owner, name in linears(model))
    assert [module.training for module in model.modules()] == modes
    assert not any(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_under_another_default_device():
    model, call = small_model(), make_batch(small_model(), [(5, IMAGE, 4)]).by_ids()
    expected = model(**call).logits
    with torch.device("meta"):
        vis_sparse.patch(model, "dense")
    torch.testing.assert_close(model(**call).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_check_drops_nothing_of_adapters_in_training():
    model = lora(small_model(), lora_dropout=0.5).train()
    assert vis_sparse.patch(model, "dense") is model
    assert all(module.training for module in model.modules())


def test_a_patched_peft_model_is_the_one_given():
    model = lora(small_model())
    assert vis_sparse.patch(model, "dense") is model
    assert vis_sparse.inspect(model)["plan"] == vis_sparse.inspect(model.get_base_model())["plan"]
    assert vis_sparse.unpatch(model) is model and vis_sparse.inspect(model) is None


@torch.no_grad()
def test_adapters_switched_on_and_off_while_patched():
    model, call = lora(small_model()), make_batch(small_model(), [(5, IMAGE, 4)]).by_ids()
    with_adapters = model(**call).logits
    with model.disable_adapter():
        without = model(**call).logits
    vis_sparse.patch(model, "dense")
    torch.testing.assert_close(model(**call).logits, with_adapters, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(model(**call).logits, without, rtol=1e-4, atol=1e-4)
    assert float((with_adapters - without).abs().max()) > 0.1


@pytest.mark.parametrize("plan", ["dense", random_plan(31)], ids=["dense", "random"])
def test_a_cache_filled_in_inference_mode_serves_outside_of_it(plan):
    model = vis_sparse.patch(small_model(), plan)
    batch = make_batch(small_model(), [(5, IMAGE, 4)])
    call = batch.to_generate()
    settings = dict(max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        expected = model.generate(**call, **settings)
    with torch.inference_mode():
        cache = model(**call, use_cache=True).past_key_values
    cache.crop(-1)
    last = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert torch.equal(model.generate(**last, past_key_values=cache, **settings), expected)


@pytest.mark.parametrize("trains", ["q_proj", "k_proj", "v_proj", "up_proj", "post_attention_layernorm", ""])
@pytest.mark.parametrize("plan", ["dense", random_plan(31)], ids=["dense", "random"])
def test_backward_through_a_cache(plan, trains):
    """Gradients of a call in pieces are those of one call, whichever parameters train."""
    model = vis_sparse.patch(small_model(), plan)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "language_model" in name and trains in name
    call = make_batch(small_model(), [(5, IMAGE, 4, 3)]).by_ids()
    ids, pixels = call["input_ids"], call["pixel_values"]

    def gradients(logits):
        model.zero_grad()
        logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[:, -6:])
    parts, cache = [], None
    for start, stop in ((0, ids.shape[1] - 6), *((at, at + 2) for at in range(ids.shape[1] - 6, ids.shape[1], 2))):
        image = dict(pixel_values=pixels) if cache is None else {}
        out = model(input_ids=ids[:, start:stop], **image, past_key_values=cache, use_cache=True)
        parts, cache = [*parts, out.logits], out.past_key_values
    actual = gradients(torch.cat(parts[1:], 1))
    assert actual.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        assert float((actual[name] - gradient).abs().max()) < 1e-4 * scale, name


@torch.no_grad()
def test_hooks_of_accelerate_keep_an_images_grid_in_beams():
    import accelerate

    model, call = small_model(), make_batch(small_model(), [(5, IMAGE, 4), (2, IMAGE, 3)]).to_generate()
    settings = dict(max_new_tokens=4, do_sample=False, num_beams=2)
    expected = model.generate(**call, **settings)
    vis_sparse.patch(accelerate.cpu_offload(model, execution_device="cpu"), "dense")
    assert torch.equal(model.generate(**call, **settings), expected)
    assert vis_sparse.inspect(model)["last_call"].past


@pytest.fixture
def fresh_accelerate():
    """A process has one setting of mixed precision, which `Trainer` may have made."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@torch.no_grad()
def test_mixed_precision_of_accelerate_put_on_and_taken_off(fresh_accelerate):
    """`Accelerator.prepare` wraps what it finds as the model's forward, `unwrap_model` binds that to the model."""
    from accelerate import Accelerator

    model, call = vis_sparse.patch(small_model(), "dense"), make_batch(small_model(), [(5, IMAGE, 4)]).by_ids()
    expected, accelerator = model(**call).logits, Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    rounded = prepared(**call).logits
    assert rounded.dtype == torch.float32 and 0 < float((rounded - expected).abs().max()) < 0.1 * expected.abs().max()
    with vis_sparse.patches.unpatched(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)):
        torch.testing.assert_close(model(**call).logits, expected, rtol=1e-4, atol=1e-4)
    model = accelerator.unwrap_model(accelerator.prepare_model(vis_sparse.patch(model, "dense")), False)
    assert torch.equal(model(**call).logits, expected)
    vis_sparse.unpatch(model)
    assert "forward" not in vars(model)
