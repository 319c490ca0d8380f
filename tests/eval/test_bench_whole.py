"""The whole prefill of real model classes at small widths: what is built, asked and timed is what is counted."""

import dataclasses
import math

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

import vis_sparse
from vis_sparse.cost.flops import flops, resolved
from vis_sparse.cost.shape_config import shape_of_config
from vis_sparse.cost.shape_lookup import load_shape, shape_names
from vis_sparse.eval.bench_model import fill_randomly
from vis_sparse.eval.measure import Measurement
from vis_sparse.eval.memory import PeakBytes
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.eval.whole_model import config_of, image_prompt, whole_config, whole_model
from vis_sparse.layout.image_grids import ShapeError
from vis_sparse.patches import read_layout
from vis_sparse.plans.before import TokensBefore
from vis_sparse.plans.plan import VisualPlan

CPU = torch.device("cpu")
TEXT = 8
SIZES = {
    "llava-1.5-7b": (336, 336),
    "llava-next-7b": (336, 672),
    "qwen2-vl-7b": (112, 168),
    "qwen2.5-vl-7b": (112, 280),
    "internvl2-26b": (448, 896),
}
ORDERS = {"received": 0.5, "duplicate": None, "relevance": 0.25, "stride": 0.5}


def small(name: str):
    """The shape of a family with a narrow decoder and tower of four layers each."""
    shape = load_shape(name)
    merged = shape.projector[0][0] // shape.vision.hidden * 64
    vision = dataclasses.replace(
        shape.vision, layers=4, hidden=64, heads=4, ffn=128, full=(1,) * bool(shape.vision.full)
    )
    middle = 128 if shape.projector[1][0] == shape.hidden else merged
    sizes = {"layers": 4, "hidden": 128, "heads": 8, "kv_heads": 4, "head_dim": 16, "ffn": 128, "vocab": 100}
    return dataclasses.replace(shape, **sizes, vision=vision, projector=((merged, middle), (middle, 128)))


@pytest.fixture(scope="module", params=SIZES)
def built(request):
    shape = small(request.param)
    return shape, whole_model(config_of(shape), torch.float32, CPU), SIZES[request.param]


def measurement(built, plans, batch=2, **settings):
    shape, model, size = built
    return Measurement(model, image_prompt(model, shape, batch, TEXT, size), size, plans, heads="first", **settings)


@pytest.mark.parametrize("name", shape_names())
def test_a_shapes_config_has_its_shape(name):
    shape = load_shape(name)
    assert shape_of_config(config_of(shape), name) == shape


def test_fewer_layers_of_the_decoder_are_fewer_of_the_tower():
    def depths(name, layers):
        shape = whole_config(name, layers)[1]
        whole = load_shape(name)
        assert (shape.hidden, shape.vision.hidden, shape.image) == (whole.hidden, whole.vision.hidden, whole.image)
        return shape.layers, shape.vision.layers, shape.vision.unread

    assert depths("llava-1.5-7b", 8) == (8, 6, 1)
    assert depths("llava-1.5-7b", 1) == (1, 2, 1), "one of which is read"
    assert depths("qwen2-vl-7b", 7) == (7, 8, 0)
    assert depths("internvl2-26b", 1) == (1, 1, 0)
    assert whole_config("qwen2.5-vl-7b", 7)[1].vision.full == (7,), "one of eight, as of all"
    assert whole_config("llava-1.5-7b", 64)[1].vision.layers == 48


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl"])
def test_a_folder_gives_its_own_sizes(name):
    folder = str(checkpoint(name))
    config, shape = whole_config(folder, 8)
    assert dataclasses.replace(shape, name="") == dataclasses.replace(load_shape(folder), name="")
    assert type(config).__name__ == type(hf.AutoConfig.from_pretrained(folder)).__name__
    assert whole_config(folder, 4)[1].vision.layers == round(shape.vision.layers / 2)


def test_every_family_that_is_described_builds(tmp_path):
    """Of those whose config a shape does not tell, from a folder."""
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, vocab_size=100,
                num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)  # fmt: skip
    qwen = dict(depth=4, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
                num_position_embeddings=16, deepstack_visual_indexes=[0, 2, 3])  # fmt: skip
    clip = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=2, image_size=56,
                patch_size=14)  # fmt: skip
    one = dict(clip, model_type="siglip_vision_model")
    configs = {
        "qwen3": hf.Qwen3VLConfig(text_config=text, vision_config=qwen, image_token_id=1, video_token_id=2,
                                  vision_start_token_id=3, vision_end_token_id=4),
        "vip": hf.VipLlavaConfig(text_config=hf.LlamaConfig(**text), vision_config=clip, image_token_id=1),
        "one": hf.LlavaOnevisionConfig(text_config=hf.Qwen2Config(**text), vision_config=one, image_token_id=1,
                                       video_token_id=2, image_grid_pinpoints=[[56, 112]]),
    }  # fmt: skip
    for name, config in configs.items():
        config.save_pretrained(tmp_path / name)
        config, shape = whole_config(str(tmp_path / name), 2)
        model = whole_model(config, torch.float32, CPU)
        run = measurement((shape, model, (112, 140)), {"vtw": resolved("vtw", shape, None)})
        figures = run.run(repeats=1)["vtw"]
        assert figures["flop_ratio"] > 1 and figures["dense_s"] > figures["decoder_dense_s"]
    assert whole_config(str(tmp_path / "vip"), 2)[1].vision.layers == 11, "features are taken from eleven layers"


def test_a_model_without_a_described_tower_is_refused(tmp_path):
    hf.LlamaConfig(hidden_size=64, num_attention_heads=4).save_pretrained(tmp_path)
    with pytest.raises(ShapeError, match="^model: got .*, whose vision tower is not described, expected"):
        whole_config(str(tmp_path), 2)


def test_what_is_timed_is_what_is_counted(built):
    """Every product of the unpatched call but scores, against the count; scores apart, which backends pad."""
    shape, model, size = built
    inputs = image_prompt(model, shape, 2, TEXT, size)
    layout = read_layout(model, inputs)
    assert layout.segments[0].start == TEXT - 1
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits = model(**inputs, logits_to_keep=1).logits
    assert logits.shape == (2, 1, shape.vocab) and logits.isfinite().all()
    counted = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counted.items() if not any(w in name for w in ("bmm", "scaled")))
    cost = flops(shape, "dense", image_size=size, text_tokens=TEXT, text_before=TEXT - 1, batch=2)
    assert cost.visual_tokens == layout.num_visual
    scores = cost.prefill.part("scores")
    scores += sum(lane.scores for layer in cost.prefill.tower_layers for lane in (layer.visual, layer.text))
    assert products == cost.prefill.whole - scores


def test_the_tower_gets_pixels_and_its_features_reach_the_logits(built):
    shape, model, size = built
    inputs, given = image_prompt(model, shape, 1, TEXT, size), []
    assert inputs["pixel_values"].std() == pytest.approx(1, abs=0.05)
    tower = next(module for name, module in model.named_modules() if name.endswith(("vision_tower", "visual")))
    hook = tower.register_forward_pre_hook(
        lambda module, args, kwargs: given.append([*args, *kwargs.values()]), with_kwargs=True
    )
    with torch.no_grad():
        logits = [
            model(**inputs | {"pixel_values": pixels}).logits[:, -1]
            for pixels in (inputs["pixel_values"], inputs["pixel_values"].flip(0, -1))
        ]
    hook.remove()
    assert any(each is not None and torch.is_tensor(each) and each.numel() == inputs["pixel_values"].numel()
               for each in given[0])  # fmt: skip
    assert not torch.equal(*logits)


def test_plans_of_towers_and_of_tokens_before_run(built):
    shape, model, _ = built
    plans = {name: resolved(name, shape, None) for name in ("dense", "yopo-12", "whole-50")}
    dense = VisualPlan.dense(4)
    before = {by: TokensBefore(by, share) if share else TokensBefore(by) for by, share in ORDERS.items()}
    if "Next" in type(model).__name__:  # its tokens are put together behind the tower
        del before["received"], before["duplicate"]
    plans |= {by: dense.replace(name=by, before=each) for by, each in before.items()}
    turns = []
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small_prompt = image_prompt(model, shape, 1, 2, (1, 1))
    found = measurement(built, plans, small=small_prompt).run(1, True, lambda: turns.append(1))
    assert len(turns) == 1 + len(plans) and vis_sparse.inspect(model) is None
    assert not model.model.language_model._forward_hooks
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    for name, own in found.items():
        for variant in ("dense_s", "dense_plan_s", "patched_s"):
            assert own[variant] > own[f"decoder_{variant}"] > 0
        assert own["decode_patched_s"] > 0
        changes_tower = own["tower_flops"] != own["tower_flops_dense"]
        assert changes_tower == (name in ("whole-50", "received") or name == "duplicate" and shape.vision.unread)
    assert found["whole-50"]["flop_ratio"] > 1 and found["whole-50"]["tower_flops"] < found["dense"]["tower_flops"]
    assert found["stride"]["kv_bytes"] < found["dense"]["kv_bytes"]
    if "duplicate" in found:
        assert found["duplicate"]["kv_bytes"] == found["dense"]["kv_bytes"], "no random pixels are equal"


def test_decoder_alone_has_the_figures_of_its_own_call():
    """KV cache, peak and copied bytes are those of the plan's second call, its copies of weights no activations."""
    shape = small("llava-1.5-7b")
    model = whole_model(config_of(shape), torch.float32, CPU)
    layers = [vis_sparse.LayerPlan(ffn=tuple(range(1, shape.ffn, 2)))] * 2 + [vis_sparse.LayerPlan.off()] * 2
    plan, size = vis_sparse.VisualPlan(tuple(layers)), (336, 336)
    figures = measurement((shape, model, size), {"odd": plan}, batch=1).run(1)["odd"]
    assert figures["copied_bytes"] > 0
    inputs = image_prompt(model, shape, 1, TEXT, size)
    with vis_sparse.patched(model, plan), torch.no_grad():
        model(**inputs, use_cache=True, logits_to_keep=1)
        with PeakBytes() as memory:
            model(**inputs, use_cache=True, logits_to_keep=1)
    assert figures["peak_bytes"] == memory.peak


def test_images_of_another_size_than_said_are_refused():
    shape = small("qwen2-vl-7b")
    model = whole_model(config_of(shape), torch.float32, CPU)
    inputs = image_prompt(model, shape, 1, TEXT, (56, 56))
    told = Measurement(model, inputs, (56, 112), {"vtw": resolved("vtw", shape, None)})
    with pytest.raises(ValueError, match="^image_size: got 8 visual tokens of images of .*, expected the prompt's 4$"):
        told.run(1)
    assert vis_sparse.inspect(model) is None


def test_weights_are_the_same_every_time_and_the_head_is_the_embeddings():
    config = config_of(small("internvl2-26b"))
    first, second = (whole_model(config, torch.bfloat16, CPU) for _ in range(2))
    assert first.lm_head.weight is first.get_input_embeddings().weight
    for (name, weight), other in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(weight, other) and weight.dtype == torch.bfloat16 and weight.isfinite().all(), name
        if "norm" in name and name.endswith("weight"):
            assert (weight == 1).all(), name
    fc1 = first.model.vision_tower.encoder.layer[0].mlp.fc1.weight
    assert math.isclose(fc1.detach().float().std(), 0.02, rel_tol=0.1)
    fill_randomly(first, torch.Generator().manual_seed(1))
    assert not torch.equal(fc1, second.model.vision_tower.encoder.layer[0].mlp.fc1.weight)


@pytest.mark.slow
def test_compiled_variants_have_the_same_sizes_and_run_one_after_the_other():
    shape = small("llava-1.5-7b")
    model = whole_model(config_of(shape), torch.float32, CPU)
    plans = {"yopo-12": resolved("yopo-12", shape, None)}
    eager, compiled = (
        measurement((shape, model, (336, 336)), plans, batch=1, compiler=compiler).run(2, decode=True)["yopo-12"]
        for compiler in (None, "aot_eager")
    )
    assert vis_sparse.inspect(model) is None and "forward" not in vars(model.model.language_model)
    for name, value in compiled.items():
        if name.endswith("bytes") or "flops" in name:
            assert value == eager[name], name
    assert all(compiled[f"{prefix}patched_s"] > 0 for prefix in ("", "decoder_", "decode_"))
