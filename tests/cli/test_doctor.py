"""`vis-sparse doctor` and `--version`: true of this machine, quick to start, and of use where torch does not load."""

import json
import os
import subprocess
import sys
from importlib.metadata import requires, version

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vis_sparse
from vis_sparse.cli import doctor
from vis_sparse.kernels import BACKENDS, get_backend
from vis_sparse.patches import FAMILIES

from .test_cli import example_of, read_json, run


@pytest.fixture(scope="module")
def report():
    return read_json("doctor")


def test_version():
    assert run("--version").stdout == f"vis-sparse {vis_sparse.__version__}\n"


def test_versions_are_the_installed_ones(report):
    assert report["versions"]["vis_sparse"] == vis_sparse.__version__
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    for name in ("torch", "transformers", "numpy", "safetensors"):
        assert report["versions"][name] == version(name)
    assert report["devices"][0]["device"] == "cpu"
    assert len(report["devices"]) == 1 + torch.accelerator.device_count()


def test_a_backend_runs_or_says_what_it_lacks(report, monkeypatch):
    assert report["auto"] == get_backend().name
    assert list(report["backends"]) == ["auto", *BACKENDS]
    for name, reason in report["backends"].items():
        if reason is None:
            assert callable(get_backend(name).text_attention)
        else:
            with pytest.raises(ValueError) as refusal:
                get_backend(name)
            assert str(refusal.value) == reason
    assert report["backends"]["reference"] is None and report["backends"]["torch"] is None
    monkeypatch.setenv("VIS_SPARSE_BACKEND", "cuda")
    wrong = read_json("doctor")
    assert wrong["auto"] is None and wrong["backends"]["auto"].startswith("backend: got 'cuda'")


def test_families_are_those_of_patch(report):
    import transformers

    classes = {name: known for row in report["families"] for name, known in row["classes"].items()}
    assert list(classes) == [name for family in FAMILIES for name in family.classes]
    assert classes["Qwen3VLModel"] == hasattr(transformers, "Qwen3VLModel")


def test_a_family_that_transformers_lacks_is_said_so(monkeypatch):
    import transformers

    monkeypatch.setattr(type(transformers), "__dir__", lambda self: ["LlavaModel"])
    classes = {name: known for row in doctor._families() for name, known in row["classes"].items()}
    assert classes["LlavaModel"] and not classes["Qwen2VLModel"]


def test_every_extra_is_among_the_optional_packages(report):
    named = {canonicalize_name(row["package"]) for row in report["optional"]}
    for requirement in map(Requirement, requires("vis_sparse")):
        extras = [{"extra": extra} for extra in ("demo", "eval", "train")]
        if requirement.marker and any(map(requirement.marker.evaluate, extras)):
            assert canonicalize_name(requirement.name) in named, requirement.name
    for row in report["optional"]:
        assert row["version"] == doctor.installed(row["package"]) and row["for"]


def test_the_text_says_the_same():
    printed = " ".join(run("doctor").stdout.split())
    assert f"torch {version('torch')}" in printed
    assert "✓ LlavaForConditionalGeneration" in printed
    assert f"✓ matplotlib {version('matplotlib')}: " in printed
    assert example_of("doctor") == ["doctor", "--json", "report.json"]


def test_a_torch_that_does_not_load_is_reported_without_a_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    command = [sys.executable, "-m", "vis_sparse", "doctor"]
    broken = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run([*command, "--json", "-"], env=broken, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "")
    report = json.loads(result.stdout)
    assert report["error"] == "ImportError: libcudart.so.13: cannot open shared object file"
    assert report["versions"]["torch"] == version("torch") and report["optional"]
    result = subprocess.run(command, env=broken, capture_output=True, text=True)
    assert result.returncode == 1 and "does not load: ImportError: libcudart" in " ".join(result.stdout.split())
