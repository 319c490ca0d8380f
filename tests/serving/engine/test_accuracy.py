"""Held-out questions to the shipped LLaVA: the engine answers as the transformers executor does, so as often right."""

from vis_sparse.eval.tiny import checkpoint
from vis_sparse.eval.tiny.data import questions
from vis_sparse.eval.tiny.model_llava import prompt

from .harness import Reference, served
from .running import engine

QUESTIONS = 15  # of each kind


def test_answers_to_held_out_questions(tmp_path):
    from vllm import SamplingParams

    folder = served(tmp_path / "llava", checkpoint("llava"))
    against = Reference(folder)
    tokenizer = against.processor.tokenizer
    asked = [one for kind in ("easy_vqa", "place", "count", "exists") for one in questions(kind, QUESTIONS)]
    with engine(folder, tmp_path / "plans", max_num_batched_tokens=512, num_gpu_blocks_override=200) as llm:
        for name in ("dense", "vtw"):
            plan = against.plan(name, {})
            params = SamplingParams(max_tokens=1, temperature=0, extra_args={"vis_sparse_plan": name})
            prompts = [{"prompt": prompt(one.text), "multi_modal_data": {"image": one.image}} for one in asked]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            right = {"engine": 0, "executor": 0}
            for one, output in zip(asked, outputs):
                [token] = output.outputs[0].token_ids
                best = against.logprobs(plan, list(output.prompt_token_ids), [one.image])[-1].argmax().item()
                assert token == best, (name, one.text)
                right["engine"] += tokenizer.decode([token]).strip() == one.answer
                right["executor"] += tokenizer.decode([best]).strip() == one.answer
            assert right["engine"] == right["executor"]
            assert name != "dense" or right["engine"] > 0.8 * len(asked), right
