"""Plans measured on a user's samples, and what `auto` chooses from them."""

import dataclasses

import numpy as np
import pytest
import torch

import vis_sparse
from vis_sparse import PlanError, SampleError
from vis_sparse.calibration.measure import calibrate
from vis_sparse.plans.measured import MeasuredPlan, boldest, from_text, to_text
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.plans.scores import Calibration
from vis_sparse.searching.measured import with_measured_plans

from ..calibration.samples import make_samples
from ..models import HEADS, LAYERS, NEURONS, make_model, random_plan

DENSE = MeasuredPlan(VisualPlan.dense(LAYERS), 1.0, 0.0, 0.9, 8)


def measured(seed, cost, kl, accuracy=0.9):
    return MeasuredPlan(random_plan(seed), cost, kl, accuracy, 8)


@pytest.fixture(scope="module")
def model():
    return make_model("llama-gqa")


@pytest.fixture(scope="module")
def calibrated(model):
    samples = make_samples(model, 8)
    return with_measured_plans(calibrate(model, samples), model, samples, time_limit=1), samples


def test_text_there_and_back():
    plans = [DENSE, measured(1, 0.5, 0.01), measured(2, 0.2, 0.1)]
    assert from_text(to_text(plans, HEADS, NEURONS)) == plans


@pytest.mark.parametrize("text", ["{", "3", "[3]", '[[{"format": 1}, 1, 2, 3, 4]]', '[[1, "a", 2, 3, 4]]', "[[1]]"])
def test_what_are_no_measured_plans_is_refused(text):
    with pytest.raises(PlanError, match="calibration: plans"):
        from_text(text)


@pytest.mark.parametrize(
    "most_loss,chosen", [(0, 0), (0.005, 0), (0.01, 1), (0.02, 1), (0.05, 2), (0.1, 2), (1, 3)]
)
def test_the_boldest_within_the_loss(most_loss, chosen):
    plans = [
        DENSE,
        measured(1, 0.6, 0.01),
        measured(2, 0.3, 0.02, accuracy=0.86),  # answers lost that the KL does not show
        measured(3, 0.1, 0.5, accuracy=0.9),
        measured(4, 0.7, 0.0001, accuracy=0.5),
    ]
    assert boldest(plans, most_loss) == plans[chosen]


def test_without_dense_nothing_is_chosen():
    with pytest.raises(PlanError, match="got none that is dense"):
        boldest([measured(1, 0.6, 0.01)], 0.01)
    with pytest.raises(PlanError, match="most_loss: got -1"):
        boldest([DENSE], -1)


def test_plans_are_measured_on_samples_that_did_not_choose_them(model, calibrated):
    """Their KL is that of the patched model on the second half."""
    calibration, samples = calibrated
    found = from_text(calibration.metadata["plans"])
    assert len(found) > 3 and any(each.plan.is_dense for each in found) and {each.samples for each in found} == {4}
    assert min(each.cost for each in found) < 0.5
    each = min(found, key=lambda each: each.cost)
    kl = []
    for sample in samples[1::2]:
        rows = (sample["labels"][0, 1:] != -100).nonzero()[:, 0]
        with torch.no_grad():
            dense = model(**sample).logits[0, rows].log_softmax(-1)
            with vis_sparse.patched(model, each.plan):
                own = model(**sample).logits[0, rows].log_softmax(-1)
        kl.append(float((dense.exp() * (dense - own)).sum(-1).mean()))
    assert np.mean(kl) == pytest.approx(each.kl, rel=1e-3) and each.kl > 1e-3


def test_auto_takes_what_the_calibration_allows(model, calibrated, tmp_path):
    calibration, _ = calibrated
    calibration.save(tmp_path / "calibration.safetensors")
    again = Calibration.load(tmp_path / "calibration.safetensors")
    found = from_text(calibration.metadata["plans"])
    limits = sorted({each.kl for each in found})
    costs = []
    for most_loss in (0, limits[len(limits) // 2], limits[-1] + 1):
        with vis_sparse.patched(model, "auto", calibration=again, most_loss=most_loss):
            told = vis_sparse.inspect(model)
        assert told["plan"] == told["measured"].plan and told["measured"] == boldest(found, most_loss)
        costs.append(told["measured"].cost)
    assert costs == sorted(costs, reverse=True) and costs[-1] == min(each.cost for each in found) < costs[0]


def test_without_measured_plans_it_is_the_familys(model, calibrated):
    calibration, _ = calibrated
    plain = dataclasses.replace(calibration, metadata={n: t for n, t in calibration.metadata.items() if n != "plans"})
    for given in (plain, None):
        with vis_sparse.patched(model, "auto", calibration=given):
            assert vis_sparse.inspect(model)["plan"].name == "auto" and "measured" not in vis_sparse.inspect(model)


def test_one_sample_is_too_few(model, calibrated):
    with pytest.raises(SampleError, match="got 1, expected two at least"):
        with_measured_plans(calibrated[0], model, calibrated[1][:1])
