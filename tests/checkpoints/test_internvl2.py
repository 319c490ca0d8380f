"""Original InternVL2 checkpoints: against the official code's numbers, and written backwards from a model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration
from typer.testing import CliRunner

import vis_sparse
from vis_sparse.checkpoints.errors import CheckpointError
from vis_sparse.checkpoints.internvl2 import convert_internvl2, load_internvl2
from vis_sparse.cli.main import app

from .. import goldens
from ..patches.cases import CASES

IMAGE_TOKEN = 250


def converted(folder: Path, output: Path):
    convert_internvl2(folder, output, IMAGE_TOKEN)
    return InternVLForConditionalGeneration.from_pretrained(output)


LOADERS = {
    "loaded": lambda folder, output: load_internvl2(folder, image_token_id=IMAGE_TOKEN),
    "converted": converted,
    "patched": lambda folder, output: vis_sparse.patch(load_internvl2(folder, image_token_id=IMAGE_TOKEN), "dense"),
}


@pytest.fixture(scope="module", params=goldens.INTERNVL2)
def official(request, tmp_path_factory):
    """A checkpoint as the official code saved it, its inputs and what that code said."""
    folder = tmp_path_factory.mktemp(request.param)
    results = goldens.write_checkpoint(request.param, folder)
    return folder, {name: torch.from_numpy(array) for name, array in results.items()}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("tiles", [1, 2, 3])
@torch.no_grad()
def test_official_numbers(official, tiles, load, tmp_path):
    folder, numbers = official
    prefix = "" if tiles == 3 else f"tiles{tiles}."
    ids = numbers[f"{prefix}input_ids"]
    pixels = numbers["pixel_values"].float()[:tiles]
    call = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    # the official RoPE remembers the longest sequence, and so does transformers': a fresh model each time
    logits = load(folder, tmp_path / "prefill")(**call).logits
    torch.testing.assert_close(logits, numbers[f"{prefix}logits"], rtol=0, atol=1e-4)
    out = load(folder, tmp_path / "generate").generate(
        **call, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(out.sequences[:, ids.shape[1] :], numbers[f"{prefix}generated_ids"])
    steps = torch.stack(out.logits, dim=1)
    torch.testing.assert_close(steps, numbers[f"{prefix}step_logits"], rtol=0, atol=1e-4)


RENAMED = {
    "model.multi_modal_projector.layer_norm.": "mlp1.0.",
    "model.multi_modal_projector.linear_1.": "mlp1.1.",
    "model.multi_modal_projector.linear_2.": "mlp1.3.",
    "model.vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "model.vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "model.vision_tower.embeddings.patch_embeddings.projection.": "vision_model.embeddings.patch_embedding.",
    "model.vision_tower.encoder.layer.": "vision_model.encoder.layers.",
    "attention.projection_layer.": "attn.proj.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "lambda_": "ls",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def original(folder: Path) -> torch.nn.Module:
    """A Qwen2 model, and `folder` with its weights as an original checkpoint in two shards."""
    model = next(case for case in CASES if case.name == "InternVL (Qwen2)").build(torch.float32)
    state, tensors = model.state_dict(), {}
    for name, tensor in state.items():
        for new, old in RENAMED.items():
            name = name.replace(new, old)
        if "attention.q_proj" in name:
            parts = (state[f"model.vision_tower.encoder.layer.{name.split('.')[3]}.{part}"] for part in qkv(name))
            name, tensor = name.replace("attention.q_proj", "attn.qkv"), torch.cat(list(parts))
        if "attention.k_proj" not in name and "attention.v_proj" not in name:
            tensors[name] = tensor.clone()
    shards = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    text, vision = model.config.text_config.to_dict(), model.config.vision_config.to_dict()
    text |= {"architectures": ["Qwen2ForCausalLM"], "rope_theta": text["rope_parameters"]["rope_theta"]}
    vision |= {"image_size": 16, "patch_size": 4, "qkv_bias": False, "qk_normalization": False}
    config = dict(model_type="internvl_chat", ps_version="v2", downsample_ratio=0.5, select_layer=-1)
    (folder / "config.json").write_text(json.dumps(config | {"llm_config": text, "vision_config": vision}))
    added = {"<IMG_CONTEXT>": model.config.image_token_id}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return model


def qkv(name: str) -> list[str]:
    return [f"attention.{part}_proj.{name.rpartition('.')[2]}" for part in "qkv"]


def same(model, expected) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert model.config.image_token_id == expected.config.image_token_id
    call = dict(input_ids=torch.tensor([[9, model.config.image_token_id, 20, 21]])[:, [0, 1, 1, 1, 1, 2, 3]])
    call["pixel_values"] = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(**call).logits, expected(**call).logits)


def test_shards(tmp_path):
    expected = original(tmp_path)
    same(load_internvl2(tmp_path), expected)
    output = tmp_path / "output"
    convert_internvl2(tmp_path, output)
    assert len(list(output.glob("*.safetensors"))) == 2 and (output / "added_tokens.json").is_file()
    same(InternVLForConditionalGeneration.from_pretrained(output), expected)
    assert load_internvl2(tmp_path, torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def change(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rename(folder: Path, old: str, new: str | None) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if old in tensors:
            tensor = tensors.pop(old)
            save_file(tensors | ({} if new is None else {new: tensor}), shard)


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda folder: change(folder, model_type="llava"), "model_type.*'llava'.*'internvl_chat'"),
        (lambda folder: change(folder, ps_version="v1"), "ps_version.*'v1'.*'v2'"),
        (lambda folder: change(folder, llm_config={"architectures": ["Mpt"]}), "got 'Mpt', expected.*Phi3ForCausalLM"),
        (lambda folder: (folder / "added_tokens.json").unlink(), "image_token_id.*<IMG_CONTEXT>"),
        (lambda folder: (folder / "config.json").unlink(), "without a config.json"),
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "without model-00002-of-00002"),
        (lambda folder: rename(folder, "mlp1.1.bias", None), "no tensor for model.multi_modal_projector.linear_1.bias"),
        (lambda folder: rename(folder, "mlp1.1.bias", "mlp9.bias"), "mlp9.bias.*expected those of InternVL2"),
        (lambda folder: rename(folder, "mlp1.1.bias", "mlp1.1.scale"), "linear_1.scale"),
    ],
)
def test_refused_checkpoints(spoil, message, tmp_path):
    original(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_internvl2(tmp_path)
    assert "\n" not in str(error.value)


def test_output_with_files_in_it(tmp_path):
    original(tmp_path)
    with pytest.raises(CheckpointError, match="output.*empty"):
        convert_internvl2(tmp_path, tmp_path)


def test_device_without_a_module(tmp_path):
    original(tmp_path)
    with pytest.raises(CheckpointError, match="device_map.*lm_head"):
        load_internvl2(tmp_path, device_map={"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu"})


def test_command_line(tmp_path):
    original(tmp_path)
    run = CliRunner().invoke
    done = run(app, ["convert-internvl2", str(tmp_path), str(tmp_path / "output"), "--json", "-"])
    assert done.exit_code == 0
    assert "config.json" in json.loads(done.stdout)["files"]
    again = run(app, ["convert-internvl2", str(tmp_path), str(tmp_path / "output")])
    assert again.exit_code == 2 and "expected a new or an empty folder" in again.stderr
