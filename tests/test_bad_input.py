"""Malformed inputs over every loader and command: refused in one line that names the thing, with nothing left behind.

A mutation may leave an input valid; then it is taken. What counts are those that are refused, and each part says how
many at least.
"""

import io
import json
import math
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors
from transformers import AutoProcessor
from typer.testing import CliRunner

import vis_sparse
from vis_sparse.calibration.records import Record, SampleError, read_records
from vis_sparse.calibration.samples import encode
from vis_sparse.checkpoints.errors import CheckpointError
from vis_sparse.checkpoints.internvl2 import convert_internvl2, load_internvl2
from vis_sparse.cli.main import app
from vis_sparse.cost.shape_lookup import load_shape
from vis_sparse.eval.tiny import checkpoint
from vis_sparse.layout.image_grids import ShapeError
from vis_sparse.patches.errors import PatchError
from vis_sparse.plans.budgets import load_heads
from vis_sparse.plans.files import load_plan
from vis_sparse.plans.layer_plan import PlanError
from vis_sparse.plans.plan import VisualPlan
from vis_sparse.plans.scores import Calibration

from .bad_inputs import WORDS, broken, mutated
from .checkpoints.test_internvl2 import original
from .eval.test_report import BENCH, PEERS, eval_row
from .marks import slow_but
from .models import HEADS, IMAGE, LAYERS, make_batch, make_model

HEADS_FILE = checkpoint() / "heads.safetensors"


class Refusals:
    """Counts what is refused, and collects what is not as it should be."""

    def __init__(self, expected: type[Exception] | tuple):
        self.expected, self.count, self.wrong = expected, 0, []

    def __call__(self, given, call, names: str = "") -> bool:
        """Whether `call()` refuses `given`. names: what the message has to name."""
        try:
            call()
            return False
        except self.expected as error:
            said = str(error)
            if "\n" in said or not said or names not in said or len(said) > 6000:
                self.wrong.append((f"said {said[:300]!r}", given))
            self.count += 1
            return True
        except Exception as error:
            self.wrong.append((f"{type(error).__name__}: {str(error)[:200]}", given))
            return True

    def check(self, least: int) -> None:
        assert not self.wrong, f"{len(self.wrong)}, such as " + "\n".join(
            f"{what} for {str(given)[:300]}" for what, given in self.wrong[:12]
        )
        assert self.count >= least, f"only {self.count} were refused"


# Plans

PLAN = {
    "name": "mine",
    "about": "a plan",
    "semantics": "exclude",
    "num_layers": LAYERS,
    "default": {"attention": {"radius": 1, "direction": "both", "frames": 0, "stride": 1}, "ffn": 0.5},
    "layers": {
        "0": {"heads": [True] * HEADS, "ffn": [0, 3, 4], "text_reads": True},
        "1-2": {"heads": {"keep": 0.5, "by": "group", "over": "model"}, "ffn": {"keep": 4}},
        "50%-": {"tokens": {"keep": 0.5, "by": "norm"}},
        "<50%": {"attention": "none", "heads": {"file": "mask.npy"}},
        "2-": "off",
    },
}
DEEP = 5000
PLAN_TEXTS = {
    "nothing": "", "a word": "plan", "a list": "- 1\n- 2\n", "a number": "3: 4", "null": "null:\n",
    "tabs": "\tname: x\n",
    "two documents": "name: a\n---\nname: b\n", "a python object": "name: !!python/object/apply:os.system ['true']\n",
    "deep lists": "layers: " + "[" * DEEP + "]" * DEEP, "deep mappings": "layers: " + "{a: " * DEEP + "}" * DEEP,
    "an anchor of itself": "layers: &a {0: *a}\n", "a list of itself": "default: {ffn: &a [*a]}\n",
    "laughs": "\n".join(["a: &a0 [x, x, x, x, x, x, x, x, x]"]
                        + [f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(9)]),
    "laughs inside": "default: {ffn: &z [1]}\nlayers: {0: {heads: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]}, 1: {heads: &a1 ["
                     + ", ".join(["*a0"] * 9) + "]}, 2: {heads: &a2 [" + ", ".join(["*a1"] * 9) + "]}}\n",
    "nan": "default: {ffn: .nan}\n", "inf": "default: {ffn: .inf}\n", "nan to keep": "default: {heads: {keep: .nan}}\n",
    "nan neurons": "default: {ffn: {keep: .nan}}\n", "nan tokens": "default: {tokens: {keep: .nan}}\n",
    "a huge integer": f"default: {{ffn: {'9' * 5000}}}\n",
    "a huge radius": f"default: {{attention: {{radius: {'9' * 5000}}}}}\n",
    "a huge layer": f"layers: {{{'9' * 5000}: off}}\n", "a huge percentage": f"layers: {{{'9' * 500}%-: off}}\n",
    "nan percent": "layers: {nan%-: off}\n", "inf percent": "layers: {<inf%: off}\n",
    "huge depth": "num_layers: 1000000000000\n", "a date": "default: {ffn: 2001-01-01}\n",
    "a set": "layers: !!set {0}\n",
    "bytes": "name: !!binary aGk=\nlayers: {0: !!binary aGk=}\n", "unhashable": "? [1]\n: 2\n",
    "a key twice": "{a: 1, a: 2}",
    "control characters": "name: a\x00b\n", "a surrogate": 'name: "\\ud800"\nlayers: 3\n',
    "other digits": "layers: {٣: off}\n",
    "signs": "layers: {+1: off, 1_0: off}\n", "an unfinished string": 'name: "a\n', "only anchors": "*a\n",
    "merge": "layers: {<<: 3}\n", "a bool key": "layers: {true: off, false: off}\n",
    "none to change": "layers: {0: }\n",
    "file of a list": "default: {heads: {file: [1]}}\n", "a folder": "default: {heads: {file: /}}\n",
    "zero bytes in a path": 'default: {heads: {file: "a\\0b.npy"}}\n',
}  # fmt: skip


def test_plan_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused, model = Refusals(PlanError), make_model()
    batch = make_batch(model, [(2, IMAGE, 3)])
    with torch.no_grad():
        before = model(**batch.by_ids()).logits

    def used(text):
        plan = VisualPlan.from_yaml(text + "\n", LAYERS)
        vis_sparse.unpatch(vis_sparse.patch(model, plan, heads="first", verify=False))

    for name, text in PLAN_TEXTS.items():
        assert refused(name, lambda text=text: used(text)), f"{name} is taken"
    rng = np.random.default_rng(0)
    for _ in range(700):
        text = yaml.safe_dump(mutated(PLAN, rng), allow_unicode=True)
        refused(text, lambda text=text: used(text))
        assert not hasattr(model.model.language_model, "_vis_sparse")
    with torch.no_grad():
        assert torch.equal(model(**batch.by_ids()).logits, before)
    refused.check(500)


def test_plan_files(tmp_path):
    refused, rng = Refusals(PlanError), np.random.default_rng(1)
    good = yaml.safe_dump(PLAN).encode()
    file = tmp_path / "plan.yaml"
    for _ in range(250):
        file.write_bytes(broken(good, rng))
        refused(file.read_bytes(), lambda: load_plan(file).resolve(LAYERS), names="plan")
    for source in ("", " ", "yopo-13", "/", ".", "a\0b", "x" * 5000, "../plan", 3, None, [], b"dense", True, 1.5):
        assert refused(source, lambda source=source: load_plan(source)), source
        assert refused(source, lambda source=source: VisualPlan.from_yaml(source, LAYERS)), source
        if source is not None:  # the checkpoint's own, or auto
            assert refused(source, lambda source=source: vis_sparse.patch(make_model(), source)), source
    refused.check(150)


_WRONG = [math.nan, math.inf, -1, 10**400, "x", None, [], True, 0.3j, object()]


@pytest.mark.parametrize("value", _WRONG, ids=lambda value: type(value).__name__)
def test_plans_by_hand(value):
    refused = Refusals(PlanError)
    for call in (
        lambda: vis_sparse.Neighborhood(value), lambda: vis_sparse.TokenBudget(value),
        lambda: vis_sparse.LayerPlan(text_reads=1), lambda: vis_sparse.LayerPlan(attention=value),
        lambda: VisualPlan.yopo(LAYERS, window=value), lambda: VisualPlan.vtw(LAYERS, value),
        lambda: VisualPlan.vica(LAYERS, [value]), lambda: VisualPlan.shortv(LAYERS, [value]),
        lambda: VisualPlan.vskip(LAYERS, [value]), lambda: VisualPlan.fastv(LAYERS, value),
        lambda: VisualPlan.pyramiddrop(LAYERS, stages=value), lambda: VisualPlan((value,)),
        lambda: VisualPlan.from_yaml("name: a\n", value), lambda: VisualPlan.dense(value),
        lambda: load_plan("dense").resolve(value), lambda: VisualPlan((vis_sparse.LayerPlan(),), semantics=value),
    ):  # fmt: skip
        # the default, one stage, or as many layers as the recipe says
        refused(value, call)
    refused.check(10)


# Calibrations, masks and scores


def facts(**changes) -> dict[str, str]:
    return {"vis_sparse": json.dumps(Calibration.load(HEADS_FILE).metadata | changes)}


def arrays() -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(Calibration.load(HEADS_FILE)).items() if isinstance(value, np.ndarray)}


def bad_arrays(rng):
    """Arrays of a calibration, one or two of them of another type or shape, with NaN, or missing."""
    found = arrays()
    for name in rng.choice(list(found), rng.integers(1, 3), replace=False):
        array, kind = found[name], rng.integers(9)
        if kind == 0:
            del found[name]
        elif kind == 1:
            found[name] = array[..., None]
        elif kind == 2:
            found[name] = array[:-1]
        elif kind == 3:
            found[name] = np.atleast_1d(array[0])
        elif kind == 4:
            found[name] = array > 0
        elif kind == 5:
            found[name] = np.where(rng.random(array.shape) < 0.2, np.float32(np.nan), array)
        elif kind == 6:
            found[name] = array[:0]
        elif kind == 7:
            found[name + "s"] = found.pop(name)
        else:
            found[name] = np.concatenate([array, array], -1)
    return found


def test_calibrations(tmp_path):
    refused, rng, file = Refusals(PlanError), np.random.default_rng(2), tmp_path / "calibration.safetensors"

    def both(given):
        refused(given, lambda: Calibration.load(file), names=file.name)
        refused(given, lambda: vis_sparse.flops(str(checkpoint()), "yopo-12", heads=file))

    good = HEADS_FILE.read_bytes()
    for _ in range(120):
        file.write_bytes(broken(good, rng))
        both("bytes")
    for _ in range(120):
        found = bad_arrays(rng)
        save_file(found, file, facts())
        both({name: array.shape for name, array in found.items()})
    for text in ("", "{", "[]", "null", "3", '{"a": 3}', '{"kv_heads": null}', "[" * 3000, '{"kv_heads": {}}'):
        save_file(arrays(), file, {"vis_sparse": text})
        both(text)
    for count in ("0", "-1", "x", "3", "1e3", "9" * 30, "٣"):
        save_file(arrays(), file, facts(kv_heads=count))
        both(count)
    save_tensors({"heads": torch.ones(8, 8, dtype=torch.bfloat16)}, file)
    both("bfloat16")
    for header in (2**63, 2**40, 10, 0):
        file.write_bytes(struct.pack("<Q", header) + b"{}")
        both(header)
    for path in (tmp_path, tmp_path / "none.safetensors", "", "/", "a\0b", HEADS_FILE / "x"):
        assert refused(path, lambda path=path: Calibration.load(path)), path
    refused.check(300)


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def with_header(text: str) -> bytes:
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 64


def test_masks(tmp_path):
    refused, rng, file = Refusals(PlanError), np.random.default_rng(3), tmp_path / "mask.npy"
    model = make_model()
    mask = np.ones((LAYERS, HEADS), dtype=bool)

    def given(data: bytes, must=False):
        file.write_bytes(data)
        was = refused(data[:60], lambda: vis_sparse.patch(model, "vtw", heads=file, verify=False))
        assert was or not must, data[:80]
        vis_sparse.unpatch(model)

    shapes = [(), (1,), (HEADS,), (LAYERS, HEADS, 1), (LAYERS + 1, HEADS), (LAYERS, HEADS - 1), (0, HEADS), (LAYERS, 0)]
    for shape in shapes:
        for dtype in (bool, np.uint8, np.float32):
            given(npy(np.ones(shape, dtype)), must=True)
    for dtype in (np.int64, np.complex64, "U3", "S2", "M8[s]", [("a", "f4")], object):
        given(npy(np.ones((LAYERS, HEADS)).astype(dtype) if dtype is not object else np.array([[None]])), must=True)
    given(npy(np.full((LAYERS, HEADS), np.nan)), must=True)
    for text in (
        "{'descr': '|b1', 'fortran_order': False, 'shape': (1000000000000, 1000000000), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (100000, 1000000), }",
        "{'descr': '|b1', 'fortran_order': False, 'shape': (-3, 8), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3, 8), }",
        "{'descr': 'x', 'fortran_order': False, 'shape': (3, 8), }", "{'shape': 3}", "[]", "", "__import__('os')",
        "(" * 200, "{'descr': '|b1', 'fortran_order': 3, 'shape': (3, 8), }",
    ):  # fmt: skip
        given(with_header(text), must=True)
    for _ in range(150):
        given(broken(npy(mask), rng))
    archive = io.BytesIO()
    np.savez(archive, heads=mask)
    given(archive.getvalue(), must=True)
    given(b"PK\x03\x04", must=True)
    for other in (np.ones(3), np.ones((LAYERS, HEADS, 2)), "nothing.npy", [[1, 2], [3]], "", 3.5, {}, torch.ones(2, 2)):
        assert refused(other, lambda other=other: vis_sparse.patch(model, "vtw", heads=other, verify=False)), other
    for path in (tmp_path, tmp_path / "none.npy", "/", "a\0b.npy"):
        assert refused(path, lambda path=path: load_heads(path)), path
    assert not hasattr(model.model.language_model, "_vis_sparse")
    refused.check(150)


# Records and images

ROW = {"image": "image.png", "question": "what?", "answer": "a thing"}


@pytest.fixture
def pictures(tmp_path):
    Image.new("RGB", (12, 8), "red").save(tmp_path / "image.png")
    return tmp_path


def test_json_lines(pictures):
    refused, rng, file = Refusals(SampleError), np.random.default_rng(4), pictures / "data.jsonl"

    def given(data: bytes, must=False):
        file.write_bytes(data)
        was = refused(data[:80], lambda: list(read_records(file)), names=str(file))
        assert was or not must, data[:80]

    good = json.dumps(ROW).encode() + b"\n"
    for _ in range(150):
        given(good + json.dumps(mutated(ROW, rng)).encode() + b"\n")
    for _ in range(150):
        given(broken(good * 3, rng))
    for line in (
        b"{",
        b"null",
        b"[]",
        b"3",
        b"\xff\xfe",
        b'"a"',
        b"{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\0",
        b"\n\n",
    ):
        given(line, must=True)
    for image in (
        "",
        ".",
        "..",
        "none.png",
        "/",
        "a\0b",
        "x" * 5000,
        None,
        3,
        [],
        {},
        {"bytes": 3},
        {"path": 3},
        {"path": None},
    ):
        given(json.dumps(ROW | {"image": image}).encode(), must=True)
    for path in (pictures / "none.jsonl", pictures / "data.txt", "", "a\0b", "/"):
        assert refused(path, lambda path=path: list(read_records(path))), path
    empty = pictures / "empty"
    empty.mkdir()
    assert refused(empty, lambda: list(read_records(empty, "what?")))
    refused.check(200)


def test_parquet(pictures):
    import pyarrow
    from pyarrow.parquet import write_table

    refused, rng, file = Refusals(SampleError), np.random.default_rng(5), pictures / "data.parquet"

    def given(name, must=False):
        was = refused(name, lambda: [encode_image(record) for record in read_records(file)], names=str(file))
        assert was or not must, name

    def encode_image(record):
        if not isinstance(record.image, Path):
            record.image.convert("RGB")

    write_table(pyarrow.Table.from_pylist([ROW] * 3), file)
    good = file.read_bytes()
    for _ in range(100):
        file.write_bytes(broken(good, rng))
        given("bytes")
    png = (pictures / "image.png").read_bytes()
    bad = [{"image": {"bytes": broken(png, rng), "path": None}} for _ in range(30)]
    bad += [{"image": value} for value in (3, None, [1], {"a": 1}, {"bytes": None, "path": None}, {"path": "none.png"})]
    bad += [{"question": value} for value in (3, None, ["a"])] + [{"answer": value} for value in (3, ["a"], {"a": 1})]
    for number, changes in enumerate(bad):
        write_table(pyarrow.Table.from_pylist([ROW | changes]), file)
        given(changes, must=number >= 30)
    write_table(pyarrow.Table.from_pylist([{"a": 1}]), file)
    given("other columns", must=True)
    refused.check(80)


def png_of(width: int, height: int) -> bytes:
    """The start of a PNG of any size, with little in it."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )


def test_images(pictures):
    refused, rng = Refusals(SampleError), np.random.default_rng(6)
    processor = AutoProcessor.from_pretrained(checkpoint())

    def given(name: str, data: bytes, must=False):
        file = pictures / name
        file.write_bytes(data)
        was = refused(data[:40], lambda: encode(processor, Record(file, "what?", "a")), names=str(file))
        assert was or not must, (name, data[:40])

    for data in (b"", b"text", b"\0" * 100, b"<svg/>", b"GIF89a", b"BM", b"\xff\xd8\xff", b"%PDF-1.4", b"RIFF0000WEBP"):
        given("bad.png", data, must=True)
    for size in ((0, 0), (0, 5), (5, 0), (1 << 16, 1 << 16), (1 << 30, 1 << 30), ((1 << 31) - 1, 1), (4, 4)):
        given("bad.png", png_of(*size), must=True)
    for kind in ("png", "jpeg", "gif", "bmp", "webp", "tiff"):
        data = io.BytesIO()
        Image.effect_noise((16, 12), 50).convert("RGB").save(data, kind)
        for _ in range(30):
            given(f"bad.{kind}", broken(data.getvalue(), rng))
    folder = pictures / "folder.png"
    folder.mkdir()
    for path in (folder, pictures / "none.png", Path("/"), "a\0b"):
        assert refused(path, lambda path=path: encode(processor, Record(path, "what?"))), path
    refused.check(80)


# Checkpoint folders


def rewritten(folder: Path, rng, name="config.json") -> str:
    """Another config.json; returns what is in it."""
    file = folder / name
    changed = mutated(json.loads(file.read_text()), rng)
    file.write_text(json.dumps(changed))
    return file.read_text()


CONFIGS = ("", "{", "[]", "null", "{}", "3", '{"model_type": "x"}', '{"model_type": "llava"}', '{"model_type": 3}',
           '{"model_type": "llava", "text_config": 3}', '{"model_type": "bert"}', '{"model_type": null}', "\0",
           "[" * 3000,
           '{"model_type": "llava", "auto_map": {"AutoConfig": "evil.Config"}}',
           '{"model_type": "llava", "text_config": {"model_type": "llama", "num_attention_heads": 0}}')  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_shapes_of_folders(tmp_path, family):
    refused, rng = Refusals((ShapeError, PlanError)), np.random.default_rng(7)
    good = (checkpoint(family) / "config.json").read_text()
    file = tmp_path / "config.json"

    def counted():
        vis_sparse.flops(tmp_path, "auto", image_size=(96, 96))

    for text in CONFIGS:
        file.write_text(text)
        refused(text, counted)
    file.write_bytes(b"\xff\xfe{")
    assert refused("binary", counted)
    for _ in range(100):
        file.write_text(good)
        refused(rewritten(tmp_path, rng), counted)
    for source in ("", "/", "/dev/null", "a\0b", 3, None, [], "llava-1.5", tmp_path / "none", "x" * 5000):
        assert refused(source, lambda source=source: load_shape(source)), source
    refused.check(30)


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internvl")
    original(folder)
    return folder


@pytest.mark.slow
def test_original_internvl2(internvl, tmp_path):
    refused, rng = Refusals(CheckpointError), np.random.default_rng(8)
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(internvl, folder)

    def given(name, must=False):
        was = refused(name, lambda: load_internvl2(folder))
        assert was or not must, name
        if refused(name, lambda: convert_internvl2(folder, out)):
            assert not out.exists() or not list(out.iterdir()), f"{name}: {sorted(out.iterdir())}"
        shutil.rmtree(out, ignore_errors=True)

    def restored(*names):
        for name in names:
            shutil.copy(internvl / name, folder / name)

    for text in CONFIGS:
        (folder / "config.json").write_text(text)
        given(text, must=True)
    for _ in range(60):
        restored("config.json")
        given(rewritten(folder, rng))
    restored("config.json")
    (folder / "config.json").write_bytes(b"\xff\xfe{")
    given("binary", must=True)
    restored("config.json")
    for name in ("added_tokens.json", "model.safetensors.index.json"):
        for text in ("", "{", "[]", "null", "3", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\0",
                     '{"weight_map": {"a": "../x.safetensors"}}', '{"<IMG_CONTEXT>": "x"}',
                     '{"weight_map": {}}'):  # fmt: skip
            (folder / name).write_text(text)
            given((name, text), must=True)
        restored(name)
    shard = "model-00002-of-00002.safetensors"
    for _ in range(25):
        (folder / shard).write_bytes(broken((internvl / shard).read_bytes(), rng))
        given("shard")
    (folder / shard).unlink()
    given("a shard is missing", must=True)
    shutil.copy(internvl / "model-00001-of-00002.safetensors", folder / shard)
    given("a shard twice", must=True)
    save_file({"x": np.ones(3)}, folder / shard)
    given("another shard", must=True)
    for path in (tmp_path / "none", folder / "config.json", "", "/", "a\0b", 3, None):
        assert refused(path, lambda path=path: load_internvl2(path)), path
        assert refused(path, lambda path=path: convert_internvl2(path, out)), path
    restored(shard)
    for path in (folder, folder / "config.json", folder / "config.json" / "x", "a\0b"):
        assert refused(path, lambda path=path: convert_internvl2(folder, path)), path
    refused.check(150)


# Commands

runner = CliRunner()


def files_in(folder: Path) -> set[str]:
    return {str(file) for file in folder.rglob("*")}


def _is_one_line(said: str) -> bool:
    """One line, after those that say which pair of plan and task is at work, or the end of a progress bar."""
    lines = [line for line in said.splitlines() if line.strip() and not re.match(r"\[\d+/\d+\] ", line)]
    return len(lines) == 1 and lines[0].startswith("vis-sparse: ")


class Commands:
    """Runs commands in a folder; those that fail must say one line, exit with 2 and leave no file."""

    def __init__(self, folder: Path):
        self.folder, self.refused, self.wrong = folder, 0, []

    def __call__(self, *arguments) -> bool:
        arguments = [str(argument) for argument in arguments]
        before = files_in(self.folder)
        done = runner.invoke(app, arguments, env={"COLUMNS": "80", "NO_COLOR": "1"})
        short = [argument[:60] for argument in arguments]
        if done.exit_code == 0:
            return False
        self.refused += 1
        if done.exit_code != 2 or not isinstance(done.exception, SystemExit):
            self.wrong.append((short, f"exit code {done.exit_code}, {done.exception!r}"[:300]))
        elif not _is_one_line(done.stderr) or done.stdout:
            self.wrong.append((short, done.stderr[-300:] + done.stdout[-300:]))
        elif files_in(self.folder) - before:
            self.wrong.append((short, f"left {files_in(self.folder) - before}"))
        return True

    def check(self, least: int) -> None:
        assert not self.wrong, f"{len(self.wrong)}, such as\n" + "\n".join(map(str, self.wrong[:15]))
        assert self.refused >= least, f"only {self.refused} were refused"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Commands(tmp_path)


# What each command is given beside the option that is tried. Those that run a model are given one that is not there, so
# that an option which happens to be good does not run it.
BASES = {
    ("plan", "list"): [], ("plan", "show"): ["dense"], ("flops",): [], ("report",): ["good.json"],
    ("convert-internvl2",): ["none", "out"], ("bench",): ["--model", "none"], ("bench", "calibration"): ["--model",
    "none"],
    ("eval",): ["--model", "/dev/null"], ("calibrate",): ["--model", "/dev/null", "--data", "tiny-train", "--out", "c"],
    ("search",): ["--model", "/dev/null", "--data", "tiny-train", "--out", "p.yaml"],
}  # fmt: skip


def options() -> list[tuple[tuple[str, ...], str]]:
    """(command, option) of every option that takes a value."""
    found, root = [], typer.main.get_command(app)
    for command in BASES:
        node = root
        for name in command:
            node = node.commands[name]
        found += [
            (command, p.opts[0]) for p in node.params if p.opts[0].startswith("--") and not getattr(p, "is_flag", 0)
        ]
    return found


@pytest.mark.parametrize("part", slow_but([0], range(4)))
def test_every_option_of_every_command(part, commands, tmp_path):
    Path("good.json").write_text(json.dumps([BENCH]))
    rng = np.random.default_rng(part)
    for command, option in options()[part::4]:
        tried = rng.choice(WORDS, 8 if command[0] in ("plan", "flops") else 5, replace=False)
        for word in tried:
            if option == "--json" and word in ("x", "0", "0.5"):
                continue  # a name of a file like any other
            commands(*command, *BASES[command], option, word)
            for file in files_in(tmp_path) - {str(tmp_path / "good.json")}:
                Path(file).unlink()  # names of files that are good
    commands.check(50)


@pytest.mark.slow
def test_arguments(commands):
    for arguments in (
        ["nothing"], ["--nothing"], ["plan"], ["plan", "nothing"], ["plan", "show"], ["flops", "x"], ["flops",
        "--plan"],
        ["report"], ["convert-internvl2"], ["convert-internvl2", "a"], ["calibrate"], ["search", "--model", "x"],
        ["bench", "nothing"], ["bench", "kernels", "--nothing"], ["demo", "--family", "x"], ["demo", "--questions",
        "3"],
        ["demo", "--calibration", "/dev/null"], ["demo", "--calibration", "."], ["demo", "--out", "/dev/null/x"],
        ["demo", "--json", "/dev/null/x"], ["eval", "--plan", ","], ["eval", "--tasks", ","], ["eval", "--plan", "x"],
        ["eval", "--plan", "dense,dense"], ["eval", "--out", "/dev/null/x"], ["eval", "--device", "x"],
        ["eval", "--dtype", "x"], ["eval", "--base", "x"], ["eval", "--calibration", "/dev/null"], ["eval", "--json",
        "/"],
        ["bench", "--dtype", "float8"], ["bench", "--device", "x"], ["bench", "--plan", ","], ["bench", "--plan", ""],
        ["bench", "--layers", "1", "--json", "/dev/null/x"], ["bench", "--layers", "1", "--image-size", "0x0"],
        ["bench", "kernels", "--settings", "x"], ["bench", "kernels", "--settings", ""], ["bench", "kernels",
        "--batch", "x"],
        ["bench", "kernels", "--batch", "0"], ["bench", "kernels", "--radius", "-1"], ["bench", "kernels", "--radius",
        ""],
        ["bench", "kernels", "--direction", "x"], ["bench", "kernels", "--ways", "x"], ["bench", "kernels", "--ways",
        ","],
        ["bench", "kernels", "--dtype", "x"], ["bench", "kernels", "--device", "x"], ["bench", "kernels",
        "--most-heads", "0"],
        ["bench", "kernels", "--json", "/dev/null/x"], ["bench", "calibration", "--dtype", "x"],
        ["bench", "calibration", "--device", "x"], ["bench", "calibration", "--json", "/dev/null/x"],
        ["bench", "--peers", "--plan", "x"], ["bench", "--peers", "--calibration", str(HEADS_FILE)],
    ):  # fmt: skip
        if arguments == ["plan"]:
            continue  # shows its help
        assert commands(*arguments), arguments
    commands.check(50)


@pytest.mark.slow
def test_results_of_report(commands):
    rng = np.random.default_rng(9)
    good = {
        "eval": [eval_row("t", "dense", 0.5, 4.0), eval_row("t", "vtw", 0.4, 2.0)],
        "bench": [BENCH],
        "peers": PEERS,
    }
    file = Path("results.json")
    for _ in range(300):
        rows = good[str(rng.choice(list(good)))]
        file.write_text(json.dumps(mutated(rows, rng)))
        if not commands("report", file):
            Path("report.html").unlink()
    for _ in range(60):
        file.write_bytes(broken(json.dumps(good["bench"]).encode(), rng))
        if not commands("report", file):
            Path("report.html").unlink()
    for text in ("", "{", "[]", "null", "{}", "[[]]", "[3]", "[" * 100_000, "NaN", '[{"peer": "x"}]'):
        file.write_text(text)
        assert commands("report", file), text
    file.write_text(json.dumps([BENCH]))
    for more in (
        ["--out", "/dev/null/x.html"], ["--out", "."], ["--out", ""], ["--calibration", "results.json"], ["none.json"],
        ["."],
        ["--model", "x"], ["--json", "/dev/null/x"], ["--json", "."],
    ):  # fmt: skip
        assert commands("report", file, *more), more
    commands.check(200)


def broken_checkpoint(folder: Path, kind: str) -> Path:
    """A copy of the tiny LLaVA with something wrong in it."""
    shutil.copytree(checkpoint(), folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    data = json.loads(config.read_text())
    if kind == "no config":
        config.unlink()
    elif kind == "half a config":
        config.write_text(config.read_text()[:200])
    elif kind == "another model_type":
        config.write_text(json.dumps(data | {"model_type": "bert"}))
    elif kind == "an unknown model_type":
        config.write_text(json.dumps(data | {"model_type": "none"}))
    elif kind == "other sizes":
        data["text_config"]["hidden_size"] *= 2
        config.write_text(json.dumps(data))
    elif kind == "no weights":
        weights.unlink()
    elif kind == "half of the weights":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif kind == "weights of text":
        weights.write_text("weights")
    elif kind == "a lying index":
        weights.unlink()
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "half a tokenizer":
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:100])
    elif kind == "no processor":
        (folder / "processor_config.json").unlink()
    elif kind == "half a processor":
        (folder / "processor_config.json").write_text("{")
    elif kind == "other weights":
        save_file({"x": np.ones(3, np.float32)}, weights, {"format": "pt"})
    return folder


BROKEN = (
    "no config", "half a config", "another model_type", "an unknown model_type", "other sizes", "no weights",
    "half of the weights", "weights of text", "a lying index", "no tokenizer", "half a tokenizer", "no processor",
    "half a processor", "other weights",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_checkpoints(kind, commands, tmp_path, monkeypatch):
    folder = broken_checkpoint(tmp_path / "model", kind)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))
    common = ("--model", folder, "--samples", 1, "--data", "tiny-train")
    assert commands("calibrate", *common, "--out", "c.safetensors")
    assert commands("search", *common, "--out", "p.yaml")
    assert commands("eval", "--model", folder, "--tasks", "digit_grid_count", "--limit", 1, "--plan", "dense")
    assert commands("convert-internvl2", folder, tmp_path / "out")
    commands.check(4)


@pytest.mark.slow
def test_data_of_commands(commands, pictures):
    common = ("calibrate", "--model", checkpoint(), "--samples", 1, "--scores", "mass")
    Path("bad.png").write_text("no image")
    Path("data.jsonl").write_text(json.dumps(ROW | {"image": "bad.png"}))
    Path("text.jsonl").write_text("text")
    Path("bad.parquet").write_text("text")
    Path("images").mkdir()
    for more in (
        ["--data", "data.jsonl", "--out", "c"], ["--data", "text.jsonl", "--out", "c"], ["--data", "none", "--out",
        "c"],
        ["--data", "bad.parquet", "--out", "c"], ["--data", "images", "--out", "c"], ["--data", ".", "--out", "c"],
        ["--data", "images", "--prompt", "x", "--out", "c"], ["--data", "lmms:none", "--out", "c"],
        ["--data", "tiny-train", "--out", "/dev/null/c"], ["--data", "tiny-train", "--out", "."],
        ["--data", "tiny-train", "--out", "c", "--scores", "x"], ["--data", "tiny-train", "--out", "c", "--json",
        "/dev/null/x"],
        ["--data", "tiny-train", "--out", "c", "--export-mask", "/dev/null/x"], ["--data", "tiny-train", "--out", "c",
        "--device", "x"],
        ["--data", "tiny-train", "--out", "c", "--report", "/dev/null/x"], ["--data", "tiny-train", "--out", "c",
        "--dtype", "int8"],
    ):  # fmt: skip
        assert commands(*common, *more), more
    search = ("search", "--model", checkpoint(), "--samples", 1, "--data", "tiny-train", "--out")
    for more in (
        ["p.yaml", "--budget", "0"], ["p.yaml", "--budget", "2"], ["p.yaml", "--budget", "nan"], ["p.yaml", "--cost",
        "x"],
        ["p.yaml", "--objective", "x"], ["p.yaml", "--time-limit", "x"], ["p.yaml", "--calibration", "bad.png"],
        ["p.yaml", "--calibration", checkpoint("qwen2_vl") / "heads.safetensors"], ["/dev/null/p.yaml"], ["."],
        ["p.yaml", "--front", "bad.png"], ["p.yaml", "--report", "/dev/null/x"], ["p.yaml", "--json", "/dev/null/x"],
    ):  # fmt: skip
        assert commands(*search, *more), more
    Path("p.yaml.partial").write_text("no log")
    assert commands(*search, "p.yaml")
    commands.check(30)


def test_python_calls_of_patch():
    refused = Refusals((PatchError, PlanError))
    model = make_model()
    batch = make_batch(model, [(2, IMAGE, 3)])
    with torch.no_grad():
        before = model(**batch.by_ids()).logits
    attributes = set(vars(model.model.language_model))
    for plan in (
        3,
        [],
        {},
        {"a": 3},
        {3: "dense"},
        {"a": "dense", "b": "none"},
        VisualPlan.dense(LAYERS + 1),
        "yopo",
    ):
        assert refused(plan, lambda plan=plan: vis_sparse.patch(model, plan)), plan
    for name, value in (("backend", "x"), ("backend", 3), ("calibration", 3), ("calibration", "none"), ("heads",
    "none"),
                        ("calibration", HEADS_FILE), ("heads", HEADS_FILE)):  # fmt: skip
        given = {name: value}
        assert refused(given, lambda given=given: vis_sparse.patch(model, "dense", **given)), given
    assert set(vars(model.model.language_model)) == attributes
    with torch.no_grad():
        assert torch.equal(model(**batch.by_ids()).logits, before)
    for other in (None, 3, torch.nn.Linear(2, 2), "model", make_model().model.language_model):
        assert refused(other, lambda other=other: vis_sparse.patch(other))
    refused.check(19)
