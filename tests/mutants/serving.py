"""Mutants of plans inside engines: rows, sequences, layouts, salts."""

from .mutant import mutants

STEP, TABLES, KINDS = "serving/step.py", "serving/tables.py", "serving/kinds.py"
RUNTIME, LANES, BACKENDS = "serving/runtime.py", "serving/lanes.py", "serving/backends.py"
REQUESTS, CUTS = "serving/requests.py", "serving/cuts.py"
READS = "serving/test_tables.py::test_every_query_reads_its_keys"
ROOM = "serving/test_tables.py::test_what_a_layer_without_visual_keys_has_no_room_for"
COMPANY = "serving/test_lanes.py::test_plans_in_company[llama-gqa]"
SHARED = "serving/test_lanes.py::test_prefixes_are_shared_within_a_plan_only"
SHARDS = "serving/test_lanes.py::test_shards_of_an_ffn_add_up"

MUTANTS = mutants((
    (
        "an image that begins right behind the step is in it", STEP,
        "(batch.starts < self.end[:, None])",
        "(batch.starts <= self.end[:, None])",
        READS,
    ),
    (
        "the token behind an image is visual", STEP,
        "(self.position < end[self.request])",
        "(self.position <= end[self.request])",
        READS,
    ),
    (
        "the token behind an image counts it not", STEP,
        "* (self.position >= end[self.request])",
        "* (self.position > end[self.request])",
        READS,
    ),
    (
        "text that reads images leaves them out", STEP,
        "np.where(kind[request] == TEXT, batch.before",
        "np.where(kind[request] > 0, batch.before",
        READS,
    ),
    (
        "visual queries are a sequence of text", STEP,
        "whole = kind == ALL",
        "whole = kind < ALL",
        READS,
    ),
    (
        "segments that touch stay two", STEP,
        "if runs and sum(runs[-1]) == first:",
        "if runs and sum(runs[-1]) > first:",
        "serving/test_tables.py::test_segments_that_touch_are_one",
    ),
    (
        "blocks left out from the block behind", TABLES,
        "(own >= from_block[:, None])",
        "(own > from_block[:, None])",
        READS,
    ),
    (
        "images that come later are left out too", TABLES,
        "left_out = shifted & (sequences.run > segment)",
        "left_out = shifted & (sequences.run >= segment)",
        READS,
    ),
    (
        "heads are not filled at the first token of a step", TABLES,
        "(step.first <= end)",
        "(step.first < end)",
        READS,
    ),
    (
        "a head is copied from the block behind", TABLES,
        "start[request] // block, end[request] // block",
        "(start[request] + block) // block, end[request] // block",
        READS,
    ),
    (
        "requests in blocks are moved to the front", TABLES,
        "(step.kind(kinds) == TEXT) & step.batch.compact &",
        "(step.kind(kinds) == TEXT) &",
        READS,
    ),
    (
        "broken images fit blocks", TABLES,
        "all(length % block == 0 for",
        "any(length % block == 0 for",
        READS, "serving/test_tables.py::test_an_image_of_broken_blocks_does_not_fit_layout_b",
    ),
    (
        "the block in which an image begins holds nothing", TABLES,
        "range(-(-start // block), (start + length) // block)",
        "range(start // block, (start + length) // block)",
        READS, ROOM,
    ),
    (
        "the block in which an image ends holds nothing", TABLES,
        "range(-(-start // block), (start + length) // block)",
        "range(-(-start // block), -(-(start + length) // block))",
        READS, ROOM,
    ),
    (
        "images that are still to come have no text", TABLES,
        "sum(min(max(count - start, 0), length)",
        "sum(min(abs(count - start), length)",
        READS, ROOM,
    ),
    (
        "attention full without reads is taken", KINDS,
        "if work.query_heads and not work.reads:",
        "if work.query_heads and work.reads is None:",
        "serving/test_requests.py::test_plans_that_an_engine_cannot_run_are_refused",
    ),
    (
        "plans share prefixes", REQUESTS,
        "    if note[\"plan\"]:\n",
        "    if note[\"plan\"] is None:\n",
        "serving/test_requests.py::test_salts_keep_plans_apart", SHARED,
    ),
    (
        "compact requests share prefixes", REQUESTS,
        "if note[\"compact\"] and note[\"plan\"] in lays_out:",
        "if note[\"compact\"] and note[\"plan\"] not in lays_out:",
        "serving/test_requests.py::test_salts_keep_plans_apart", SHARED,
    ),
    (
        "a batch of the same size is the same batch", RUNTIME,
        "all(map(operator.is_, self._members, members))",
        "all(map(operator.is_not, self._members, [None] * len(members)))",
        "serving/test_requests.py::test_a_batch_that_stays_is_not_read_again",
    ),
    (
        "keys are not written anew after a copy", BACKENDS,
        "kv_cache[target] = kv_cache[source]\n            update(layer, key, value, kv_cache, slot_mapping)",
        "kv_cache[target] = kv_cache[source]",
        COMPANY, SHARED,
    ),
    (
        "the forward of the step before", RUNTIME,
        "step, self.step = self.step, None",
        "step = self.step",
        "serving/test_requests.py::test_a_batch_that_stays_is_not_read_again",
    ),
    (
        "visual keys of a layer are those of all its rows", LANES,
        "step.rows_of(layer.attention, READ)",
        "step.rows_of(layer.attention, TEXT)",
        COMPANY,
    ),
    (
        "every shard adds the bias", CUTS,
        "down.bias if shards.rank == 0 else None",
        "down.bias",
        SHARDS,
    ),
    (
        "a shard takes the first shard's neurons", CUTS,
        "first = shards.rank * held",
        "first = 0 * held",
        SHARDS,
    ),
))  # fmt: skip
