"""Plans: every check and its message, the published methods, YAML there and back, and the shipped files."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vis_sparse.plans.budgets import resolve_heads
from vis_sparse.plans.files import as_plan, load_plan, plan_names, shown_names
from vis_sparse.plans.layer_plan import HeadBudget, HeadFile, LayerPlan, Neighborhood, PlanError, TokenBudget
from vis_sparse.plans.layer_range import layer_range
from vis_sparse.plans.plan import PlanRecipe, VisualPlan, mask_plan, read_recipe


def refuses(message: str):
    """Expects a PlanError whose whole message is `message`."""
    return pytest.raises(PlanError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Neighborhood(-1), "radius: got -1, expected an integer >= 0"),
        (lambda: Neighborhood(1.5), "radius: got 1.5, expected an integer >= 0"),
        (lambda: Neighborhood(True), "radius: got True, expected an integer >= 0"),
        (lambda: Neighborhood(1, frames=-1), "frames: got -1, expected an integer >= 0"),
        (lambda: Neighborhood(1, stride=0), "stride: got 0, expected an integer >= 1"),
        (lambda: Neighborhood(1, "left"), "direction: got 'left', expected one of causal, both"),
        (lambda: HeadBudget(-1), "heads.keep: got -1, expected a count >= 0 or a share in [0, 1]"),
        (lambda: HeadBudget(1.5), "heads.keep: got 1.5, expected a count >= 0 or a share in [0, 1]"),
        (lambda: HeadBudget(float("nan")), "heads.keep: got nan, expected a count >= 0 or a share in [0, 1]"),
        (lambda: HeadBudget("4"), "heads.keep: got '4', expected a count or a share in [0, 1]"),
        (lambda: HeadBudget(9).count(8), "heads.keep: got 9, expected at most the model's 8 heads"),
        (lambda: LayerPlan(text_reads=1), "text_reads: got 1, expected true or false"),
        (lambda: LayerPlan(attention="local"), "attention: got 'local', expected 'full', 'none' or a neighborhood"),
        (lambda: LayerPlan(heads=()), "heads: got (), expected a non-empty mask of booleans, one a query head"),
        (lambda: LayerPlan(heads=(0, 2)), "heads: got (0, 2), expected a non-empty mask of booleans, one a query head"),
        (lambda: LayerPlan(heads="x"), "heads: got 'x', expected all, a bool mask, {keep: n} or {file: path}"),
        (lambda: LayerPlan(ffn=1.1), "ffn: got 1.1, expected a share in [0, 1] or neuron indices"),
        (lambda: LayerPlan(ffn=-1), "ffn: got -1, expected a share in [0, 1] or neuron indices"),
        (lambda: LayerPlan(ffn=float("nan")), "ffn: got nan, expected a share in [0, 1] or neuron indices"),
        (lambda: LayerPlan(ffn=True), "ffn: got True, expected a share in [0, 1] or neuron indices"),
        (lambda: LayerPlan(ffn=(0, -1)), "ffn: got -1, expected an integer >= 0"),
        (lambda: LayerPlan(ffn=(3, 1)), "ffn: expected neuron indices in ascending order without repeats"),
        (lambda: LayerPlan(ffn=(1, 1)), "ffn: expected neuron indices in ascending order without repeats"),
        (lambda: VisualPlan(()), "layers: expected one LayerPlan a decoder layer, at least one"),
        (lambda: VisualPlan(("off",)), "layers: expected one LayerPlan a decoder layer, at least one"),
        (lambda: VisualPlan((LayerPlan(),), semantics="x"), "semantics: got 'x', expected one of exclude, zero"),
        (lambda: VisualPlan.yopo(4, window=0), "window: got 0, expected an integer >= 1"),
        (lambda: VisualPlan.yopo(4, ffn_ratio=0.5), "ffn_ratio: got 0.5, expected a number >= 1"),
        (lambda: VisualPlan.yopo(4, layer_cut=5), "layer_cut: got 5, expected a layer from 0 to the model's 4"),
        (lambda: VisualPlan.yopo(4, head_mask=[[1, 0]]), "head_mask: got 1 layers, expected 4"),
        (lambda: VisualPlan.vtw(4, -1), "drop_layer: got -1, expected an integer >= 0"),
        (lambda: VisualPlan.vica(4, [4]), "layers: got layer 4, expected 0 to 3"),
        (lambda: VisualPlan.shortv(4, [-1]), "layers: got layer -1, expected 0 to 3"),
        (lambda: mask_plan(VisualPlan.dense(2), [[1]]), "heads: got masks for 1 layers, expected 2"),
        (lambda: as_plan(7, 4), "plan: got int, expected a VisualPlan, a recipe, a name or a path"),
        (lambda: PlanRecipe("p").resolve(), "plan 'p': num_layers is needed, its file states none"),
        (lambda: PlanRecipe("p", num_layers=3).resolve(4), "plan 'p': got 3 layers, expected the model's 4"),
    ],
)
def test_what_is_refused(make, message):
    with refuses(message):
        make()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerPlan(heads=(True,) * 7), "plan 'custom', layer 1: heads: got a mask of 7, expected the model's 8 heads"),
        (
            LayerPlan(heads=HeadBudget(9)),
            "plan 'custom', layer 1: heads.keep: got 9, expected at most the model's 8 heads",
        ),
        (
            LayerPlan(ffn=(0, 32)),
            "plan 'custom', layer 1: ffn: got neuron 32, expected indices below the model's 32 neurons",
        ),
    ],
)
def test_a_plan_that_does_not_fit_the_model_names_the_layer_and_the_field(layer, message):
    with refuses(message):
        VisualPlan((LayerPlan(), layer)).check_fits(2, num_heads=8, ffn_size=32)


def test_a_plan_of_another_depth_is_refused():
    with refuses("plan 'dense': got 3 layers, expected the model's 4"):
        VisualPlan.dense(3).check_fits(4, 8, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "layers: {0: {atention: full}}",
            "plan: layers 0: got unknown key 'atention', expected one of text_reads, attention, heads, ffn, tokens; "
            "did you mean 'attention'?",
        ),
        (
            "lays: {}",
            "plan: plan: got unknown key 'lays', expected one of name, about, semantics, num_layers, default, layers, "
            "tower, before; did you mean 'layers'?",
        ),
        (
            "default: {attention: {radius: 1, stripe: 2}}",
            "plan: default: attention: got unknown key 'stripe', expected one of radius, direction, frames, stride; "
            "did you mean 'stride'?",
        ),
        ("default: {attention: {frames: 1}}", "plan: default: attention: radius is missing"),
        (
            "default: {attention: {radius: -2}}",
            "plan: default: attention: radius: got -2, expected an integer >= 0",
        ),
        (
            "layers: {3: {heads: {keep: 2, file: a.npy}}}",
            "plan: layers 3: heads: got {'file': 'a.npy', 'keep': 2}, expected either keep or file",
        ),
        (
            "layers: {3: {heads: {keep: 2.5}}}",
            "plan: layers 3: heads.keep: got 2.5, expected a count >= 0 or a share in [0, 1]",
        ),
        ("default: {tokens: {by: norm}}", "plan: default: tokens: keep is missing"),
        ("default: {tokens: {keep: 0}}", "plan: default: tokens.keep: got 0, expected a share in (0, 1]"),
        ("default: {tokens: {keep: 12}}", "plan: default: tokens.keep: got 12, expected a share in (0, 1]"),
        (
            "default: {tokens: {keep: 0.5, by: magic}}",
            "plan: default: tokens.by: got 'magic', expected one of attention, norm, uniform, stride, random",
        ),
        (
            "default: {tokens: {keep: 0.5, seed: 1}}",
            "plan: default: tokens: got unknown key 'seed', expected one of keep, by",
        ),
        ("default: {tokens: 0.5}", "plan: default: tokens: got 0.5, expected all or {keep: share, by: order}"),
        (
            "layers: {2: {text_reads: false, tokens: {keep: 0.5}}}",
            "plan: layers 2: tokens.by: got attention in a layer in which text reads no visual token, expected "
            "text_reads and an active head there (norm, uniform, stride and random need neither)",
        ),
        ("layers: {3: {ffn: 3}}", "plan: layers 3: ffn: got 3, expected a share in [0, 1] or neuron indices"),
        (
            "layers: {3: on}",
            "plan: layers 3: got True, expected 'off' or the keys text_reads, attention, heads, ffn, tokens",
        ),
        ("layers: [off]", "plan: layers: got list, expected a mapping of layer ranges"),
        ("semantics: both", "plan: semantics: got 'both', expected one of exclude, zero"),
        ("num_layers: true", "plan: num_layers: got True, expected an integer >= 1"),
        (
            "- a:\n",
            "plan: got list, expected a mapping with the keys name, about, semantics, num_layers, default, "
            "layers, tower, before",
        ),
    ],
)
def test_what_is_refused_in_a_file(text, message):
    with refuses(message):
        read_recipe(text)


@pytest.mark.parametrize(
    "spec", ["x", "3-1", "2--4", "1.5", "50%", "50-60%", "60%-50%", "50%-150%", "nan%-", "1e2", "<3", "<0%", "<101%"]
)
def test_malformed_ranges_are_refused_when_the_file_is_read(spec):
    message = f"layers: got range {spec!r}, expected like 4, 2-15, 2-, 50%-100%, 50%- or <50% in ascending order"
    with refuses(f"plan: {message}"):
        read_recipe(f"layers: {{'{spec}': off}}")


def test_text_that_is_no_yaml_is_refused_in_one_line():
    with pytest.raises(PlanError, match="^plan: not YAML: ") as caught:
        read_recipe("default: {ffn: [\n")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "num_layers", "layers"),
    [
        ("4", 32, [4]),
        ("2-5", 32, [2, 3, 4, 5]),
        ("29-", 32, [29, 30, 31]),
        ("-2", 32, [0, 1, 2]),
        ("50%-100%", 6, [3, 4, 5]),
        ("50%-", 5, [3, 4]),
        ("-50%", 5, [0, 1, 2]),
        ("50%-50%", 8, []),
        ("<25%", 32, [7]),
        ("<25%", 27, [6]),
        ("<7%", 100, [6]),
        ("<100%", 5, [4]),
        # 7/32 is 21.875 %; 0.07 * 100 is a little above 7, and still layer 7
        ("21.875%-25%", 32, [7]),
        ("7%-9%", 100, [7, 8]),
    ],
)
def test_ranges_of_layers(spec, num_layers, layers):
    assert list(layer_range(spec, num_layers)) == layers


def test_a_range_outside_the_model_names_the_plan():
    with refuses("plan 'p': layers: got range '4-6', expected layers 0 to 5"):
        VisualPlan.from_yaml("name: p\nlayers: {4-6: off}", 6)


def test_later_entries_win_field_by_field_and_off_replaces_the_layer():
    plan = VisualPlan.from_yaml(
        "default: {ffn: 0.5}\nlayers:\n  1-: {heads: {keep: 2}}\n  2: {ffn: 0.25}\n  3-: off\n  3: {text_reads: true}",
        5,
    )
    assert plan.layers == (
        LayerPlan(ffn=0.5),
        LayerPlan(heads=HeadBudget(2), ffn=0.5),
        LayerPlan(heads=HeadBudget(2), ffn=0.25),
        LayerPlan(True, "none", None, 0.0),
        LayerPlan.off(),
    )


def test_default_can_be_off():
    assert VisualPlan.from_yaml("default: off", 2).layers == (LayerPlan.off(),) * 2


def test_masks_and_indices_come_as_arrays_too():
    layer = LayerPlan(heads=np.array([True, False]), ffn=np.array([0, 3]))
    assert layer == LayerPlan(heads=(True, False), ffn=(0, 3))
    assert hash(layer) == hash(LayerPlan(heads=(True, False), ffn=(0, 3)))
    assert type(layer.ffn[0]) is int


@pytest.mark.parametrize(
    ("layer", "is_dense", "updates"),
    [
        (LayerPlan(), True, True),
        (LayerPlan(heads=(True, True)), True, True),
        (LayerPlan(heads=(True, False)), False, True),
        (LayerPlan(text_reads=False), False, True),
        (LayerPlan(attention=Neighborhood(99)), False, True),
        (LayerPlan(attention="none"), False, True),
        (LayerPlan(attention="none", ffn=0), False, False),
        (LayerPlan(attention="none", ffn=()), False, False),
        (LayerPlan.off(), False, False),
        (LayerPlan(tokens=TokenBudget(0.5)), False, True),
        (LayerPlan(tokens=TokenBudget(1)), True, True),
    ],
)
def test_what_a_layer_is(layer, is_dense, updates):
    assert (layer.is_dense, layer.updates) == (is_dense, updates)


@pytest.mark.parametrize(("keep", "count"), [(3, 3), (0, 0), (0.0, 0), (1.0, 8), (0.125, 1), (0.45, 4), (0.5625, 5)])
def test_budgets_round_half_up(keep, count):
    assert HeadBudget(keep).count(8) == count


@pytest.mark.parametrize(
    ("ffn", "size", "count"),
    [(1 / 3, 99, 33), (1 / 3, 11008, 3669), (0.25, 13, 3), (1 / 49, 49, 1)],
)
def test_an_ffn_share_is_the_official_codes_first_neurons(ffn, size, count):
    assert LayerPlan(ffn=ffn).neurons(size) == count


@pytest.mark.parametrize(
    ("keep", "tokens", "count"), [(0.5, 576, 288), (0.5, 7, 3), (0.01, 7, 1), (0.9, 1, 1), (0.29, 100, 29), (0.5, 0, 0)]
)
def test_a_share_of_the_tokens_is_rounded_down_but_never_to_none(keep, tokens, count):
    assert TokenBudget(keep).count(tokens) == count


def test_nothing_leaves_under_a_share_of_one():
    assert LayerPlan(tokens=TokenBudget(1.0, "norm")) == LayerPlan()
    assert VisualPlan.from_yaml("layers: {0: {tokens: {keep: 1}}, 1: {tokens: all}}", 2).is_dense


def test_what_is_refused_of_tokens_over_a_whole_plan():
    half = LayerPlan(tokens=TokenBudget(0.5))
    with refuses(
        "layer 1: tokens: got a share to keep under semantics 'zero', expected 'exclude' (in the official arithmetic "
        "every visual row goes on to the end)"
    ):
        VisualPlan((LayerPlan(), half), semantics="zero")
    with refuses(
        "layer 2: tokens.by: got stride after tokens left in layer 0, expected whole grids (stride may only come first)"
    ):
        VisualPlan((half, LayerPlan(), LayerPlan(tokens=TokenBudget(0.5, "stride"))))
    text = "name: p\nlayers: {0: {text_reads: false}, 0-: {tokens: {keep: 0.5}}}"
    with refuses(
        "plan 'p': tokens.by: got attention in a layer in which text reads no visual token, expected text_reads and an "
        "active head there (norm, uniform, stride and random need neither)"
    ):
        VisualPlan.from_yaml(text, 2)


def test_heads_that_leave_nobody_to_choose_are_refused():
    with pytest.raises(PlanError, match="tokens.by: got attention"):
        resolve_heads(VisualPlan.fastv(4), 2, 2, np.zeros((4, 2), dtype=bool))


def test_official_settings():
    mask = np.array([[1, 1], [0, 1], [1, 0]], dtype=bool)
    plan = VisualPlan.yopo(3, window=4, layer_cut=2, head_mask=mask, ffn_ratio=2, semantics="zero")
    near = Neighborhood(1, "both")  # a window of 4 reaches int(3/2) = 1 to each side
    assert plan.semantics == "zero"
    assert plan.layers == (
        LayerPlan(True, near, (True, True), 0.5),
        LayerPlan(True, near, (False, True), 0.5),
        LayerPlan(False, near, (True, False), 0.5),
    )


VICA_LAYERS = {0, 1, 7, 8, 9, 10, 11, 14}


def test_shipped_plans_are_the_published_methods_on_32_layers():
    shipped = {name: load_plan(name).resolve(32).layers for name in plan_names()}
    assert shipped["dense"] == VisualPlan.dense(32).layers
    assert shipped["vtw"] == VisualPlan.vtw(32, 16).layers
    assert shipped["vica"] == VisualPlan.vica(32, VICA_LAYERS).layers
    assert shipped["shortv"] == VisualPlan.shortv(32, range(13, 32)).layers
    assert shipped["vskip"] == VisualPlan.vskip(32, range(16, 32)).layers
    assert shipped["fastv"] == VisualPlan.fastv(32).layers
    assert [i for i, layer in enumerate(shipped["fastv"]) if layer.tokens] == [1]
    assert shipped["random-drop"] == VisualPlan.fastv(32, by="random").layers
    assert shipped["pyramiddrop"] == VisualPlan.pyramiddrop(32).layers
    assert [i for i, layer in enumerate(shipped["pyramiddrop"]) if layer.tokens] == [7, 15, 23]
    near = Neighborhood(2, "both")
    assert shipped["yopo-12"] == (
        *[LayerPlan(attention=near, ffn=0.25)] * 2,
        *[LayerPlan(attention=near, heads=HeadBudget(0.125), ffn=0.25)] * 14,
        *[LayerPlan.off()] * 16,
    )
    whole, frozen = LayerPlan(), LayerPlan(attention="none", ffn=0.0)
    assert shipped["auto"] == (*[whole] * 28, frozen, *[LayerPlan.off()] * 3)
    assert as_plan("auto", 8).layers == (*[whole] * 7, frozen), "to text it is the dense plan"


@pytest.mark.parametrize("name", plan_names())
def test_every_shipped_plan_fits_every_depth_and_says_what_it_is(name):
    recipe = load_plan(name)
    assert recipe.name == name
    assert recipe.num_layers is None
    assert len(recipe.about) > 30
    for depth in (3, 8, 27, 28, 80):
        assert as_plan(name, depth).num_layers == depth


def test_files_are_shown_by_the_names_of_their_plans(tmp_path):
    names = {"a": "found", "b": "found", "c": "other", "d": "auto"}
    files = {stem: str(tmp_path / f"{stem}.yaml") for stem in names}
    for stem, name in names.items():
        (tmp_path / f"{stem}.yaml").write_text(f"name: {name}")
    assert shown_names([files["a"], "auto"]) == {files["a"]: "found", "auto": "auto"}
    shown = shown_names(["dense", *files.values()])
    assert list(shown.values()) == ["dense", "found (a)", "found (b)", "other", "auto (d)"]
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "a.yaml").write_text("name: found")
    with pytest.raises(PlanError, match="expected plans of different names"):
        shown_names([files["a"], str(tmp_path / "e" / "a.yaml")])


def test_an_unknown_plan_names_the_nearest():
    with pytest.raises(
        PlanError, match=r"^plan: got 'yopo12', expected a file or one of auto, .*; did you mean 'yopo-12'\?$"
    ):
        load_plan("yopo12")


def test_a_plan_is_found_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nlayers: {50%-: off}\n")
    for source in (path, str(path)):
        assert load_plan(source).resolve(4) == VisualPlan.from_yaml(source, 4) == as_plan(source, 4)
    path.write_text("layers: {0: {fn: 1}}")
    with pytest.raises(PlanError, match=re.escape(f"{path}: layers 0: got unknown key 'fn'")):
        load_plan(path)


neighborhoods = st.builds(
    Neighborhood, st.integers(0, 9), st.sampled_from(["causal", "both"]), st.integers(0, 3), st.integers(1, 4)
)
masks = st.lists(st.booleans(), min_size=4, max_size=4).map(tuple)
budgets = st.builds(HeadBudget, st.integers(0, 64) | st.floats(0, 1))
files = st.builds(HeadFile, st.text(min_size=1).filter(str.isprintable))
layers = st.builds(
    LayerPlan,
    text_reads=st.booleans(),
    attention=st.sampled_from(["full", "none"]) | neighborhoods,
    heads=st.none() | masks | budgets | files,
    ffn=st.floats(0, 1) | st.sets(st.integers(0, 99)).map(lambda chosen: tuple(sorted(chosen))),
)
tokens = st.builds(TokenBudget, st.floats(0, 1, exclude_min=True), st.sampled_from(["norm", "uniform", "random"]))
plans = st.builds(
    VisualPlan,
    st.lists(layers, min_size=1, max_size=6).map(tuple),
    name=st.text().filter(str.isprintable),
    about=st.text().filter(str.isprintable),
    semantics=st.sampled_from(["exclude", "zero"]),
) | st.builds(
    lambda layers, tokens: VisualPlan(tuple(replace(layer, tokens=tokens) for layer in layers)),
    st.lists(layers, min_size=1, max_size=6),
    tokens,
)


@given(plans)
def test_yaml_there_and_back(plan):
    assert VisualPlan.from_yaml(plan.to_yaml()) == plan
    assert read_recipe(plan.to_yaml()).resolve(plan.num_layers) == plan


def test_yaml_of_the_methods_that_drop_tokens():
    for plan in (VisualPlan.fastv(5), VisualPlan.pyramiddrop(5), VisualPlan.fastv(5, 3, 0.1, "stride")):
        assert VisualPlan.from_yaml(plan.to_yaml()) == plan


def test_a_file_that_states_its_depth_is_refused_for_another():
    text = VisualPlan.vtw(4, 2).to_yaml()
    with refuses("plan 'vtw': got 4 layers, expected the model's 6"):
        VisualPlan.from_yaml(text, 6)


@pytest.mark.parametrize("name", plan_names())
@pytest.mark.parametrize("count", [1, 2])
def test_the_first_layers_of_every_shipped_plan_can_be_whole(name, count):
    plain, whole = (load_plan(each).resolve(32) for each in (name, f"{name}+{count}"))
    assert whole == load_plan(name).whole_first(count).resolve(32) and whole.name == f"{name}+{count}"
    assert whole.layers[count:] == plain.layers[count:]
    for layer, before in zip(whole.layers[:count], plain.layers):
        assert replace(layer, tokens=None).is_dense and layer.tokens == before.tokens


def test_whole_layers_of_a_file_and_of_whole_layers(tmp_path):
    (tmp_path / "mine+1.yaml").write_text("name: mine\ndefault: {ffn: 0.5}\n")
    plain, whole, more = (load_plan(tmp_path / f"mine+1.yaml{each}").resolve(4) for each in ("", "+2", "+2+3"))
    assert [layer.ffn for layer in plain.layers] == [0.5] * 4
    assert [layer.ffn for layer in whole.layers] == [1, 1, 0.5, 0.5] and whole.name == "mine+2"
    assert [layer.ffn for layer in more.layers] == [1, 1, 1, 0.5]


@pytest.mark.parametrize("source", ["auto+0", "auto+", "auto+x", "+2", "nothing+2", "auto+-1"])
def test_what_are_no_whole_layers_is_refused(source):
    with pytest.raises(PlanError):
        load_plan(source)
    with pytest.raises(PlanError, match="range '0-4', expected layers 0 to 3"):
        load_plan("auto+5").resolve(4)
