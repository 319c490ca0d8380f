"""Tables of the measuring commands, from their JSON."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .bench_vllm import KEYS
from .numbers import human, mebibytes, percent, seconds, span, three_digits


def tight_table(*headings: str, left: tuple[str, ...] = (), title: str | None = None) -> Table:
    """A table without lines that fits 80 columns; numbers to the right, the columns named in `left` to the left."""
    table = Table(
        title=title, title_justify="left", box=None, collapse_padding=True, pad_edge=False, header_style="bright_black"
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return table


def measured_on(row: dict) -> str:
    """Machine, versions and date of a result, in a line."""
    machine, versions = row["machine"], row["versions"]
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {device}torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {row['date'][:10]}"
    )


def draw_bench(console: Console, results: list[dict]) -> None:
    """The whole prefill, the decoder's part and, if it was measured, a decode step, from the objects of `bench`."""
    first = results[0]
    console.print(
        f"{first['model']}, {first['layers']} layers of the decoder and {first['tower_layers']} of the vision tower, "
        f"{first['dtype']}, batch {first['batch']}, {first['visual_tokens']} visual + {first['text_tokens']} text "
        "tokens a sample"
    )
    console.print(_bench_table("\nPrefill, pixels to logits", results, ""))
    console.print(_bench_table("\nThe decoder in it", results, "decoder_"))
    if "decode_dense_s" in first:
        console.print(_bench_table("\nDecode step, the decoder", results, "decode_"))
    order = "compiled, one after the other" if first["compiler"] else "in turns"
    copied = ", ".join(f"{row['plan']} {mebibytes(row['copied_bytes'])}" for row in results if row["copied_bytes"])
    console.print(
        f"\ntime: median of {first['repeats']} rounds {order}, range: fastest to slowest. efficiency: speed-up over "
        "fewer FLOPs, against the unpatched model / the dense plan. peak: tensors made in prefill. "
        + (f"copied weights: {copied}.\n" if copied else "no weights copied.\n")
        + measured_on(first),
        style="bright_black",
        highlight=False,
    )


def _bench_table(title: str, results: list[dict], prefix: str) -> Table:
    first, sizes = results[0], not prefix
    headings = ["plan", "time", "range", "speed-up", "fewer FLOPs", "efficiency"]
    table = tight_table(*headings, *(("KV MiB", "peak MiB") if sizes else ()), left=("plan",), title=title)

    def add(name, row, kind, ratios, kv=None, peak=None):
        times = seconds(row[prefix + kind]), span(row[prefix + "spread"][kind])
        bytes_ = [mebibytes(size).removesuffix(" MiB") for size in (kv, peak) if size is not None]
        table.add_row(name, *times, *ratios, *(bytes_ if sizes else ()))

    add("unpatched", first, "dense_s", ("1.00", "1.00", ""), first["kv_bytes_dense"], first["peak_bytes_dense"])
    if all(row["plan"] != "dense" for row in results):
        speedup = f"{first[prefix + 'dense_s'] / first[prefix + 'dense_plan_s']:.2f}"
        add("dense plan", first, "dense_plan_s", (speedup, "1.00", speedup))
    for row in results:
        ratios = [row[prefix + name] for name in ("speedup", "flop_ratio", "efficiency", "efficiency_vs_dense_plan")]
        speedup, fewer, efficiency, over_dense = (f"{ratio:.2f}" for ratio in ratios)
        shown = (speedup, fewer, f"{efficiency} / {over_dense}")
        add(row["plan"], row, "patched_s", shown, row["kv_bytes"], row["peak_bytes"])
    return table


def draw_train(console: Console, results: list[dict]) -> None:
    """Training steps, from the objects of `bench_train`."""
    first = results[0]
    console.print(
        f"{first['model']}, {first['layers']} layers, {first['dtype']}, batch {first['batch']}, "
        f"{first['visual_tokens']} visual + {first['text_tokens']} text tokens a sample"
    )
    headings = ("step", "time", "range", "forward", "backward", "of dense", "FLOPs", "kept MiB", "peak")
    table = tight_table(*headings, left=("step",))

    def add(name, row, kind, ratios):
        times = (seconds(row[f"{part}_{kind}s"]) for part in ("forward", "backward"))
        spread = span(row["spread"][f"step_{kind}s"])
        ending = "_dense" if kind else ""
        sizes = (mebibytes(row[f"{size}_bytes{ending}"]).removesuffix(" MiB") for size in ("kept", "peak"))
        table.add_row(name, seconds(row[f"step_{kind}s"]), spread, *times, *ratios, *sizes)

    add("dense", first, "dense_", ("1.00", "1.00"))
    for row in results:
        add(row["plan"], row, "", (f"{row['ratio']:.2f}", f"{row['flop_share']:.2f}"))
    console.print(table)
    console.print(
        f"\n{first['clock']} time: median of {first['repeats']} rounds in turns, range: fastest to slowest. of dense: "
        "paired. FLOPs: of the forward pass, text included. kept: for the backward pass. peak: tensors that a step "
        f"makes, gradients included, weights not.\n{measured_on(first)}",
        style="bright_black",
        highlight=False,
    )


def draw_host(console: Console, results: list[dict]) -> None:
    """Prefill and decode step from the objects of `bench_host`."""
    first = results[0]
    console.print(
        f"{first['model']}, {first['layers']} narrow layers, {first['heads']} heads on {first['kv_heads']} KV heads"
        f"{', budgets through groups' if first['scattered'] else ''}, batch {first['batch']}, "
        f"{first['visual_tokens']} visual + {first['text_tokens']} text tokens a sample"
    )
    for phase, title in (("prefill", "\nPrefill"), ("decode", "\nDecode step")):
        headings = ("plan", "host time", "range", "of unpatched", "before / in / after", "launches", "of unpatched")
        table = tight_table(*headings[:-1], "", left=("plan",), title=title)
        for row in results:
            own = row[phase]
            parts = " / ".join(f"{1e3 * value:.2f}" for value in own["parts"].values())
            launches = f"{own['launches']:,}", f"{own['launches_ratio']:.2f}"
            table.add_row(row["plan"], seconds(own["s"]), span(own["spread"]), f"{own['ratio']:.2f}", parts, *launches)
        console.print(table)
    console.print(
        f"\nhost time: process time of a call, median of {first['repeats']} rounds in turns. of unpatched: paired. "
        "before / in / after: the decoder layers, ms. launches: operations without views, and of unpatched.\n"
        + measured_on(first),
        style="bright_black",
        highlight=False,
    )


def draw_peers(console: Console, results: list[dict]) -> None:
    """Rows of `peers`: times and bytes, or why something did not run."""
    first = results[0]
    console.print(
        f"{first['model']}, {first['layers']} layers, {first['dtype']}: {first['new_tokens']} new tokens after "
        f"{first['visual_tokens']} visual and {first['text_tokens']} text tokens"
    )
    table = tight_table("", "time", "range", "speed-up", "peak MiB", left=("",))
    for row in results:
        if "why" not in row:
            size = "" if row["peak_bytes"] is None else mebibytes(row["peak_bytes"]).removesuffix(" MiB")
            table.add_row(row["peer"], seconds(row["s"]), span(row["spread"]), f"{row['speedup']:.2f}", size)
    console.print(table)
    for row in results:
        if "why" in row:
            console.print(f"{row['peer']} did not run: {row['why']}", highlight=False)
    console.print(
        f"\ntime: median of {first['repeats']} rounds in turns. speed-up: paired.\n{measured_on(first)}",
        style="bright_black",
        highlight=False,
    )


def draw_served(console: Console, results: list[dict]) -> None:
    """Rows of `bench_vllm`: first token, between tokens and throughput, dense and under the plan."""
    first = results[0]
    console.print(
        f"vLLM, {first['model']}: dense and {first['plan']}, {first['new_tokens']} new tokens after an image and "
        f"{first['text_tokens']} text tokens"
    )
    table = tight_table("at once", "", "first token", "between tokens", "tokens/s", left=("",))
    for row in results:
        for who, name in (("dense", "dense"), ("plan", row["plan"])):
            times = (seconds(row[f"{who}_{key}"] / 1e3) for key in ("ttft_ms", "tpot_ms"))
            shown = str(row["concurrency"]) if who == "dense" else ""
            table.add_row(shown, name, *times, three_digits(row[f"{who}_tokens_per_s"]))
        table.add_row("", "ratio", *(f"{row[f'ratio_{key}']:.2f}" for key in KEYS), style="bright_black")
        spread = ("{:.2f} to {:.2f}".format(*row[f"quartiles_{key}"]) for key in KEYS)
        table.add_row("", "quartiles", *spread, style="bright_black")
    console.print(table)
    console.print(
        f"\nmedians of {first['repeats']} rounds in turns, of at least {first['requests']} requests; ratios: plan over "
        "dense, paired.",
        style="bright_black",
        highlight=False,
    )


def draw_demo(console: Console, results: dict) -> None:
    """Accuracy, with the blind model's below, and cost of every plan, from the demo's figures."""
    kinds = list(results["questions"])
    table = tight_table("plan", *kinds, "= dense", left=("plan",), title="Exact answers, %")
    for row in results["plans"]:
        table.add_row(row["plan"], *(percent(row["accuracy"][k]) for k in kinds), percent(row["same_as_dense"]))
    table.add_row("blind", *(percent(results["blind"][kind]) for kind in kinds), "", style="bright_black")
    console.print(table)
    asked = " + ".join(str(count) for count in results["questions"].values())
    note = f"{asked} held-out questions. blind: text reads no visual token. = dense: same answer as dense\n"
    console.print(note, style="bright_black", highlight=False)

    headings = ("plan", "FLOPs", "prefill", "range", "speed-up", "decoder", "time", "speed-up", "KV cache")
    table = tight_table(*headings, left=("plan",), title="Cost of one question, pixels to logits")
    for row in results["plans"]:
        table.add_row(
            row["plan"],
            human(row["flops"]),
            seconds(row["prefill_s"]),
            span(row["prefill_spread_s"]),
            f"{row['speedup']:.2f}",
            human(row["decoder_flops"]),
            seconds(row["decoder_prefill_s"]),
            f"{row['decoder_speedup']:.2f}",
            f"{row['kv_bytes'] / 2**10:,.0f} KiB",
        )
    console.print(table)
    timed, machine = results["timed"], results["machine"]
    console.print(
        f"decoder: its part. batch of {timed['batch']}, median of {timed['repeats']} rounds in turns; "
        f"{machine['cpu']}, {machine['threads']} threads\n",
        style="bright_black",
        highlight=False,
    )
