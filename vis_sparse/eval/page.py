"""The demo's HTML page: one file, nothing loaded from anywhere, light and dark."""

from __future__ import annotations

import math
from html import escape

from .html import CSS, bar, document, table_row
from .layer_work import of_thumbnail, outline, runs_in_words
from .numbers import percent, span, three_digits

KIND_NAMES = {
    "easy_vqa": "easy-VQA",
    "place": "which digit where",
    "count": "how many",
    "exists": "is there one",
    "reading": "what a line says",
}


def page(results: dict) -> str:
    """The whole page, as HTML text, from the demo's figures."""
    sections = [_head(results), _accuracy(results), _cost(results), _layers(results), _examples(results), _how(results)]
    return document("vis_sparse demo", CSS.read_text(encoding="utf-8"), sections)


def _head(results: dict) -> str:
    dense, auto = results["plans"][:2]
    asked = sum(results["questions"].values())
    model = results["model"]
    tokens = " to ".join(str(count) for count in sorted(set(model["visual_tokens"])))
    facts = (
        (f"{auto['flops'] / dense['flops']:.0%}", "of the FLOPs from pixels to logits"),
        (f"{auto['speedup']:.2f}×", "speed from pixels to logits"),
        (f"{auto['flops_visual'] / dense['flops_visual']:.0%}", "of the decoder’s FLOPs for visual tokens"),
        (f"{auto['kv_bytes'] / dense['kv_bytes']:.0%}", "of the KV cache"),
        (f"{auto['same_as_dense']:.1%}", "of the answers the same as dense"),
    )
    tiles = "".join(f"<div><dt>{what}</dt><dd>{value}</dd></div>" for value, what in facts)
    return f"""<header>
<p class="brand">vis_sparse demo</p>
<h1>Every visual token stays.<br>Its computation need not.</h1>
<p>A {model["name"]} of {model["parameters"] / 1e6:.1f} million parameters, {model["layers"]} decoder layers
and {tokens} visual tokens an image answers {asked} held-out questions: unpatched (<b>dense</b>), and under plans
for what its visual tokens compute. No plan was trained for. Under <b>auto</b>, the default:</p>
<dl class="facts">{tiles}</dl>
</header>"""


def _accuracy(results: dict) -> str:
    kinds = list(results["questions"])
    heads = "".join(f'<th scope="col">{KIND_NAMES.get(kind, kind)}</th>' for kind in kinds)
    rows = [
        table_row(row["plan"], [percent(row["accuracy"][kind]) for kind in kinds] + [percent(row["same_as_dense"])])
        for row in results["plans"]
    ]
    rows.append(table_row("blind", [percent(results["blind"][kind]) for kind in kinds] + [""], "quiet"))
    return f"""<section aria-labelledby="accuracy"><h2 id="accuracy">Answers</h2>
<table><caption>Questions answered exactly, in percent; last, the same answer as dense</caption>
<thead><tr><th scope="col">plan</th>{heads}<th scope="col">same as dense</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table>
<p class="note">{max(results["questions"].values())} held-out questions of each kind: one standard error is up to
{_largest_error(results):.1f} points. <b>blind</b> is the same model when text reads no visual token: a score near it
says nothing about seeing.</p>
</section>"""


def _largest_error(results: dict) -> float:
    """Standard error of a share, in points, the largest over the table."""
    return max(
        100 * math.sqrt(row["accuracy"][kind] * (1 - row["accuracy"][kind]) / count)
        for row in results["plans"]
        for kind, count in results["questions"].items()
    )


def _cost(results: dict) -> str:
    dense = results["plans"][0]
    quantities = (
        ("MFLOPs", "flops", 1e6),
        ("prefill, ms", "prefill_s", 1e-3),
        ("speed-up", "speedup", None),
        ("decoder’s MFLOPs", "decoder_flops", 1e6),
        ("visual MFLOPs", "flops_visual", 1e6),
        ("decoder, ms", "decoder_prefill_s", 1e-3),
        ("speed-up", "decoder_speedup", None),
        ("KV cache, KiB", "kv_bytes", 2**10),
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name, _, _ in quantities)
    rows = []
    for row in results["plans"]:
        cells = [
            f"{row[key]:.2f}×" if unit is None else bar(three_digits(row[key] / unit), row[key] / dense[key])
            for _, key, unit in quantities
        ]
        rows.append(table_row(row["plan"], cells))
    timed = results["timed"]
    spans = ", ".join(f"{row['plan']} {span(row['prefill_spread_s'])} ms" for row in results["plans"])
    return f"""<section aria-labelledby="cost"><h2 id="cost">Cost of one question</h2>
<table><caption>The whole prefill, from pixels to logits, then the decoder in it; bars against dense</caption>
<thead><tr><th scope="col">plan</th>{heads}</tr></thead>
<tbody>{"".join(rows)}</tbody></table>
<p class="note">Time: a batch of {timed["batch"]} questions, each of {timed["visual_tokens"]} visual and
{timed["text_tokens"]} text tokens, plans in turns, median of {timed["repeats"]} rounds, divided by the
batch. Fastest to slowest round: {spans}. A model this small spends
much of its time on other things than arithmetic; <code>vis-sparse bench</code> times full widths.</p>
</section>"""


def _layers(results: dict) -> str:
    height, width = results["model"]["grid"]
    image = results["model"]["image_png"]
    shares = sorted({layer["share"] for row in results["plans"] for layer in row["layers"]})
    masks = "".join(_mask(index, share, height, width) for index, share in enumerate(shares))
    columns = "".join(f'<th scope="col"><span>layer</span> {i}</th>' for i in range(results["model"]["layers"]))
    bodies = []
    for row in results["plans"]:
        total = row["flops_visual"] / results["plans"][0]["flops_visual"]
        tiles = "".join(
            f"<td>{_tile(layer, shares.index(layer['share']), height, width)}<span>{layer['share']:.0%}</span></td>"
            for layer in row["layers"]
        )
        bodies.append(
            f'<tbody><tr><th scope="rowgroup" colspan="{len(row["layers"])}">{escape(row["plan"])} '
            f"<span>{total:.0%} of the visual work. Layers {escape(runs_in_words(row['layers']))}</span></th></tr>"
            f"<tr>{tiles}</tr></tbody>"
        )
    return f"""<section aria-labelledby="layers"><h2 id="layers">What each layer still computes</h2>
<p class="note">One square is one visual token{of_thumbnail(results["model"])}, its
area the share of the dense layer's work that is done for it. The line encloses what the marked token attends to among
visual tokens. Empty: the layer neither reads nor changes visual tokens, nothing is dispatched for them.</p>
<svg width="0" height="0" aria-hidden="true" class="defs"><defs>
<image id="picture" width="{width}" height="{height}" preserveAspectRatio="none" \
href="data:image/png;base64,{image}"/>{masks}</defs></svg>
<table class="layers"><caption class="hidden">Share of the dense layer's visual work, by plan and layer</caption>
<thead><tr>{columns}</tr></thead>{"".join(bodies)}</table>
</section>"""


def _mask(index: int, share: float, height: int, width: int) -> str:
    side = math.sqrt(share)
    corner = (1 - side) / 2
    return (
        f'<pattern id="p{index}" width="1" height="1" patternUnits="userSpaceOnUse">'
        f'<rect x="{corner:.3f}" y="{corner:.3f}" width="{side:.3f}" height="{side:.3f}" fill="#fff"/></pattern>'
        f'<mask id="m{index}"><rect width="{width}" height="{height}" fill="url(#p{index})"/></mask>'
    )


def _tile(layer: dict, mask: int, height: int, width: int) -> str:
    frame = f'viewBox="-.3 -.3 {width + 0.6} {height + 0.6}" role="img"'
    label = escape(_label(layer))
    if layer["share"] == 0:
        return f'<svg {frame} aria-label="{label}"><rect class="off" width="{width}" height="{height}"/></svg>'
    seen = ""
    if layer["seen"]:
        path = "".join(f"M{x0} {y0}L{x1} {y1}" for x0, y0, x1, y1 in outline(layer["seen"], width))
        seen = f'<path d="{path}"/><rect class="query" x="{width // 2}" y="{height // 2}" width="1" height="1"/>'
    return (
        f'<svg {frame} aria-label="{label}"><rect class="back" width="{width}" height="{height}"/>'
        f'<use href="#picture" mask="url(#m{mask})"/>{seen}</svg>'
    )


def _label(layer: dict) -> str:
    return f"{runs_in_words([layer]).removeprefix('0: ')}; {layer['share']:.0%} of the work"


def _examples(results: dict) -> str:
    cards = []
    for example in results["examples"]:
        rows = [
            f'<tr class="{"right" if words == example["answer"] else "wrong"}{" quiet" if plan == "blind" else ""}">'
            f'<th scope="row">{escape(plan)}</th><td>{escape(words) or "–"}</td>'
            f"<td>{'right' if words == example['answer'] else 'wrong'}</td></tr>"
            for plan, words in example["given"].items()
        ]
        width, height = example["image_size"]
        cards.append(
            f'<article><img src="data:image/png;base64,{example["image_png"]}" width="{width}" height="{height}" '
            f'alt="Held-out image, {KIND_NAMES.get(example["kind"], example["kind"])}">'
            f'<h3>{escape(example["question"])}</h3><table><caption class="hidden">Answers</caption>'
            '<thead class="hidden"><tr><th scope="col">plan</th><th scope="col">answer</th><th scope="col">is</th></tr>'
            f"</thead><tbody>{''.join(rows)}</tbody></table></article>"
        )
    return f"""<section aria-labelledby="examples"><h2 id="examples">A question of each kind</h2>
<div class="cards">{"".join(cards)}</div>
</section>"""


def _how(results: dict) -> str:
    machine, versions = results["machine"], results["versions"]
    plans = "".join(f"<dt>{escape(row['plan'])}</dt><dd>{escape(row['about'])}</dd>" for row in results["plans"])
    return f"""<section aria-labelledby="how"><h2 id="how">How this was made</h2>
<dl class="plans">{plans}</dl>
<p class="note"><code>vis-sparse demo --family {results["model"]["family"]} --questions \
{sum(results["questions"].values())}</code> on {results["date"][:10]};
{escape(machine["cpu"])}, {machine["threads"]} threads, device {escape(machine["device"])}; vis_sparse
{versions["vis_sparse"]}, torch {versions["torch"]}, transformers {versions["transformers"]},
Python {versions["python"]}. FLOPs count a multiply-add as two. The prefill is vision tower, projector, decoder
and LM head; the tower is unpatched but under whole plans. Where a plan keeps only some heads, they are those
with the highest scores of a calibration, shipped with the checkpoint.</p>
</section>"""
