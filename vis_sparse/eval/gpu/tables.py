"""The tables of docs/kernels.md: predictions, and beside them what a run measured."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..bench_kernels import SETTINGS
from .predictions import predict, text_floors

_RADII = 2, 7
NOTHING = "not measured"


def write_tables(page: Path, results: dict | None) -> None:
    """Replace what stands between `<!-- gpu: NAME -->` and `<!-- gpu: end -->`.

    ValueError for a table that the page has no place for.
    """
    text = page.read_text()
    for name, build in TABLES.items():
        marked = re.compile(rf"(<!-- gpu: {name} -->\n).*?(<!-- gpu: end -->)", re.DOTALL)
        if not marked.search(text):
            raise ValueError(f"{page}: found no table between <!-- gpu: {name} --> and <!-- gpu: end -->")
        table = build(_parts(results))
        text = marked.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    page.write_text(text)


def _parts(results: dict | None) -> dict:
    """What the parts that went well found, by name."""
    parts = {} if results is None else results["parts"]
    facts = {"machine": results} if results else {}
    return {name: part["results"] for name, part in parts.items() if part["rc"] == 0 and part["results"]} | facts


def near_table(parts: dict) -> str:
    measured = {
        (row["setting"], row["radius"], row["way"]): row["seconds"]
        for row in parts.get("kernels", [])
        if row["batch"] == 1
    }
    heads = (
        "grid", "radius", "GFLOP", "floor by FLOPs", "MB", "floor by bytes", "tile", "step", "walked / ideal",
        "with whole steps", "predicted", "bound by", "dense", "measured", "dense, measured", "FlexAttention, measured",
    )  # fmt: skip
    lines = []
    for name in SETTINGS:
        for radius in _RADII:
            p = predict(name, radius)
            positions = p.tiling.tile[0] * p.tiling.tile[1]
            binds = max(p.parts, key=p.parts.get)
            own, dense, flex = (measured.get((name, radius, way)) for way in ("triton", "dense", "flex"))
            lines.append(
                (
                    name,
                    radius,
                    f"{p.flops / 1e9:.2f}",
                    _us(p.floors[0]),
                    f"{p.bytes / 1e6:.1f}",
                    _us(p.floors[1]),
                    _sides(p.tiling.tile),
                    _sides(p.tiling.step),
                    f"{positions * p.tiling.entries.sum() / p.ideal:.2f}",
                    f"{p.tiling.walked / p.ideal:.2f}",
                    _us(p.seconds),
                    binds,
                    _us(p.dense),
                    _us(own),
                    _us(dense),
                    _us(flex),
                )  # fmt: skip
            )
    return _table(heads, lines)


def text_table(parts: dict) -> str:
    measured = {row["setting"]: row for row in parts.get("pieces", {}).get("text", [])}
    heads = (
        "grid", "prefill: GFLOP", "floor", "measured", "decode: MB", "floor", "measured", "mass of 1 row: MB", "floor",
        "measured",
    )  # fmt: skip
    lines = []
    for name in SETTINGS:
        line: list = [name]
        for phase, (amount, seconds) in text_floors(name).items():
            unit = f"{amount / 1e9:.2f}" if phase == "prefill" else f"{amount / 1e6:.1f}"
            line += [unit, _us(seconds), _us(measured.get(name, {}).get(phase))]
        lines.append(line)
    return _table(heads, lines)


def fused_table(parts: dict) -> str:
    found = parts.get("pieces", {}).get("fused", [])
    lines = [(r["operation"], r["phase"], r["rows"], _us(r["torch"]), _us(r["fused"])) for r in found]
    return _table(("operation", "phase", "rows", "torch", "fused"), lines or [(NOTHING, *[""] * 4)])


def model_table(parts: dict) -> str:
    """Whole models: operation by operation, as graphs, compiled. The unpatched model is compiled in the last alone."""
    lines = []
    modes = {
        "model": "eager, batch 1",
        "graphs": "graphs, batch 1",
        "batch": "graphs, batch 8",
        "compiled": "compiled, 8 layers, batch 1",
    }
    for part, mode in modes.items():
        rows = parts.get(part, [])
        for row in rows if isinstance(rows, list) else [rows]:
            lines.append((mode, row["plan"], *_bench_cells(row)))
    heads = "mode", "plan", "unpatched prefill", "patched", "speed-up", "unpatched decode step", "patched", "speed-up"
    return _table(heads, lines or [(NOTHING, *[""] * 7)])


def ceilings_table(parts: dict) -> str:
    heads, found = ("device", "product", "copy", "eager launch", "Triton launch"), parts.get("ceilings")
    if found is None:
        return _table(heads, [(NOTHING, *[""] * 4)])
    launches = (None if us is None else us / 1e6 for us in (found["launch_us"], found["kernel_launch_us"]))
    rates = f"{found['product_tflops']:.0f} TFLOP/s", f"{found['copy_gbs']:.0f} GB/s"
    return _table(heads, [(parts["machine"]["machine"]["device"], *rates, *map(_us, launches))])


def _bench_cells(row: dict) -> tuple[str, ...]:
    cells = []
    for phase in ("", "decode_"):
        if f"{phase}patched_s" not in row:
            cells += [NOTHING] * 3
            continue
        cells += [_us(row[f"{phase}dense_s"]), _us(row[f"{phase}patched_s"]), f"{row[f'{phase}speedup']:.2f}"]
    return tuple(cells)


def _us(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return f"{seconds * 1e6:.0f} us" if seconds >= 1e-5 else f"{seconds * 1e6:.1f} us"


def _sides(sides: tuple[int, int]) -> str:
    return f"{sides[0]}x{sides[1]}"


def _table(heads: Iterable[str], lines: Iterable[Iterable]) -> str:
    heads = list(heads)
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


TABLES = {
    "near": near_table,
    "text": text_table,
    "fused": fused_table,
    "models": model_table,
    "ceilings": ceilings_table,
}
