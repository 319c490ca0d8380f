"""`vis-sparse doctor`: what is installed, what can run here, and what cannot and why. Bug reports begin with it."""

from __future__ import annotations

import platform

import typer
from rich.console import Console
from rich.table import Table

from .. import __version__
from .options import JsonOption, emit

REQUIRED = ("torch", "transformers", "numpy", "safetensors")  # those whose versions change what a model computes
OPTIONAL = {
    "triton": "backend triton, for CUDA and ROCm devices",
    "accelerate": "load_internvl2 with a device_map; calibrate on several processes",
    "peft": "LoRA adapters on a patched model",
    "llava_torch": "models of the original llava package",
    "pillow": "images: demo, calibrate, search, eval",
    "torchvision": "the image processors of transformers",
    "pyarrow": "calibration data in parquet files",
    "matplotlib": "pictures of demo, and head heat maps",
    "easy-vqa": "data of the shipped models: demo, tiny-train",
    "scikit-learn": "data of the shipped models: demo, tiny-train",
    "lmms-eval": "eval, and its tasks as calibration data",
    "decord": "videos in lmms-eval",
    "pytablewriter": "tables of lmms-eval",
    "sparsevlm": "a method that bench --peers compares with",
    "natten": "kernels that bench kernels compares with",
}


def installed(package: str) -> str | None:
    """The version of a package, None if it is not there. The package is not imported."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def doctor_command(json_file: JsonOption = None) -> None:
    """Versions, devices, backends, model families and optional packages: what runs here, and what does not and why."""
    data: dict = {
        "versions": {"vis_sparse": __version__, "python": platform.python_version()}
        | {name: installed(name) for name in REQUIRED},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "optional": [{"package": name, "version": installed(name), "for": use} for name, use in OPTIONAL.items()],
        "error": None,
    }
    try:
        data |= {**_devices(), **_backends(), "families": _families()}
    except (ImportError, OSError) as error:  # a torch or transformers that does not load is what one comes here for
        data["error"] = f"{type(error).__name__}: {error}"
    emit(data, json_file, lambda console: _draw(console, data))
    if data["error"]:
        raise typer.Exit(1)


def _devices() -> dict:
    """built_for: what torch was compiled for. devices: those that it sees."""
    import torch

    from ..eval.timing import machine_facts

    cpu = machine_facts(torch.device("cpu"))["machine"]
    devices = [{"device": "cpu", "name": f"{cpu['cpu']}, {cpu['cores']} cores, {cpu['threads']} threads of torch"}]
    version = torch.version
    built_for = f"CUDA {version.cuda}" if version.cuda else f"ROCm {version.hip}" if version.hip else "no CUDA or ROCm"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            chip = found.gcnArchName if version.hip else f"sm_{found.major}{found.minor}"
            name = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {chip}"
            devices.append({"device": f"cuda:{index}", "name": name})
    elif (other := torch.accelerator.current_accelerator(check_available=True)) is not None:
        devices.append({"device": str(other), "name": "seen by torch"})
    return {"built_for": built_for, "devices": devices}


def _backends() -> dict:
    """auto: the backend that "auto" stands for. backends: None, or why the backend cannot run here."""
    from ..kernels import BACKENDS, get_backend

    names, refusals = {}, {}
    for name in ("auto", *BACKENDS):
        try:
            names[name], refusals[name] = get_backend(name).name, None
        except (ValueError, ImportError) as error:
            names[name], refusals[name] = None, str(error)
    return {"auto": names["auto"], "backends": refusals}


def _families() -> list[dict]:
    """classes: by name, whether the package that defines them has them."""
    import transformers

    from ..patches import FAMILIES
    from ..patches.original_llava import ORIGINAL_LLAVA

    there = set(dir(transformers))
    rows = []
    for family in FAMILIES:
        original = family is ORIGINAL_LLAVA
        found = {name: installed("llava_torch") is not None if original else name in there for name in family.classes}
        rows.append({"package": "llava_torch" if original else "transformers", "classes": found})
    return rows


def _draw(console: Console, data: dict) -> None:
    console.print(", ".join(f"{name} {found or 'missing'}" for name, found in data["versions"].items()))
    console.print(data["system"])
    if data["error"]:
        console.print(f"\ntorch or transformers does not load: {data['error']}", style="red", markup=False)
    else:
        console.print(f"torch is built for {data['built_for']}")
        _section(console, "Devices", [(True, row["device"], row["name"]) for row in data["devices"]])
        backends = [
            (reason is None, name, f"is {data['auto']} here" if name == "auto" and reason is None else reason or "")
            for name, reason in data["backends"].items()
        ]
        _section(console, "Backends", backends)
        families = [
            (known, name, "" if known else f"not in the installed {row['package']}")
            for row in data["families"]
            for name, known in row["classes"].items()
        ]
        _section(console, "Model classes that patch takes", families)
    packages = [(row["version"] is not None, row["package"], row) for row in data["optional"]]
    rows = [(there, name, f"{row['version'] or 'missing'}: {row['for']}") for there, name, row in packages]
    _section(console, "Optional packages", rows)


def _section(console: Console, title: str, rows: list[tuple[bool, str, str]]) -> None:
    table = Table.grid(padding=(0, 1))
    for there, name, text in rows:
        table.add_row("[green]✓[/]" if there else "[red]✗[/]", name, text)
    console.print(f"\n{title}", style="bold")
    console.print(table)
