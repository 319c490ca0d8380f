"""The tower section of a plan: read, checked, written, resolved, carried; and a plan without one is what it was."""

import dataclasses
import json
import re

import pytest

from vis_sparse.plans.budgets import resolve_tower
from vis_sparse.plans.carried import read_block, to_block
from vis_sparse.plans.files import load_plan, plan_names
from vis_sparse.plans.layer_plan import HeadBudget, LayerPlan, Neighborhood, PlanError, TokenBudget
from vis_sparse.plans.plan import PlanRecipe, VisualPlan, read_recipe

TEXT = """
name: both
default: {ffn: 0.5}
tower:
  default: {attention: {radius: 0, stride: 8}}
  layers:
    2-: {heads: {keep: 0.5}, ffn: 0.25}
    50%-: {tokens: {keep: 0.5, by: stride}}
    <100%: off
"""


def resolved(text: str = TEXT) -> VisualPlan:
    return resolve_tower(read_recipe(text).resolve(3), 6, 4, 8, "first")


def test_a_section_speaks_as_the_decoders_layers_do():
    plan = resolved(
        TEXT.replace("    50%-: {tokens: {keep: 0.5, by: stride}}\n", "    3: {tokens: {keep: 0.5, by: stride}}\n")
    )
    windows = Neighborhood(0, "both", stride=8)
    half = (True, True, False, False)
    whole, cut = LayerPlan(attention=windows), LayerPlan(attention=windows, heads=half, ffn=0.25)
    left = LayerPlan(attention=windows, heads=half, ffn=0.25, tokens=TokenBudget(0.5, "stride"))
    assert plan.tower.layers == (whole, whole, cut, left, cut, LayerPlan.off())
    assert plan.layers == (LayerPlan(ffn=0.5),) * 3, "the decoder's default is not the tower's"


def test_a_plan_without_a_section_is_what_it_was():
    plan = VisualPlan((LayerPlan(),) * 2)
    assert plan.tower is None and "tower" not in plan.to_yaml()
    assert "tower" not in to_block({"a": plan}, 4, 8)["plans"]["a"]
    assert resolve_tower(plan, 6, 4, 8) is plan


def test_who_of_the_shipped_has_a_section():
    assert {name for name in plan_names() if load_plan(name).tower} == {"whole-25", "whole-50"}


@pytest.mark.parametrize("depth", ["before the model is known", "for a model"])
def test_written_and_read_again(depth):
    text = TEXT.replace("stride}}", "uniform}}")
    plan = resolved(text) if depth == "for a model" else read_recipe(text).resolve(3)
    assert VisualPlan.from_yaml(plan.to_yaml()) == plan
    assert plan.as_recipe().resolve(3) == plan
    assert plan.replace(tower=dataclasses.replace(plan.tower, name="mine", about="of mine")) == plan
    assert plan.as_recipe().whole_first(1).resolve(3).tower == plan.tower


def test_carried_with_a_checkpoint():
    indices = LayerPlan(ffn=(0, 3, 4, 5), heads=(True, False, True, True))
    plan = VisualPlan((LayerPlan(),), tower=VisualPlan((indices, LayerPlan.off()), "tower"))
    block = json.loads(json.dumps(to_block({"a": plan}, 8, 16, (4, 8))))
    assert block["plans"]["a"]["tower"]["layers"]["0"]["ffn"] == "0, 3-5"
    assert read_block(block) == {"a": plan}
    block["tower"] = {"heads": 4}
    with pytest.raises(PlanError, match=re.escape("tower: neurons: got None, expected an integer >= 1")):
        read_block(block)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("[1]", "tower: got [1], expected a mapping with the keys num_layers, default, layers"),
        ("{name: a}", "tower: got unknown key 'name', expected one of num_layers, default, layers"),
        ("{layers: {3-1: off}}", "layers: got range '3-1', expected like 4"),
        ("{default: {attention: {radius: 1, direction: causal}}}", "tower: layers default: attention: direction: got"),
        (
            "{layers: {1-: {attention: {radius: 1, frames: 1}}}}",
            "tower: layers 1-: attention: frames: got 1, expected 0",
        ),
        ("{layers: {0: {text_reads: false}}}", "tower: layers 0: text_reads: got false, expected true, or 'off'"),
        ("{layers: {0: {tokens: {keep: 0.5}}}}", "tower: layers 0: tokens.by: got attention, expected norm"),
        ("{num_layers: 2, layers: {2: off}}", "layers: got range '2', expected layers 0 to 1"),
    ],
)
def test_what_means_nothing_in_a_tower(section, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        read_recipe(f"name: a\ntower: {section}\n")


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (VisualPlan((LayerPlan(),) * 5), "plan 'a': plan 'tower': got 5 layers, expected the model's 6"),
        (VisualPlan((LayerPlan(ffn=(8,)),) * 6), "layer 0: ffn: got neuron 8, expected indices below"),
        (VisualPlan((LayerPlan(heads=(True,) * 3),) * 6), "layer 0: heads: got a mask of 3"),
        (PlanRecipe("tower", default=LayerPlan(heads=HeadBudget(2))), "layer 0: heads: got the budget {keep: 2}"),
    ],
)
def test_what_does_not_fit_the_encoder(tower, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        resolve_tower(VisualPlan((LayerPlan(),), "a", tower=tower), 6, 4, 8)


@pytest.mark.parametrize("tower", [LayerPlan(), VisualPlan((LayerPlan(),), semantics="zero")])
def test_what_is_no_tower(tower):
    with pytest.raises(PlanError, match="tower: got .*expected a plan or a recipe"):
        VisualPlan((LayerPlan(),), tower=tower)
