"""Fine-tuning: what it trains, writes and goes on from, in every family."""

import json
from contextlib import suppress

import pytest
import torch
from transformers import AutoModelForImageTextToText

import vis_sparse
from vis_sparse import PatchError, PlanError, SampleError
from vis_sparse.calibration.samples import NO_LABEL
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.patches import is_patched
from vis_sparse.training.encoding import Encoder
from vis_sparse.training.finetune import finetune
from vis_sparse.training.records import read_log
from vis_sparse.training.trainer import Collator, Numbered, PlanTrainer

from ..marks import slow_but
from .samples import FAMILIES, conversations, loaded, row

QUICK = dict(steps=2, batch=2, rate=1e-3, log=1, save=100, evaluate=100)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Ragged: several images, several turns, text alone."""
    folder = tmp_path_factory.mktemp("rows")
    return conversations(folder, *(row(1 + n % 3, (1, 2, 0)[n % 3], start=n) for n in range(6)))


def tuned(rows, out, family="llava", plan="yopo-12", **changes):
    model, processor = loaded(family)
    keywords = {name: changes.pop(name) for name in ("held_out", "resume", "on_step") if name in changes}
    calibration = checkpoint(family) / "heads.safetensors"
    done = finetune(
        model, processor, rows, plan, out=out, settings=QUICK | changes, calibration=calibration, **keywords
    )
    return model, done


@torch.no_grad()
def logits(model, family, rows):
    return model.eval()(**{k: v for k, v in Encoder(loaded(family)[1])(rows).items() if k != "labels"}).logits


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", slow_but(["llava"], FAMILIES))
@pytest.mark.parametrize("lora", [None, 4])
def test_what_is_written_is_what_was_trained(family, lora, rows, tmp_path):
    before = parameters(loaded(family)[0])
    model, done = tuned(rows, tmp_path / "out", family, lora=lora)
    again = vis_sparse.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert vis_sparse.inspect(again)["plan"].name == done["plan"] == "yopo-12"
    assert vis_sparse.inspect(again)["plan"] == vis_sparse.inspect(model)["plan"]
    exact = dict(atol=0, rtol=0) if lora is None else dict(atol=1e-4, rtol=1e-4)  # merged
    torch.testing.assert_close(logits(again, family, rows[:2]), logits(model, family, rows[:2]), **exact)
    changed = {name for name, p in again.named_parameters() if not torch.equal(p, before[name])}
    tower = {name for name in before if "vision_tower" in name or ".visual." in name and "merger" not in name}
    assert tower and not changed & tower
    projector = {name for name in before if "projector" in name or "merger" in name}
    assert projector and projector <= changed
    linears = {name for name in before if "language_model.layers" in name and name.endswith("proj.weight")}
    assert linears <= changed
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"log.jsonl", "finetune.json", "chat_template.jinja", "tokenizer.json"} <= names
    assert ("vis_sparse.json" in names) == (lora is not None) and ("model.safetensors" in names) == (lora is None)
    assert done["trained_parameters"] < done["parameters"]


def test_the_projector_stays_if_asked(rows, tmp_path):
    before = parameters(loaded()[0])
    model, _ = tuned(rows, tmp_path, projector=False)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("language_model" in name for name in changed)


def test_an_adapter_without_the_projector(rows, tmp_path):
    tuned(rows, tmp_path, lora=2, projector=False)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["modules_to_save"] is None and settings["r"] == 2 and settings["lora_alpha"] == 4


def losses(out):
    return {line["step"]: line["loss"] for line in read_log(out / "log.jsonl") if "loss" in line}


@pytest.mark.parametrize("lora", slow_but([None], [None, 4]))
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(lora, rows, tmp_path):
    """Killed after the fourth step, two behind a checkpoint; shuffled data, warm-up, decay, an optimizer's moments."""

    def killed(done, total):
        if done == 4:
            raise KeyboardInterrupt

    settings = dict(steps=6, save=2, lora=lora, accumulate=2)
    torch.manual_seed(len(rows[0].messages))  # what a process has drawn before is nobody's business
    whole, _ = tuned(rows, tmp_path / "whole", **settings)
    torch.manual_seed(99)
    with suppress(KeyboardInterrupt):
        tuned(rows, tmp_path / "parts", **settings, on_step=killed)
    assert list(losses(tmp_path / "parts")) == [1, 2, 3]
    with pytest.raises(PatchError, match="with a training in it, expected resume"):
        tuned(rows, tmp_path / "parts", **settings)
    with pytest.raises(PlanError, match="rate: got 0.5, expected 0.001"):
        tuned(rows, tmp_path / "parts", **settings | dict(rate=0.5), resume=True)
    parts, done = tuned(rows, tmp_path / "parts", **settings, resume=True)
    expected = losses(tmp_path / "whole")
    assert losses(tmp_path / "parts") == expected
    assert list(expected) == [1, 2, 3, 4, 5, 6] and len(set(expected.values())) == 6
    for (name, expected), found in zip(parameters(whole).items(), parameters(parts).values(), strict=True):
        assert torch.equal(found, expected), name
    seconds = [line["seconds"] for line in done["log"]]
    assert seconds == sorted(seconds)


def test_evaluation_before_and_along_the_way(rows, tmp_path):
    _, done = tuned(rows, tmp_path, held_out=rows[:3], evaluate=1)
    measured = [line for line in done["log"] if "eval_loss" in line]
    assert [line["step"] for line in measured] == [0, 1, 2]
    (dense,) = (line for line in done["log"] if "dense_loss" in line)
    model, processor = loaded()
    assert dense["dense_loss"] != measured[0]["eval_loss"]
    counts = right = answers = 0
    for conversation in rows[:3]:
        inputs = Encoder(processor)([conversation])
        labels = inputs.pop("labels")[0, 1:]
        with torch.no_grad():
            likeliest = model.eval()(**inputs).logits[0, :-1].argmax(-1)
        own = (likeliest == labels)[labels != NO_LABEL]
        answers, right, counts = answers + float(own.all()), right + float(own.float().mean()), counts + 1
    assert dense["dense_answers_right"] == pytest.approx(answers / counts)
    assert dense["dense_tokens_right"] == pytest.approx(right / counts)


# The loss


def trainer_of(model, processor, tmp_path, **arguments):
    from vis_sparse.training.finetune import _arguments
    from vis_sparse.training.settings import Settings

    return PlanTrainer(
        model, _arguments(tmp_path, Settings(**arguments), model, 4, False), data_collator=Collator(Encoder(processor))
    )


@pytest.mark.parametrize("plan", ["yopo-12", "fastv", None])
def test_the_loss_is_transformers_own(plan, rows, tmp_path):
    """Of the answers' rows alone, and with the same gradients: the LM head over all rows says no more."""
    model, processor = loaded()
    if plan is not None:
        vis_sparse.patch(model, plan, heads="first")
    trainer = trainer_of(model, processor, tmp_path)
    if plan == "fastv":  # the prompt's last row ranks all tokens: none may come in a later turn
        rows = [each for each in rows if len(each.images) < 2]
    inputs = Encoder(processor)(rows)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with_labels = model(**inputs, use_cache=False).loss
    expected = gradients(with_labels)
    trainer.model.train()
    found = trainer.compute_loss(model, inputs)
    torch.testing.assert_close(found, with_labels)
    for name, gradient in gradients(found).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    half = trainer.compute_loss(model, inputs, num_items_in_batch=2 * (inputs["labels"] != NO_LABEL).sum())
    torch.testing.assert_close(2 * half, found)


def test_batches_in_parts_are_the_batch(rows, tmp_path):
    """Answers of several lengths: a step's loss is the mean over all its tokens."""
    one, _ = tuned(rows, tmp_path / "one", batch=6, steps=1)
    parts, _ = tuned(rows, tmp_path / "parts", batch=2, accumulate=3, steps=1)
    assert losses(tmp_path / "one")[1] == pytest.approx(losses(tmp_path / "parts")[1], rel=1e-5)
    for name, p in parts.named_parameters():
        torch.testing.assert_close(p, one.get_parameter(name), atol=1e-5, rtol=1e-5, msg=name)


def test_a_batch_without_answers_trains_nothing(rows, tmp_path):
    model, processor = loaded()
    inputs = Encoder(processor)(rows[:1])
    inputs["labels"].fill_(NO_LABEL)
    loss, out = trainer_of(vis_sparse.patch(model), processor, tmp_path).compute_loss(model, inputs, True)
    assert loss.item() == 0 and out["right"].shape == (1, 2)


# Settings


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(steps=0), "steps: got 0"), (dict(batch=1.5), "batch: got 1.5"), (dict(distill=2), "distill: got 2"),
        (dict(rate=0), "rate: got 0"), (dict(epochs=-1), "epochs: got -1"), (dict(autocast="int8"), "autocast: got"),
        (dict(lora=True), "lora: got True"), (dict(optimizer="adm"), "optimizer: got 'adm'"),
        (dict(top=None), "top: got None"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes, message, rows, tmp_path):
    with pytest.raises(PlanError, match=message):
        tuned(rows, tmp_path, **changes)


def test_what_does_not_go_together_is_told_before_training(rows, tmp_path):
    with pytest.raises(PlanError, match="no head scores"):
        model, processor = loaded()
        finetune(model, processor, rows, "yopo-12", out=tmp_path / "a", settings=QUICK)
    assert not is_patched(model)
    with pytest.raises(SampleError, match="got an image after token 20"):
        tuned(rows, tmp_path / "b", most_tokens=20)
    assert not (tmp_path / "b").exists()


def test_a_checkpoints_own_plan_is_the_default(rows, tmp_path):
    tuned(rows, tmp_path / "first", steps=1)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "first", dtype=torch.float32)
    done = finetune(model, loaded()[1], rows, out=tmp_path / "second", settings=QUICK | dict(steps=1))
    assert done["plan"] == "yopo-12"


def test_numbers_of_conversations_reach_the_collator(rows):
    data = Numbered(rows)
    assert len(data) == 6 and data[4] == (4, rows[4])
    assert Numbered(rows, held_out=True)[4] == (None, rows[4])
