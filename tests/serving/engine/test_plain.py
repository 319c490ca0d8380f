"""An engine that is told nothing: with the plug-in installed it is the engine without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vis_sparse.eval.random_checkpoint import random_llava

from .running import Ask, answers, engine, has_its_own_forward, read


def said(folder: Path) -> list:
    with engine(folder, None) as llm:
        assert llm.apply_model(has_its_own_forward) == [True]
        return read(answers(llm, [Ask(i, i % 3, None, prompt_logprobs=5) for i in range(4)]))


def test_without_a_plan_nothing_changes(tmp_path):
    folder = random_llava(tmp_path / "llama")
    alone = subprocess.run(
        [sys.executable, "-m", __name__, str(folder), str(tmp_path / "said.json")], capture_output=True, text=True,
        env=os.environ | {"VLLM_PLUGINS": "nothing"},
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-3000:]
    # threads add in any order, so that last bits differ from run to run
    for theirs, ours in zip(json.loads((tmp_path / "said.json").read_text()), said(folder), strict=True):
        assert theirs[0] == ours[0]
        for one, other in zip([*theirs[1], *theirs[2]], [*ours[1], *ours[2]], strict=True):
            assert one == (other and pytest.approx(other, abs=1e-5))


if __name__ == "__main__":
    from vllm.engine.arg_utils import EngineArgs

    Path(sys.argv[2]).write_text(json.dumps(said(Path(sys.argv[1]))))
    assert not hasattr(EngineArgs.create_engine_config, "_vis_sparse")
