"""Vision encoders under plans: every kind against its unpatched forward and the float64 oracle, gradients too."""

import pytest
import torch

from vis_sparse.executor.tower import TowerExecutor, TowerRun
from vis_sparse.executor.tower_tables import TowerRows, TowerTables
from vis_sparse.kernels import get_backend
from vis_sparse.patches.errors import PatchError
from vis_sparse.patches.tower import blocks_of, check_tower, read_tower
from vis_sparse.plans.layer_plan import LayerPlan, Neighborhood
from vis_sparse.plans.plan import VisualPlan

from .. import tower_oracle
from ..marks import slow_but
from ..towers import CASES, DEPTH, WIDTH, random_plan

BACKENDS = {name: get_backend(name) for name in ("torch", "reference")}


def first_call(case, model):
    """Hidden states and cos and sin that go into the first layer of the case's call, and the places of its rows."""
    found = {}

    def note(module, args, kwargs):
        found["hidden"] = args[0] if args else kwargs["hidden_states"]
        found["rotary"] = kwargs.get("position_embeddings")

    handle = blocks_of(case.kind, model)[0].register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**case.call(next(model.parameters()).dtype))
    handle.remove()
    return found["hidden"], found["rotary"]


def run(case, model, plan, hidden, rotary, backend="torch", rows=None):
    executor = TowerExecutor(read_tower(case.kind, model), plan, BACKENDS[backend])
    executor.kept_cuts.refresh()
    rows = case.kind.rows(model, case.call()) if rows is None else rows
    call, states = TowerRun(executor, TowerTables.of(rows, hidden.device), DEPTH), [hidden]
    for index in range(DEPTH):
        states.append(call.layer(index, states[-1], rotary))
    return states


def expected(case, model, plan, hidden, rotary, places=None):
    own = case.places(model) if places is None else (places, None, [])
    return tower_oracle.states(
        blocks_of(case.kind, model), case.names, plan.layers, hidden.flatten(0, -2), *own[:2], rotary, own[2]
    )


def check(ours, theirs):
    for index, (own, right) in enumerate(zip(ours, theirs, strict=True)):
        error = (own.flatten(0, -2) - right).abs().max() / right.abs().max()
        assert error < 1e-5, (index, float(error))


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_is_the_encoder_where_a_plan_is_dense(name):
    case = CASES[name]
    model = case.model()
    hidden, rotary = first_call(case, model)
    outputs = []
    handles = [b.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in blocks_of(case.kind, model)]
    with torch.no_grad():
        model(**case.call())
        check([hidden, *outputs], expected(case, model, VisualPlan.dense(DEPTH), hidden, rotary))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("seed", slow_but([0, 1], range(6)))
@pytest.mark.parametrize("name", CASES)
def test_random_plans(name, seed):
    case = CASES[name]
    model = case.model()
    hidden, rotary = first_call(case, model)
    plan = random_plan(100 * seed + sorted(CASES).index(name))
    with torch.no_grad():
        theirs = expected(case, model, plan, hidden, rotary)
        for backend in BACKENDS:
            check(run(case, model, plan, hidden, rotary, backend), theirs)


@pytest.mark.parametrize("seed", slow_but([0, 1], range(5)))
def test_ragged_images_with_several_global_tokens(seed):
    """No family has them together; the executor does not care."""
    case = CASES["CLIP"]
    model, grids = case.model(), [(2, 5), (4, 3), (1, 1), (4, 3)]
    places = [
        (image, *place)
        for image, (height, width) in enumerate(grids)
        for place in [(-1, -1)] * 2 + [(y, x) for y in range(height) for x in range(width)]
    ]
    sequence, y, x = torch.tensor(places).T
    hidden = torch.randn(len(places), WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plan, rows = random_plan(seed), TowerRows(*(t.numpy() for t in (sequence, y, x)))
    with torch.no_grad():
        theirs = expected(case, model, plan, hidden, None, tower_oracle.Places(sequence, y, x))
        for backend in BACKENDS:
            check(run(case, model, plan, hidden, None, backend, rows), theirs)


@pytest.mark.parametrize("name", slow_but(["CLIP", "Qwen2.5-VL"], CASES))
def test_gradients(name):
    case = CASES[name]
    model = case.model()
    hidden, rotary = first_call(case, model)
    plan = random_plan(7)
    plan = plan.replace(layers=(*plan.layers[:-1], LayerPlan(True, Neighborhood(1, "both"), (True, False) * 2, 0.5)))
    found = []
    for states in (run, expected):
        x = hidden.clone().requires_grad_()
        model.zero_grad()
        states(case, model, plan, x, rotary)[-1].pow(2).sum().backward()
        grads = {
            name: p.grad.clone() for name, p in blocks_of(case.kind, model).named_parameters() if p.grad is not None
        }
        found.append({"x": x.grad, **grads})
    ours, theirs = found
    for key, right in theirs.items():
        own = ours.get(key, torch.zeros_like(right))
        assert (own - right).abs().max() <= 1e-5 * right.abs().max().clamp_min(1e-6), key


def test_windows_of_the_plan_that_cut_the_models_own():
    """Aligned windows of a plan in layers that have windows stay inside those."""
    case = CASES["Qwen2.5-VL"]
    model = case.model()
    hidden, rotary = first_call(case, model)
    plan = VisualPlan((LayerPlan(attention=Neighborhood(0, "both", stride=3)),) * DEPTH, "tower")
    with torch.no_grad():
        check(run(case, model, plan, hidden, rotary), expected(case, model, plan, hidden, rotary))


@pytest.mark.parametrize("name", CASES)
def test_behaviour_is_checked(name):
    case = CASES[name]
    model = case.model()
    check_tower(case.kind, model, read_tower(case.kind, model), BACKENDS["torch"])
    block = blocks_of(case.kind, model)[-1]
    kind = type(block)
    own = {"forward": lambda *args, **kwargs: 1.01 * kind.forward(*args, **kwargs)}
    block.__class__ = type(kind.__name__, (kind,), own)
    with pytest.raises(PatchError, match="got layer 3 that differs from a plain pre-norm encoder's by"):
        check_tower(case.kind, model, read_tower(case.kind, model), BACKENDS["torch"])
