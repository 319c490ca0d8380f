"""The page of `vis-sparse report`: one file, nothing loaded from anywhere, light and dark."""

from __future__ import annotations

from html import escape
from pathlib import Path

from .charts import heat_map, scatter, strip
from .html import CSS, bar, document, table_row
from .numbers import mebibytes, percent, seconds, span, three_digits
from .pareto import pareto_front
from .tables import measured_on

MORE_CSS = Path(__file__).with_name("report.css")


def page(kinds: dict[str, list[dict]], calibrations: list) -> str:
    """The page as HTML text. kinds: rows of `report.read_results`. calibrations: for heat maps."""
    sections = [_head(kinds)]
    sections += _accuracy(kinds["eval"])
    sections += [_bench(rows) for rows in _by_setting(kinds["bench"])]
    sections += [_peers(rows) for rows in _by_setting(kinds["peers"])]
    sections += _plans(kinds["eval"] + kinds["bench"])
    sections += [_heads(calibration) for calibration in calibrations]
    css = CSS.read_text(encoding="utf-8") + MORE_CSS.read_text(encoding="utf-8")
    return document("vis_sparse report", css, [section for section in sections if section])


def _head(kinds: dict[str, list[dict]]) -> str:
    rows = [row for kind in kinds.values() for row in kind if "machine" in row]
    facts = sorted({measured_on(row) for row in rows})
    models = sorted({row["model"] for kind in kinds.values() for row in kind})
    runs = "".join(f"<br>{escape(fact)}" for fact in facts)
    return f"""<header>
<p class="brand">vis_sparse report</p>
<h1>Accuracy beside what it costs</h1>
<p>Models: {escape(", ".join(models))}.</p>
<p class="note">Measured on:{runs}</p>
</header>"""


def _by_setting(rows: list[dict]) -> list[list[dict]]:
    """Rows that share a table: those of one model, setting and run."""
    names = ("model", "layers", "batch", "dtype", "compiler", "visual_tokens", "date")
    tables: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in names)
        tables.setdefault(key, []).append(row)
    return list(tables.values())


def _accuracy(rows: list[dict]) -> list[str]:
    """A section a model: a picture and a table for each of its tasks' metrics."""
    sections = []
    for model in dict.fromkeys(row["model"] for row in rows):
        panels: dict[tuple, list[dict]] = {}
        for row in rows:
            if row["model"] == model:
                panels.setdefault((row["task"], row["metric"]), []).append(row)
        charts = "".join(_chart(f"{task}: {metric}", own) for (task, metric), own in panels.items())
        tables = "".join(_task_table(f"{task}: {metric}", own) for (task, metric), own in panels.items())
        sections.append(
            f'<section><h2>{escape(model)}: accuracy over FLOPs</h2><div class="charts">{charts}</div>{tables}'
            '<p class="note">FLOPs: of the decoder in prefill, text included, mean over samples of what each one’s '
            "layout costs. Coloured: plans that no other beats in both. Lines through points: standard error. "
            "Speed-up: of the whole answer, vision tower and decoding included, median of samples timed under the plan "
            "and unpatched in turns.</p></section>"
        )
    return sections


def _chart(title: str, rows: list[dict]) -> str:
    counted = [row for row in rows if row["gflops"] is not None]
    if not counted:
        return ""
    best = [row["plan"] for row in pareto_front(counted)]
    points = [
        (row["plan"], 100 * row["gflops"] / row["gflops_dense"], row["value"], row["stderr"] or 0) for row in counted
    ]
    picture = scatter(points, best, "FLOPs of prefill, % of dense", title)
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}</figure>"


def _task_table(title: str, rows: list[dict]) -> str:
    body = []
    for row in rows:
        known = row["gflops"] is not None
        body.append(
            table_row(
                row["plan"],
                [
                    f"{row['value']:.4g}" + (f" ± {row['stderr']:.2g}" if row["stderr"] is not None else ""),
                    "" if row["same_as_dense"] is None else percent(row["same_as_dense"]),
                    bar(three_digits(row["gflops"]), row["gflops"] / row["gflops_dense"]) if known else "",
                    bar(three_digits(row["kv_mib"]), row["kv_mib"] / row["kv_mib_dense"]) if known else "",
                    "" if row["latency_ms"] is None else three_digits(row["latency_ms"]),
                    "" if row["speedup"] is None else f"{row['speedup']:.2f}×",
                    str(len(row["failed"]) or ""),
                ],
            )
        )
    heads = ("score", "same as dense, %", "GFLOPs", "KV cache, MiB", "answer, ms", "speed-up", "failed")
    return _table(f"{title}, {rows[0]['samples']} samples", "plan", heads, body)


def _bench(rows: list[dict]) -> str:
    first = rows[0]
    dense = [_times(first["dense_s"], first["spread"]["dense_s"]), "1.00×", "1.00", "", *_decoder(first, "dense"), ""]
    body = [table_row("unpatched", [*dense, *_sizes(first["kv_bytes_dense"], first["peak_bytes_dense"])])]
    for row in rows:
        body.append(
            table_row(
                row["plan"],
                [
                    _times(row["patched_s"], row["spread"]["patched_s"]),
                    f"{row['speedup']:.2f}×",
                    f"{row['flop_ratio']:.2f}",
                    f"{row['efficiency']:.2f} / {row['efficiency_vs_dense_plan']:.2f}",
                    *_decoder(row, "patched"),
                    f"{row['decode_speedup']:.2f}×" if "decode_speedup" in row else "",
                    *_sizes(row["kv_bytes"], row["peak_bytes"]),
                ],
            )
        )
    heads = (
        "prefill",
        "speed-up",
        "fewer FLOPs",
        "efficiency",
        "decoder",
        "speed-up",
        "decode",
        "KV, MiB",
        "peak, MiB",
    )
    title = (
        f"Prefill of {first['visual_tokens']} visual and {first['text_tokens']} text tokens, pixels to logits, batch "
        f"{first['batch']}, {first['layers']} decoder layers and {first['tower_layers']} of the vision tower, "
        f"{first['dtype']}, random weights"
    )
    return (
        f"<section><h2>{escape(first['model'])}: time at full width</h2>{_table(title, 'plan', heads, body)}"
        '<p class="note">Median of rounds in turns (fastest to slowest). Efficiency: the speed-up over the ratio of '
        "FLOPs, against the unpatched model / against the dense plan, which runs the same routines. Decoder: its part "
        "of the prefill; decode: of a step.</p></section>"
    )


def _decoder(row: dict, variant: str) -> list[str]:
    speedup = row["decoder_speedup"] if variant == "patched" else 1.0
    return [seconds(row[f"decoder_{variant}_s"]), f"{speedup:.2f}×"]


def _times(median: float, spread: list[float]) -> str:
    return f"{seconds(median)} ({span(spread)})"


def _sizes(*sizes: int) -> list[str]:
    return [mebibytes(size).removesuffix(" MiB") for size in sizes]


def _peers(rows: list[dict]) -> str:
    first = rows[0]
    body = []
    for row in rows:
        if "why" in row:
            body.append(
                f'<tr class="quiet"><th scope="row">{escape(row["peer"])}</th>'
                f'<td class="text" colspan="3">{escape(row["why"])}</td></tr>'
            )
        else:
            size = "" if row["peak_bytes"] is None else _sizes(row["peak_bytes"])[0]
            body.append(table_row(row["peer"], [_times(row["s"], row["spread"]), f"{row['speedup']:.2f}×", size]))
    title = (
        f"{first['new_tokens']} new tokens after {first['visual_tokens']} visual and {first['text_tokens']} text "
        f"tokens, {first['layers']} layers, {first['dtype']}, random weights"
    )
    heads = ("time", "speed-up", "peak, MiB")
    return f"<section><h2>{escape(first['model'])}: peers</h2>{_table(title, '', heads, body)}</section>"


def _plans(rows: list[dict]) -> list[str]:
    """A section a model and depth: its plans as they ran there, in the order of the rows."""
    models: dict[tuple, dict[tuple, dict]] = {}
    for row in rows:
        found = row.get("strip")  # not in results of earlier versions, nor where no prompt had an image
        if found is not None:
            own = models.setdefault((row["model"], len(found["shares"])), {})
            own.setdefault((row["plan"], found["about"]), found)
    return [_plans_of(model, layers, plans) for (model, layers), plans in models.items()]


def _plans_of(model: str, layers: int, plans: dict[tuple, dict]) -> str:
    entries = []
    for (name, about), found in plans.items():
        prompt = f"{found['visual_tokens']} visual and {found['text_tokens']} text tokens"
        words = f"{found['share']:.1%} of the visual FLOPs of {prompt}. {about}"
        picture = strip(found["shares"], found["reads"])
        entries.append(f"<dt>{escape(name)}</dt><dd>{picture}<span>{escape(words)}</span></dd>")
    return (
        f"<section><h2>{escape(model)}: what the plans compute in its {layers} layers</h2>"
        '<p class="note">A bar a layer: the share of the dense layer’s work that is done for visual tokens. A dot: '
        f'text reads them there.</p><dl class="plans">{"".join(entries)}</dl></section>'
    )


def _heads(calibration) -> str:
    layers, heads = calibration.heads.shape
    facts = {"model": "a model", "scores": "head"} | calibration.metadata
    return (
        f"<section><h2>Heads that look at images: {escape(Path(facts['model']).name)}</h2>"
        f"{heat_map(calibration.heads.tolist(), 'head', 'layer')}"
        f'<p class="note">{layers} layers (down) by {heads} heads (across), {escape(facts["scores"])} scores of '
        f"{calibration.num_samples} samples, log scale.</p></section>"
    )


def _table(caption: str, corner: str, heads: tuple[str, ...], body: list[str]) -> str:
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr><th scope="col">{corner}</th>'
        f"{columns}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
