"""Plans inside checkpoints, in folders and in repositories of the Hub's cache."""

import json

import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given, settings

from vis_sparse.plans.budgets import load_heads
from vis_sparse.plans.carried import ADAPTER_FILE, plans_of_folder, read_block, to_block
from vis_sparse.plans.files import load_plan
from vis_sparse.plans.hub import is_hub_id
from vis_sparse.plans.layer_plan import LayerPlan, PlanError
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.plans.scores import Calibration

from ..models import HEADS, LAYERS, NEURONS, plans, random_plan


def through_json(block):
    """As config.json holds it: keys sorted."""
    return json.loads(json.dumps(block, sort_keys=True))


@settings(max_examples=200)
@given(plans, plans)
def test_a_block_gives_equal_plans(first, second):
    named = {"z": first, "a": second.replace(name="other", about="from elsewhere")}
    found = read_block(through_json(to_block(named, HEADS, NEURONS)))
    assert found == named and list(found) == list(named)


@pytest.mark.parametrize("count", [1, 2752, 5504, 10999])
def test_scattered_neurons_stay_small(count):
    neurons = tuple(sorted(np.random.default_rng(0).choice(11008, count, replace=False).tolist()))
    plan = VisualPlan((LayerPlan(heads=(True, False) * 16, ffn=neurons),) * 32)
    each_other = VisualPlan(tuple(LayerPlan(ffn=tuple((n + i) % 11000 for n in range(count))) for i in range(1)))
    block = to_block({"p": plan}, 32, 11008)
    assert read_block(through_json(block)) == {"p": plan}
    assert len(json.dumps(block)) < 2400, "bits: an eighth of a byte a neuron, in base64"
    runs = to_block({"p": each_other}, 32, 11008)["plans"]["p"]["layers"]["0"]["ffn"]
    assert runs == ("0" if count == 1 else f"0-{count - 1}")


def changed(**changes):
    return to_block({"p": random_plan(3)}, HEADS, NEURONS) | changes


def with_layer(layer):
    block = to_block({"p": VisualPlan((LayerPlan(),))}, HEADS, NEURONS)
    block["plans"]["p"]["layers"]["0"] |= layer
    return block


@pytest.mark.parametrize(
    "block,message",
    [
        ("yopo-12", "got 'yopo-12', expected what a patched model's save_pretrained writes"),
        ({"plan": 1}, "expected what a patched"),
        (changed(format=2), "format 2, expected 1"),
        (changed(heads=0), "heads: got 0"),
        (changed(neurons=1 << 40), "neurons: got"),
        (changed(default="q"), "expected plans by name, the default 'q'"),
        (changed(plans={}), "expected plans by name"),
        (changed(plans={"p": []}), "plan 'p': got"),
        (changed(plans={"p": {"layers": {}}}), "num_layers: got None"),
        (changed(plans={"p": {"layers": {}, "num_layers": 10**9}}), "num_layers: got 1000000000"),
        (with_layer({"heads": "0-9"}), "heads: got '0-9', expected ascending runs below 8"),
        (with_layer({"heads": "3, 1"}), "out of range or order"),
        (with_layer({"heads": "1-2-3"}), "heads"),
        (with_layer({"ffn": "x"}), "ffn: got 'x'"),
        (with_layer({"ffn": "bits:AA"}), "ffn"),
        (with_layer({"ffn": "bits:AAAA"}), "3 bytes"),
        (with_layer({"fnn": 1}), "did you mean 'ffn'"),
    ],
)
def test_what_is_no_block_is_refused(block, message):
    with pytest.raises(PlanError, match="config.json: vis_sparse") as error:
        read_block(block)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bits_beyond_the_last_neuron_are_refused():
    with pytest.raises(PlanError, match="ffn"):
        read_block(with_layer({"ffn": "bits:" + "/" * 8}) | {"neurons": 43})


# Folders and repositories


def config_with(plan) -> str:
    return json.dumps({"model_type": "llava", "vis_sparse": to_block({plan.name: plan}, HEADS, NEURONS)})


def test_the_plan_of_a_folder(tmp_path):
    with pytest.raises(PlanError, match="without a plan, expected plan.yaml in it"):
        load_plan(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    assert plans_of_folder(tmp_path) is None
    (tmp_path / "config.json").write_text(config_with(random_plan(1)))
    assert load_plan(tmp_path).resolve() == random_plan(1) == load_plan(tmp_path / "config.json").resolve(LAYERS)
    (tmp_path / ADAPTER_FILE).write_text(config_with(random_plan(2)))
    assert load_plan(tmp_path).resolve() == random_plan(2)
    (tmp_path / "plan.yaml").write_text(random_plan(3).to_yaml())
    assert load_plan(tmp_path).resolve() == random_plan(3)
    with pytest.raises(PlanError, match="got 3 layers, expected the model's 4"):
        load_plan(tmp_path / "config.json").resolve(4)


def test_a_config_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PlanError, match="config.json: expected JSON"):
        load_plan(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the Hub in which files of OWNER/NAME can be put; there is no network (HF_HUB_OFFLINE)."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def add(repository: str, name: str, write, revision="main"):
        folder = tmp_path / "cache" / f"models--{repository.replace('/', '--')}"
        commit = f"{abs(hash((repository, revision))):040x}"[:40]
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        file = folder / "snapshots" / commit / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file)

    return add


def test_plans_of_repositories(hub):
    hub("org/plans", "plan.yaml", lambda file: file.write_text(random_plan(4).to_yaml()))
    hub("org/plans", "more/other.yaml", lambda file: file.write_text(random_plan(5).to_yaml()))
    hub("org/plans", "plan.yaml", lambda file: file.write_text(random_plan(6).to_yaml()), revision="v2")
    hub("org/model", "config.json", lambda file: file.write_text(config_with(random_plan(7))))
    found = {
        source: load_plan(source).resolve(LAYERS).name
        for source in ("org/plans", "org/plans:more/other.yaml", "org/plans@v2", "org/model")
    }
    assert list(found.values()) == ["random-4", "random-5", "random-6", "random-7"]


def test_a_repository_without_a_plan_is_refused(hub):
    hub("org/model", "config.json", lambda file: file.write_text('{"model_type": "llava"}'))
    with pytest.raises(PlanError, match="config.json' without a vis_sparse block"):
        load_plan("org/model")
    for source in ("org/none", "org/none@main", "org/model:plan.yaml"):
        with pytest.raises(PlanError, match="plan: got '.*', which is no file here; expected a file, or a repository"):
            load_plan(source)


def test_calibrations_and_heads_of_repositories(hub, tmp_path):
    arrays = {"heads": (2, 4), "mass": (2, 4), "effects": (2, 4), "ratios": (3, 2, 4), "text_mass": (2,),
              "attention_change": (2, 2), "ffn_change": (2, 2), "neurons": (2, 5)}  # fmt: skip
    rng = np.random.default_rng(0)
    calibration = Calibration(**{name: rng.random(shape, np.float32) for name, shape in arrays.items()})
    hub("org/made", "calibration.safetensors", calibration.save)
    masks = rng.random((2, 4)) < 0.5
    hub("org/masks", "heads.npy", lambda file: np.save(file, masks))
    assert np.array_equal(Calibration.load("org/made").neurons, calibration.neurons)
    assert np.array_equal(load_heads("org/made"), calibration.heads)
    assert np.array_equal(load_heads("org/masks"), masks)
    with pytest.raises(PlanError, match="calibration: got 'org/masks'"):
        Calibration.load("org/masks")


@pytest.mark.parametrize(
    "source,expected",
    [
        ("org/name", True), ("org/name@v1.0", True), ("org/name:a/b.yaml", True), ("o-r.g/n_a.m-e", True),
        ("plans/mine.yaml", False), ("a/b/c", False), ("/tmp/x", False), ("./x", False), ("../x/y", False),
        ("yopo-12", False), ("~/x", False), ("org/name.safetensors", False), ("", False), (3, False), (None, False),
    ],
)  # fmt: skip
def test_what_is_taken_for_a_repository(source, expected):
    assert is_hub_id(source) is expected


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "plan.yaml").write_text(random_plan(8).to_yaml())
    monkeypatch.chdir(tmp_path)
    assert load_plan("org/name").resolve() == random_plan(8)
