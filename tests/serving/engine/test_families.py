"""The shipped checkpoints (images of broken blocks: layout A) and random ones with other text models."""

import pytest

from vis_sparse.eval.random_checkpoint import TEXT, random_llava
from vis_sparse.eval.tiny import checkpoint

from .harness import TOLERANCE, Reference, served
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
    with engine(folder, plans, max_num_batched_tokens=256, num_gpu_blocks_override=100) as llm:
        asks = [
            Ask(i, (1, 2, 0, 1)[i % 4], plan, place=place, sizes=sizes)
            for i, plan in enumerate([None, "mix", "dense", "vtw", "vica", "shortv"])
        ]
        for _ in range(2):
            distance, _ = worst(llm, asks, against, plans)
            assert distance < TOLERANCE
