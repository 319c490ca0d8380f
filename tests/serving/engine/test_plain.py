"""An engine that is told nothing: with the plug-in installed it is the engine without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from vllm.engine.arg_utils import EngineArgs

from vis_sparse.eval.random_checkpoint import random_llava

from .running import Ask, answers, engine, has_its_own_forward, read


def said(folder: Path) -> list:
    with engine(folder, None) as llm:
        assert llm.apply_model(has_its_own_forward) == [True]
        return read(answers(llm, [Ask(i, i % 3, None, prompt_logprobs=5) for i in range(4)]))


def test_without_a_plan_nothing_changes(tmp_path):
    """To the last bit, on one thread as all tests here: several add in any order."""
    folder, file = random_llava(tmp_path / "llama"), tmp_path / "without.json"
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder), str(file)], capture_output=True, text=True,
        env=os.environ | {"VLLM_PLUGINS": "nothing"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = said(folder)
    assert hasattr(EngineArgs.create_engine_config, "_vis_sparse")
    assert found == json.loads(file.read_text())


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(said(Path(sys.argv[1]))))
    assert not hasattr(EngineArgs.create_engine_config, "_vis_sparse")
