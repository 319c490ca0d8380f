"""Training of the deep model: its decoder is transformers' own, its packed sequences are chats one by one."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import vis_sparse
from vis_sparse.eval.deep import adapter_files, cut_adapter
from vis_sparse.eval.deep import probe as probing
from vis_sparse.eval.deep import sequences as packing
from vis_sparse.eval.deep.answers import KINDS, Answers, Asked, examined, kinds_of, likeliest, right_of
from vis_sparse.eval.deep.decoder import LINEARS, SCALE, Decoder, place_of
from vis_sparse.eval.deep.export import difference, restored, weights_of
from vis_sparse.eval.deep.planned import PlannedDecoder
from vis_sparse.eval.deep.projector import new_projector, projected
from vis_sparse.eval.deep.run import Run, Schedule
from vis_sparse.eval.deep.sequences import NO_LABEL, Writer, sequences
from vis_sparse.eval.deep.vision import CLASSES, EARLY_CLASSES, labels_of
from vis_sparse.eval.deep.vision import NO_LABEL as UNKNOWN
from vis_sparse.eval.tiny import data, smol_files
from vis_sparse.eval.tiny.dialogs import Turn
from vis_sparse.eval.tiny.reading import WORDS, full_page, page
from vis_sparse.plans.budgets import resolve_heads
from vis_sparse.plans.carried import plans_of_folder
from vis_sparse.plans.files import as_plan
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.plans.schedule import schedule


def small() -> tuple[LlamaForCausalLM, Decoder]:
    """A Llama with random differences merged, and a training decoder with the same ones beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    decoder = Decoder(config, model.state_dict(), torch.float32)
    with torch.no_grad():
        for parameter in decoder.lora.values():
            parameter.normal_(std=0.1)
        decoder.refresh()
        for number, layer in enumerate(model.model.layers):
            for name in LINEARS:
                a, b = (decoder.lora[f"{number}-{name}-{side}"] for side in "ab")
                layer.get_submodule(place_of(name)).weight += SCALE * b @ a
    return model, decoder


def test_the_training_decoder_and_its_gradients_are_those_of_the_merged_model():
    model, decoder = small()
    ids = torch.randint(0, 100, (2, 41))
    visible = torch.ones(1, 1, 41, 41, dtype=torch.bool).tril()
    logits = decoder.logits(decoder(decoder.embeddings[ids], torch.arange(41).expand(2, -1), visible))
    expected = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    for number, layer in enumerate(model.model.layers):
        for name in LINEARS:
            grad = layer.get_submodule(place_of(name)).weight.grad
            a, b = (decoder.lora[f"{number}-{name}-{side}"] for side in "ab")
            torch.testing.assert_close(a.grad, SCALE * b.T @ grad, rtol=1e-3, atol=1e-5 * a.grad.abs().max().item())
            torch.testing.assert_close(b.grad, SCALE * grad @ a.T, rtol=1e-3, atol=1e-5 * b.grad.abs().max().item())


@pytest.fixture(scope="module")
def tokenizer():
    """One id a character, and SmolLM2's ends."""
    special = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    letters = {chr(i): i for i in range(10, 127)} | {"\n": 9}
    model = Tokenizer(models.WordLevel(special | letters, unk_token="<|endoftext|>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )


def test_slots_give_the_logits_of_dialogs_alone(tokenizer, monkeypatch):
    """Two dialogs in one sequence, and each of them in a chat of its own."""
    monkeypatch.setattr(packing, "LENGTH", 120)
    monkeypatch.setattr(packing, "_CACHE", {})
    model, decoder = small()
    beginning = [1, 30, 31, 32]
    dialogs = [[Turn("what is it?", "ab", "x"), Turn("and that?", "c", "x")], [Turn("why?", "d", "x")]]
    writer = Writer(tokenizer, beginning)
    assert all(writer.add(dialog) for dialog in dialogs)
    ids, targets, positions, slots, weights = (torch.tensor(row)[None] for row in writer.rows())
    together = packing.Sequences(ids, targets, positions, slots, weights, (), (writer.turns,))
    logits = decoder.logits(decoder(decoder.embeddings[ids % 100], positions, together.visible()))
    assert ((targets != NO_LABEL) == (weights > 0)).all()
    start = len(beginning)
    for number, dialog in enumerate(dialogs):
        alone = Writer(tokenizer, beginning)
        alone.add(dialog)
        expected = model(torch.tensor([alone.ids]) % 100).logits
        at = (slots[0] == number).nonzero()[:, 0]
        torch.testing.assert_close(logits[0, at], expected[0, start:], rtol=1e-4, atol=1e-5)
        for (turn, _, first, after), (_, _, first_together, after_together) in zip(
            alone.turns, [turns for turns in writer.turns if turns[0] in dialog], strict=True
        ):
            wanted = [*tokenizer(turn.answer)["input_ids"], tokenizer.eos_token_id]
            assert targets[0, first_together:after_together].tolist() == wanted
            assert alone.rows()[1][first:after] == wanted


def test_a_sequence_holds_many_turns_and_no_held_out_image(tokenizer):
    found = sequences(tokenizer, np.random.default_rng(0), ("grid", "page", "shape", "chat"), [("hello?", [50, 51, 2])])
    assert found.ids.shape == found.targets.shape == (4, packing.LENGTH)
    assert len(found.images) == 3 and (found.weights[:3] > 0).any(dim=1).all()
    assert [places.sum() for places in packing.visual_places(found.ids)] == [144, 144, 144, 0]
    assert {tuple(line.box[i] % 2 for i in (0, 1)) for line in found.images[1].lines} == {(0, 0)}


def test_tokens_are_labelled_with_what_lies_under_them():
    rng = np.random.default_rng(0)
    shown = page(rng, "train", WORDS)
    labels = labels_of(shown)
    for number, line in enumerate(shown.lines):
        left, top, right, bottom = line.box
        token = (top + bottom) // 2 // 8 * 12 + (left + right) // 2 // 8
        assert CLASSES["word"][labels["word"][token]] == line.word
        assert labels["line"][token] == number and labels["lines"][token] == len(shown.lines)
        assert EARLY_CLASSES["letter"][labels["letter"][token]] in line.word
        assert "".join(CLASSES["letter_0"][labels[f"letter_{i}"][token]] for i in range(len(line.word))) == line.word
    assert (labels["digit"] == UNKNOWN).all()
    assert (labels_of(full_page(rng, WORDS))["line"] == UNKNOWN).all()
    scene = data.grid_scene(rng, 1)
    labels = labels_of(scene)
    cells = [CLASSES["digit"][labels["digit"][(cell // 3 * 4 + 1) * 12 + cell % 3 * 4 + 2]] for cell in range(9)]
    assert tuple(cells) == scene.cells
    assert all((labels[f"many_{digit}"] == scene.cells.count(digit)).all() for digit in data.DIGITS)


def test_rates_follow_the_time_that_is_spent():
    schedule = Schedule(10, warmup=0.1, decay=0.4, last=0.0)
    assert [round(schedule.factor(at), 6) for at in (0.05, 0.1, 0.6, 0.8, 1.0)] == [0.5, 1.0, 1.0, 0.5, 0.0]


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    def run(folder) -> tuple[Run, torch.nn.Linear]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        schedule = Schedule(1e9, warmup=1e-30)  # no step's rate depends on the clock
        return Run(folder, schedule, [(0.1, dict(layer.named_parameters()))]), layer

    def steps(run, layer, number):
        for _ in range(number):
            rows = torch.from_numpy(np.random.default_rng(run.step).normal(size=(4, 5))).float()
            values = run.advance(lambda rows=rows: {"loss": layer(rows).square().mean()})
            run.log(loss=values["loss"])

    straight = run(tmp_path / "straight")
    steps(*straight, 4)
    stopped = run(tmp_path / "stopped")
    steps(*stopped, 2)
    stopped[0].save()
    steps(*stopped, 1)  # lost: not saved
    resumed = run(tmp_path / "stopped")
    assert resumed[0].step == 2
    steps(*resumed, 2)
    for a, b in zip(straight[1].parameters(), resumed[1].parameters(), strict=True):
        assert torch.equal(a, b)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("straight", "stopped")]
    assert [log.count('"loss"') for log in logs] == [4, 4]


def test_what_is_exported_merges_to_what_was_trained(tmp_path):
    model, decoder = small()
    parameters = {f"lora.{name}": parameter for name, parameter in decoder.lora.items()}
    parameters |= {"tower.pre_layrnorm.weight": torch.nn.Parameter(torch.ones(4))}
    parameters |= {"projector.linear_1.bias": torch.nn.Parameter(torch.rand(4))}
    run = Run(tmp_path / "whole", Schedule(1), [(1e-3, parameters)])
    run.save()
    weights = weights_of(tmp_path, "whole")
    found = difference(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    merged = smol_files.merged(name, decoder.weights[6][128:, :96], found)
    torch.testing.assert_close(merged, model.state_dict()[name], rtol=1e-5, atol=1e-5)
    assert smol_files.merged("model.norm.weight", torch.ones(3), found).tolist() == [1, 1, 1]
    assert "vision_tower.vision_model.pre_layrnorm.weight" in found
    assert math.isclose(found["lora.model.layers.0.self_attn.q_proj.b"].std(), SCALE * 0.1, rel_tol=0.1)
    again = restored(found)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], parameter) for name, parameter in parameters.items())


def small_llava() -> LlavaForConditionalGeneration:
    """With 6 x 6 visual tokens, which are its word 4."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=60, hidden_size=96, intermediate_size=128, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    vision = CLIPVisionConfig(
        image_size=24, patch_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=4,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    ).eval()


def logits_under(plan: VisualPlan, llava, state: dict[str, torch.Tensor], patched) -> tuple[torch.Tensor, torch.Tensor]:
    """Of text after an image: of the training decoder with `state`'s weights, and of `patched` under the plan."""
    config = llava.config.text_config
    work = schedule(plan, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    decoder = PlannedDecoder(work, slice(3, 39), 6, config, state, torch.float32)
    ids = torch.randint(5, 60, (2, 50))
    ids[:, 3:39] = 4
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        visual = torch.stack(list(llava.get_image_features(pixel_values=pixels).pooler_output))
        embedded = decoder.embeddings[ids].masked_scatter((ids == 4)[..., None], visual)
        visible = torch.ones(2, 1, 50, 50, dtype=torch.bool).tril()
        logits = decoder.logits(decoder(embedded, torch.arange(50).expand(2, -1), visible))
        with vis_sparse.patched(patched, plan):
            return logits[:, 39:], patched(input_ids=ids, pixel_values=pixels).logits[:, 39:]


def text_state(llava) -> dict[str, torch.Tensor]:
    return {f"model.{key}": value for key, value in llava.model.language_model.state_dict().items()}


@pytest.mark.parametrize("name", ["dense", "hollow", "yopo-25", "vica", "cut"])
def test_the_decoder_under_a_plan_is_the_patched_model(name):
    llava = small_llava()
    cut = VisualPlan.vtw(8, 3)
    plan = resolve_heads(as_plan(cut if name == "cut" else name, 8), 6, 2, heads="first")
    found, expected = logits_under(plan, llava, text_state(llava), llava)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_read_as_peft_reads_it(tmp_path):
    llava = small_llava()
    plan = resolve_heads(as_plan("yopo-12", 8), 6, 2, heads="first")
    trained = Decoder(llava.config.text_config, text_state(llava), torch.float32, rank=3)
    projector = new_projector(16, 96)
    own = llava.model.multi_modal_projector
    projector.load_state_dict(own.state_dict())
    added = adapter_files.with_difference(projector)
    pixels = torch.randn(2, 36, 16)
    torch.testing.assert_close(projected(projector, pixels), own(pixels))
    with torch.no_grad():
        for parameter in (*trained.lora.values(), *added.values()):
            parameter.normal_(std=0.1)
    name = "lora.model.layers.5.self_attn.k_proj"
    fitted = {f"{name}.a": torch.randn(2, 96), f"{name}.b": torch.randn(32, 2)}
    adapter_files.write(tmp_path, trained, added, plan, fitted)
    difference = smol_files.adapter_difference(tmp_path)
    state = {key: smol_files.merged(key, value, difference) for key, value in text_state(llava).items()}
    both = text_state(llava)["model.layers.5.self_attn.k_proj.weight"] + fitted[f"{name}.b"] @ fitted[f"{name}.a"]
    both += SCALE * trained.lora["5-k_proj-b"] @ trained.lora["5-k_proj-a"]
    torch.testing.assert_close(state["model.layers.5.self_attn.k_proj.weight"], both, rtol=1e-2, atol=1e-2)
    changed = "model.layers.7.mlp.down_proj.weight"
    assert not torch.equal(state[changed], text_state(llava)[changed])
    peft = PeftModel.from_pretrained(llava, tmp_path).eval()
    assert plans_of_folder(tmp_path) == {"yopo-12": plan}
    merged = new_projector(16, 96)
    merged.load_state_dict(small_llava().model.multi_modal_projector.state_dict())
    adapter_files.merge(merged, difference)
    for found in (projected(projector, pixels), projected(merged, pixels)):
        torch.testing.assert_close(found, peft.model.model.multi_modal_projector(pixels), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(projected(merged, pixels), small_llava().model.multi_modal_projector(pixels), atol=1e-2)
    # rounded to fp16 in the file
    found, expected = logits_under(plan, llava, state, peft)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_cut_adapter_adds_the_best_of_that_rank(tmp_path):
    llava = small_llava()
    trained = Decoder(llava.config.text_config, text_state(llava), torch.float32, rank=5)
    with torch.no_grad():
        for parameter in trained.lora.values():
            parameter.normal_(std=0.3)
    projector = adapter_files.with_difference(new_projector(16, 96))
    adapter_files.write(tmp_path, trained, projector, VisualPlan.dense(8), {})
    before = smol_files.adapter_difference(tmp_path)
    rows = torch.randn(200, 96, dtype=torch.float64) * torch.linspace(0.1, 3, 96)
    cut_adapter.cut(tmp_path, {6: rows.T @ rows}, 2)
    after = smol_files.adapter_difference(tmp_path)

    def added(difference, name):
        key = f"lora.model.layers.{name}"
        return rows @ (difference[f"{key}.b"] @ difference[f"{key}.a"]).double().T

    for name in ("6.self_attn.k_proj", "6.self_attn.v_proj"):
        assert after[f"lora.model.layers.{name}.a"].shape == (2, 96)
        left = torch.linalg.svdvals(added(before, name))[2:].square().sum()
        torch.testing.assert_close((added(before, name) - added(after, name)).square().sum(), left, rtol=2e-2, atol=0)
    untouched = {key for key in before if ".6.self_attn.k_" not in key and ".6.self_attn.v_" not in key}
    assert all(torch.equal(before[key], after[key]) for key in untouched) and len(untouched) == len(before) - 4
    PeftModel.from_pretrained(llava, tmp_path)


def planned_decoder(plan: VisualPlan) -> PlannedDecoder:
    """Of three layers, for 9 visual tokens after two others."""
    _, decoder = small()
    state = LlamaForCausalLM(decoder.config).state_dict()
    return PlannedDecoder(schedule(plan, 6, 2, 128), slice(2, 11), 3, decoder.config, state, torch.float32)


def test_layers_that_plans_have_in_common_are_computed_once():
    decoder = planned_decoder(VisualPlan.dense(3))
    embedded, positions = torch.randn(1, 20, 96), torch.arange(20)[None]
    visible = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    kept = []
    with torch.no_grad():
        decoder.rest(decoder.lanes(embedded), positions, visible, kept=kept)
        decoder.work = schedule(VisualPlan.vtw(3, 1), 6, 2, 128)
        whole = decoder(embedded, positions, visible)
        assert len(kept) == 3
        for first in (0, 1):  # what its first layer does to text is what the dense plan's does
            assert torch.equal(decoder.rest(kept[first], positions, visible, first=first), whole)
        assert not torch.equal(decoder.rest(kept[2], positions, visible, first=2), whole)


def test_tokens_are_the_likeliest_where_bf16_ties():
    _, decoder = small()
    words = torch.randn(50, 96)
    decoder.embeddings = torch.cat([words, words * (1 + 2**-8)]).to(torch.bfloat16)
    hidden = torch.randn(200, 96).to(torch.bfloat16)
    exact = hidden.double() @ decoder.embeddings.double().t()
    assert torch.equal(likeliest(decoder, hidden), exact.argmax(dim=1))
    assert not torch.equal(decoder.logits(hidden).argmax(dim=1), exact.argmax(dim=1))


def test_answers_are_held_against_each_other_question_by_question(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(packing, "_CACHE", {})
    monkeypatch.setattr(packing, "LENGTH", 1200)  # a letter is a token here
    data = sequences(tokenizer, np.random.default_rng(0), ("page", "grid"), (), split="test", asked=examined)
    turns = [turn for row in data.turns for turn in row]
    kinds, tokens = kinds_of(data), data.targets[data.targets != NO_LABEL]
    assert len(kinds) == len(turns) and {"reading", "later"} <= {KINDS[int(kind)] for kind in kinds}
    wrong = tokens.clone()
    wrong[0] += 1
    assert right_of(data, tokens) == "1" * len(turns) and right_of(data, wrong) == "0" + "1" * (len(turns) - 1)
    answers = Answers("00899", {"dense": "10111", "bold": "010"}, {"dense": 1.0, "bold": 0.1})
    answers.save(tmp_path / "a.json")
    assert Answers.load(tmp_path / "a.json") == answers
    assert answers.of("dense", "later").tolist() == [True, True, True]
    assert answers.of("dense", "leaning").tolist() == [True, True]
    assert answers.of("dense", "later", "bold").tolist() == [True]
    assert answers.of("bold", "easy_vqa", "dense").tolist() == [False, True]


def test_a_search_sees_what_plans_change_about_each_answer(monkeypatch):
    """The probe of packed questions against a forward of its own for each plan."""
    decoder, batches = planned_decoder(VisualPlan.dense(3)), []
    spans = {"place": (12, 14), "reading": (15, 18), "later": (18, 19)}
    for seed in range(2):
        ids = torch.randint(0, 100, (1, 20), generator=torch.Generator().manual_seed(seed))
        targets = torch.full((1, 20), NO_LABEL)
        turns = [(Turn("", "", kind), int(kind == "later"), *span) for kind, span in spans.items()]
        for start, end in spans.values():
            targets[0, start:end] = ids[0, start + 1 : end + 1]
        parts = torch.arange(20)[None], torch.zeros(1, 20, dtype=torch.long), torch.ones(1, 20)
        data = packing.Sequences(ids, targets, *parts, (), (turns,))
        batches.append(Asked(data, decoder.embeddings[ids].float()))
    monkeypatch.setattr(probing, "asked", lambda model, seed, *others: batches[seed[1]])
    monkeypatch.setattr(probing, "work_of", lambda plan: schedule(plan, 6, 2, 128))
    probe = probing.PackedProbe(SimpleNamespace(decoder=decoder), 2)
    assert probe.num_samples == 6

    def log_probabilities(plan, batch):
        decoder.work = schedule(plan, 6, 2, 128)
        with torch.no_grad():
            return decoder.logits(decoder(batch.embedded, *batch.inputs)).float().log_softmax(-1)[0]

    def expected(plan, chosen):
        by_kind = {kind: [] for kind in spans}
        for batch in chosen:
            own, dense = (log_probabilities(each, batch) for each in (plan, VisualPlan.dense(3)))
            each = (dense.exp() * (dense - own)).sum(-1)
            for kind, (start, end) in spans.items():
                by_kind[kind].append(float(each[start:end].mean()))
        return np.mean([np.mean(values) for values in by_kind.values()])

    cut, still = VisualPlan.vtw(3, 1), VisualPlan.shortv(3, [1, 2])
    for start in (VisualPlan.dense(3), still):
        probe.adopt(start)
        for plan in (cut, still):
            assert probe.measure(plan)[0] == pytest.approx(expected(plan, batches), abs=1e-4)
            assert probe.measure(plan, 2)[0] == pytest.approx(expected(plan, batches[:1]), abs=1e-4)
    assert expected(cut, batches) > 1e-3  # ten times that
