"""An engine that is told nothing: with the plug-in installed it is the engine without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from vis_sparse.eval.random_checkpoint import random_llava

from .running import Ask, answers, engine, has_its_own_forward, read


def said(folder: Path) -> list:
    with engine(folder, None) as llm:
        assert llm.apply_model(has_its_own_forward) == [True]
        return read(answers(llm, [Ask(i, i % 3, None, prompt_logprobs=5) for i in range(4)]))


def test_without_a_plan_nothing_changes(tmp_path):
    folder = random_llava(tmp_path / "llama")
    # one thread: several add in any order
    for name, plugins in (("without", {"VLLM_PLUGINS": "nothing"}), ("with", {})):
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(folder), str(tmp_path / name)], capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | plugins,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "without").read_text()) == json.loads((tmp_path / "with").read_text())


if __name__ == "__main__":
    from vllm.engine.arg_utils import EngineArgs

    Path(sys.argv[2]).write_text(json.dumps(said(Path(sys.argv[1]))))
    assert hasattr(EngineArgs.create_engine_config, "_vis_sparse") == ("VLLM_PLUGINS" not in os.environ)
