"""What a user gets: `python -m tests.installed dist/*` installs each package in an environment of its own and tries it
from another folder.

The environments borrow the requirements of this one, so that torch is not installed again for each; its editable
install of the project is not among what they borrow.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

TRY = """
import sys
from importlib.metadata import entry_points, files, version

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vis_sparse
from vis_sparse.eval.tiny import checkpoint

assert vis_sparse.__file__.startswith(sys.prefix), vis_sparse.__file__
assert version("vis_sparse") == vis_sparse.__version__
top = {file.parts[0] for file in files("vis_sparse") if ".." not in file.parts}
assert {name for name in top if not name.endswith(".dist-info")} == {"vis_sparse"}, top
assert any(entry.value == "vis_sparse.eval.lmms:manifest" for entry in entry_points(group="lmms_eval.models"))

model = AutoModelForImageTextToText.from_pretrained(checkpoint(), dtype=torch.float32)
processor = AutoProcessor.from_pretrained(checkpoint())
content = [{"type": "image"}, {"type": "text", "text": "how many sevens are there?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=[torch.zeros(3, 96, 96, dtype=torch.uint8)], text=[text], return_tensors="pt")
before = model.generate(**inputs)
vis_sparse.patch(model, "dense")
assert torch.equal(model.generate(**inputs), before)
vis_sparse.patch(model, "yopo-25", heads=checkpoint() / "heads.safetensors")
assert len(model.generate(**inputs)[0]) > inputs["input_ids"].shape[1]
model(**inputs)
report = vis_sparse.inspect(model)
assert report["flops"] < report["flops_dense"]
assert torch.equal(vis_sparse.unpatch(model).generate(**inputs), before)
"""
COMMANDS = ("--version", "plan list", "flops --model llava-1.5-7b --plan dense,auto,yopo-12", "doctor")


def try_package(package: Path, folder: Path) -> None:
    """Install a wheel or an sdist in a new environment in `folder`, and try it there. AssertionError if it fails."""
    venv.create(folder / "env", with_pip=True)
    own = {"platbase": str(folder / "env"), "base": str(folder / "env")}
    site, programs = (Path(sysconfig.get_path(name, "venv", own)) for name in ("purelib", "scripts"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(program: str, *arguments: str) -> str:
        command = [programs / program, *arguments]
        done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, f"{package.name}: {program} {' '.join(arguments)}\n{done.stdout}{done.stderr}"
        return done.stdout

    run("python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(package.resolve()))
    run("python", "-I", "-c", TRY)
    for command in COMMANDS:
        assert run("vis-sparse", *command.split()).strip(), f"{package.name}: vis-sparse {command} printed nothing"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as temporary:
            try_package(Path(argument), Path(temporary))
        print(f"{Path(argument).name}: installed, patched, generated; vis-sparse {', '.join(COMMANDS)}")
