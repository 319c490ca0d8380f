"""Distillation: what the dense model says, kept on disk, and the divergence from it."""

import numpy as np
import pytest
import torch

import vis_sparse
from vis_sparse import SampleError
from vis_sparse.calibration.samples import NO_LABEL
from vis_sparse.patches import is_patched
from vis_sparse.training import teacher
from vis_sparse.training.encoding import Encoder
from vis_sparse.training.teacher import divergence, taught
from vis_sparse.training.trainer import TAUGHT, Collator, Numbered

from .samples import conversations, loaded, row
from .test_finetune import losses, tuned


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return conversations(folder, *(row(1 + n % 3, (1, 2, 0)[n % 3], start=n) for n in range(5)))


@pytest.fixture(scope="module")
def small(rows):
    """(dense model, its encoder)."""
    model, processor = loaded()
    return model.eval(), Encoder(processor)


def ask(small, rows, folder, top=100, most=1 << 30, **settings):
    model, encoder = small
    return taught(model, encoder, rows, folder, top, most, **settings)


def test_the_divergence_of_all_tokens_is_kl():
    generator = torch.Generator().manual_seed(0)
    dense, own = (torch.randn(7, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = torch.nn.functional.kl_div(own.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none")
    best = dense.log_softmax(-1).topk(30)
    found = divergence(own, best.indices, best.values)
    torch.testing.assert_close(found.double(), expected.sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top", [1, 5, 29])
def test_the_others_count_as_one_token(top):
    generator = torch.Generator().manual_seed(1)
    dense, own = (torch.randn(9, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    best = dense.log_softmax(-1).topk(top)

    def joined(logits):
        p = logits.softmax(-1)
        known = p.gather(-1, best.indices)
        return torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1)

    expected = (joined(dense) * (joined(dense) / joined(own)).log()).sum(-1)
    found = divergence(own.requires_grad_(), best.indices, best.values)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    found.sum().backward()
    assert own.grad.isfinite().all() and own.grad.abs().sum() > 0


def test_a_teacher_that_is_sure_gives_no_infinities():
    own = torch.zeros(1, 4, requires_grad=True)
    kl = divergence(own, torch.tensor([[2]]), torch.tensor([[0.0]]))
    kl.sum().backward()
    torch.testing.assert_close(kl, torch.tensor([4.0]).log())
    sure = torch.tensor([[0.0, 0.0, 200.0, 0.0]], requires_grad=True)
    kl = divergence(sure, torch.tensor([[2]]), torch.tensor([[-0.7]]))
    kl.sum().backward()
    assert kl.isfinite().all() and sure.grad.isfinite().all()


def test_it_says_what_the_dense_model_says(small, rows, tmp_path):
    model, encoder = small
    vis_sparse.patch(model, "vtw")
    try:
        told = ask(small, rows, tmp_path)
        assert is_patched(model)
    finally:
        vis_sparse.unpatch(model)
    batch = Collator(encoder, told)(list(map(Numbered(rows).__getitem__, (3, 0, 4))))
    ids, log_probabilities = (batch.pop(name) for name in TAUGHT)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1][labels[:, 1:] != NO_LABEL]
    assert ids.shape == (len(logits), logits.shape[-1])
    expected = logits.log_softmax(-1).gather(-1, ids.long())
    torch.testing.assert_close(log_probabilities, expected, atol=2e-2, rtol=2e-3)
    assert float(divergence(logits, ids, log_probabilities).abs().max()) < 1e-3


def test_it_is_asked_once(small, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "_SHARD", 2)
    first, steps = ask(small, rows, tmp_path), []
    files = sorted(first.folder.glob("*.safetensors"))
    assert len(files) == 3
    files[1].unlink()  # as an interruption leaves it
    asked = []
    said = teacher._said
    monkeypatch.setattr(teacher, "_said", lambda model, encoder, shard, top: asked.append(len(shard)) or said(
        model, encoder, shard, top))  # fmt: skip
    again = ask(small, rows, tmp_path, on_step=lambda done, total: steps.append((done, total)))
    assert asked == [2] and steps == [(2, 5), (4, 5), (5, 5)] and again.folder == first.folder
    counts = [int((small[1]([each])["labels"] >= 0).sum()) for each in rows]
    for index, count in enumerate(counts):
        for one, other in zip(first.of(index, count), again.of(index, count)):
            assert len(one) == count and np.array_equal(one, other)
    with pytest.raises(SampleError, match="sample 1: got 99 answer tokens"):
        again.of(1, 99)


def test_another_model_data_or_number_is_asked_anew(small, rows, tmp_path):
    model, encoder = small
    folders = {ask(small, rows[:1], tmp_path).folder, ask(small, rows[2:3], tmp_path).folder,
               ask(small, rows[:1], tmp_path, top=3).folder}  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    try:
        folders.add(ask(small, rows[:1], tmp_path).folder)
    finally:
        with torch.no_grad():
            model.lm_head.weight.mul_(0.5)
    folders.add(ask((model, Encoder(encoder.processor, 400)), rows[:1], tmp_path).folder)
    assert len(folders) == 5


def test_what_takes_too_much_room_is_refused(small, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "_SHARD", 2)
    with pytest.raises(SampleError, match="distill: got about .* GiB of the dense model's answers, expected at most"):
        ask(small, rows, tmp_path, most=3000)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1, "told by the first part"


def test_held_out_conversations_have_no_teacher(rows, tmp_path):
    _, done = tuned(rows[:2], tmp_path, distill=0.5, steps=1, held_out=rows[2:], evaluate=1)
    assert [line["step"] for line in done["log"] if "eval_loss" in line] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, 4])
def test_training_towards_the_teacher(lora, rows, tmp_path):
    """Under the dense plan there is nothing to learn from it; under another there is, and less after some steps."""
    tuned(rows, tmp_path / "dense", plan="dense", distill=1.0, steps=1, lora=lora)
    assert losses(tmp_path / "dense")[1] < 1e-3
    early, rate = vis_sparse.VisualPlan.vtw(8, 1), 2e-4 if lora is None else 2e-3
    tuned(rows, tmp_path / "vtw", plan=early, distill=1.0, steps=16, batch=5, lora=lora, rate=rate)
    found = losses(tmp_path / "vtw")
    assert found[1] > 0.1 and found[16] < 0.7 * found[1]
