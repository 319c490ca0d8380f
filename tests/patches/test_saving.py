"""A plan travels with its checkpoint: `save_pretrained` of patched models, of adapters, and what reads it again."""

import json

import peft
import pytest
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

import vis_sparse
from vis_sparse import PatchError, PlanError

from ..models import IMAGE, LAYERS, make_batch, make_model, random_plan, run
from .wrap_kinds import added_adapter, lora

EXACT = dict(atol=0, rtol=0)


def small_model(seed=0):
    return make_model("llama-gqa", seed, dtype=torch.float32)


def block_of(file):
    return json.loads(file.read_text()).get("vis_sparse")


@torch.no_grad()
def logits(model):
    return run(model, make_batch(small_model(), [(5, IMAGE, 4)]))[0]


@pytest.mark.parametrize("semantics", ["exclude", "zero"])
def test_a_saved_model_brings_its_plan(tmp_path, semantics):
    plan = random_plan(5, semantics)
    model = vis_sparse.patch(small_model(), plan)
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert vis_sparse.inspect(again) is None
    with vis_sparse.patched(model, "dense"):
        torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)  # transformers ignores it
    vis_sparse.patch(again)
    assert vis_sparse.inspect(again)["plan"] == plan
    torch.testing.assert_close(logits(again), logits(model), **EXACT)


def test_nothing_but_the_block_is_written(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "plain")
    vis_sparse.patch(model, random_plan(5))
    before = dict(vars(model.config))
    model.save_pretrained(tmp_path / "patched")
    assert vars(model.config) == before
    plain, patched = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("plain", "patched"))
    assert patched.pop("vis_sparse")["format"] == 1 and patched == plain
    names = [sorted(file.name for file in (tmp_path / each).iterdir()) for each in ("plain", "patched")]
    assert names[0] == names[1]
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "patched/model.safetensors").read_bytes()
    vis_sparse.unpatch(model).save_pretrained(tmp_path / "unpatched")
    assert json.loads((tmp_path / "unpatched/config.json").read_text()) == plain
    assert "save_pretrained" not in vars(model)


def test_a_save_that_fails_leaves_the_config(tmp_path):
    model = vis_sparse.patch(small_model(), random_plan(5))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path / "file" / "in_it")
    assert "vis_sparse" not in vars(model.config)


def test_the_plan_of_a_loaded_checkpoint_stays_with_it(tmp_path):
    vis_sparse.patch(small_model(), random_plan(5)).save_pretrained(tmp_path / "first")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")  # not patched: as it came
    assert block_of(tmp_path / "second/config.json") == block_of(tmp_path / "first/config.json")
    vis_sparse.patch(model, random_plan(6)).save_pretrained(tmp_path / "third")
    assert "random-6" in block_of(tmp_path / "third/config.json")["plans"]
    vis_sparse.unpatch(model).save_pretrained(tmp_path / "fourth")
    assert block_of(tmp_path / "fourth/config.json") == block_of(tmp_path / "first/config.json")


def test_several_plans_travel_by_name(tmp_path):
    plans = {"z": random_plan(5), "a": random_plan(6)}
    vis_sparse.patch(small_model(), plans).save_pretrained(tmp_path)
    again = vis_sparse.patch(LlavaForConditionalGeneration.from_pretrained(tmp_path))
    assert vis_sparse.inspect(again)["plans"] == plans and vis_sparse.inspect(again)["plan"] == plans["z"]


def test_a_block_that_does_not_fit_is_refused(tmp_path):
    vis_sparse.patch(small_model(), random_plan(5)).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.text_config.num_hidden_layers = LAYERS + 1
    other = LlavaForConditionalGeneration(config)
    with pytest.raises(PlanError, match=f"got {LAYERS} layers, expected the model's {LAYERS + 1}"):
        vis_sparse.patch(other)
    assert vis_sparse.inspect(vis_sparse.patch(other, "auto"))["plan"].name == "auto"
    other.config.vis_sparse = {"format": 9}
    with pytest.raises(PlanError, match="config.json: vis_sparse: got format 9"):
        vis_sparse.patch(other)


# Adapters


def test_an_adapter_brings_its_plan_in_a_file_of_its_own(tmp_path):
    base = small_model()
    base.save_pretrained(tmp_path / "base")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    model = vis_sparse.patch(lora(model), random_plan(5))
    model.save_pretrained(tmp_path / "adapter")
    assert "random-5" in block_of(tmp_path / "adapter/vis_sparse.json")["plans"]
    assert not (tmp_path / "adapter/config.json").exists()
    assert "vis_sparse" not in (tmp_path / "adapter/adapter_config.json").read_text()
    again = vis_sparse.from_pretrained(tmp_path / "adapter")
    assert vis_sparse.inspect(again)["plan"] == random_plan(5) and not hasattr(again, "peft_config")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=1e-4)
    by_peft = peft.PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(tmp_path / "base"),
                                             tmp_path / "adapter")  # fmt: skip
    vis_sparse.patch(by_peft, tmp_path / "adapter")
    torch.testing.assert_close(logits(by_peft), logits(model), **EXACT)
    vis_sparse.unpatch(model).save_pretrained(tmp_path / "unpatched")
    assert not (tmp_path / "unpatched/vis_sparse.json").exists()


def test_adapters_of_other_names(tmp_path):
    model = lora(small_model())
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=2))
    vis_sparse.patch(model, random_plan(5)).save_pretrained(tmp_path)
    assert block_of(tmp_path / "vis_sparse.json") == block_of(tmp_path / "second/vis_sparse.json") is not None


def test_an_adapter_of_transformers_own_kind(tmp_path):
    added_adapter(vis_sparse.patch(small_model(), random_plan(5))).save_pretrained(tmp_path)
    assert "random-5" in block_of(tmp_path / "vis_sparse.json")["plans"]


def test_a_wrapper_made_after_the_patch_is_saved_with_save_plan(tmp_path):
    model = lora(vis_sparse.patch(small_model(), random_plan(5)))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "vis_sparse.json").exists()
    vis_sparse.save_plan(model, tmp_path)
    assert "random-5" in block_of(tmp_path / "vis_sparse.json")["plans"]


def test_only_the_main_process_writes(tmp_path):
    vis_sparse.patch(lora(small_model()), random_plan(5)).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "vis_sparse.json").exists()


def test_save_plan_of_a_checkpoint_that_was_saved_otherwise(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(PatchError, match="save_plan: got a model that is not patched"):
        vis_sparse.save_plan(model, tmp_path / "saved")
    vis_sparse.patch(model, random_plan(5))
    with pytest.raises(PatchError, match="without config.json and adapter_config.json"):
        vis_sparse.save_plan(model, tmp_path)
    vis_sparse.save_plan(model, tmp_path / "saved")
    assert vis_sparse.inspect(vis_sparse.from_pretrained(tmp_path / "saved"))["plan"] == random_plan(5)


def test_an_adapter_without_its_model_is_refused(tmp_path):
    vis_sparse.patch(lora(small_model()), random_plan(5)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        vis_sparse.from_pretrained(tmp_path)


def test_without_a_plan_it_is_auto(tmp_path):
    small_model().save_pretrained(tmp_path)
    assert vis_sparse.inspect(vis_sparse.from_pretrained(tmp_path))["plan"].name == "auto"
    assert vis_sparse.inspect(vis_sparse.from_pretrained(tmp_path, random_plan(7)))["plan"] == random_plan(7)
