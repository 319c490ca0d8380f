"""The shipped checkpoints (images of broken blocks: layout A) and random ones with other text models."""

import pytest

from vis_sparse.eval.random_checkpoint import TEXT, random_llava
from vis_sparse.eval.tiny import checkpoint

from .harness import TOLERANCE, Reference, farthest, served
from .running import PLACE, Ask, engine, worst

SIZES = {"qwen2_vl": ((96, 96), (88, 128)), "internvl": ((96, 96), (96, 192))}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl", "mistral", "qwen2"])
def test_answers(family, tmp_path):
    if family in TEXT:
        folder = random_llava(tmp_path / family, family)
    else:
        folder = served(tmp_path / family, checkpoint(family))
    against, plans = Reference(folder), tmp_path / "plans"
    place, sizes = PLACE.get(family, "<image>"), SIZES.get(family, ((96, 96),))
    with engine(folder, plans, max_num_batched_tokens=256, num_gpu_blocks_override=400) as llm:
        asks = [
            Ask(i, (1, 2, 0, 1)[i % 4], plan, place=place, sizes=sizes)
            for i, plan in enumerate([None, "mix", "dense", "vtw", "vica", "shortv"])
        ]
        for _ in range(2):
            distance, _ = worst(llm, asks, against, plans)
            assert distance < TOLERANCE
        samples_of_one_prompt(llm, Ask(1, 2, "vica", tail=40, place=place, sizes=sizes, tokens=12), against)


def samples_of_one_prompt(llm, ask, against):
    """Three answers that go different ways: copies of a request must not write over each other's text."""
    params = ask.params
    params.n, params.temperature, params.frequency_penalty = 3, 2.0, 2.0  # no seed: vLLM fails on those of a CPU
    config = against.model.config
    visual = {config.image_token_id, getattr(config, "video_token_id", None)}  # transformers counts them as an image's
    params.allowed_token_ids = [i for i in range(config.get_text_config().vocab_size) if i not in visual]
    [output] = llm.generate([ask.prompt], [params], use_tqdm=False)
    plan = against.plan("vica", {})
    assert len({tuple(each.token_ids) for each in output.outputs}) > 1
    for index in range(3):
        assert farthest(output, ask.pictures, plan, against, index, greedy=False) < TOLERANCE
