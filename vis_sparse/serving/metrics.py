"""Counters beside vLLM's own, counted where requests come in."""

from __future__ import annotations

from functools import cache

from .savings import Savings


@cache
def _counters():
    from prometheus_client import Counter

    def counter(name: str, what: str):
        return Counter(f"vis_sparse:{name}", what, ["plan"])

    return (
        counter("requests", "Requests by the plan that they follow."),
        counter("visual_tokens", "Visual tokens of their prompts."),
        counter(
            "attention_rows_not_dispatched",
            "Rows of visual tokens that enter no attention, over layers (prefix hits in).",
        ),
        counter("ffn_rows_not_dispatched", "Rows of visual tokens that enter no FFN, over layers (prefix hits in)."),
        counter("keys_not_written", "Keys of visual tokens that are neither computed nor read, over layers."),
        counter("kv_blocks_not_held", "Blocks of keys that prompts do without, over layers with tables of their own."),
    )


def count(plan: str, visual_tokens: int, savings: Savings, blocks: int) -> None:
    """A request of `plan` with this many visual tokens, which holds `blocks` blocks less, over layers."""
    per_token = (savings.attention_rows, savings.ffn_rows, savings.keys)
    amounts = [1, visual_tokens, *(visual_tokens * each for each in per_token), blocks]
    for counter, amount in zip(_counters(), amounts):
        counter.labels(plan=plan).inc(amount)
