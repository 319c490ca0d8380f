"""Mutants of tokens before the decoder."""

from .mutant import mutants

SCORES, TOKENS, CALL = "executor/before_scores.py", "executor/tokens.py", "executor/call.py"
BEFORE, TOWER, TABLES = "patches/before.py", "patches/tower_patch.py", "executor/tower_tables.py"

LANES = "executor/test_before_lanes.py::test_plans_are_the_oracle"

MUTANTS = mutants((
    (
        "frames are compared with the one behind", SCORES,
        "earlier = later - (visual.height * visual.width)[later]",
        "earlier = later",
        "executor/test_before.py::test_by_change_the_first_frame_stays_and_then_what_differs_most",
    ),
    (
        "tokens do not repel one another", SCORES,
        "rest = rest - along.square()",
        "rest = rest.clone()",
        "executor/test_before.py::test_relevance_takes_what_adds_most_to_the_determinant",
    ),
    (
        "a token like the one above alone leaves", SCORES,
        "((own - left).abs().amax(-1) <= tolerance) & ",
        "",
        "executor/test_before.py::test_a_token_leaves_if_it_equals_those_to_the_left_and_above",
    ),
    (
        "patches of a token row by row of the image", SCORES,
        "np.lexsort((x, y, x // merge, y // merge, rows.sequence[patches]))",
        "np.lexsort((x, y, rows.sequence[patches]))",
        "executor/test_before.py::test_patches_of_a_token",
    ),
    (
        "shares of whole samples", TOKENS,
        "visual._replace(sample=visual.segment), scores)",
        "visual, scores)",
        "executor/test_before.py::test_every_segment_keeps_its_share_of_highest_scores",
    ),
    (
        "the first frame competes", TOKENS,
        "stays = visual.frame == 0",
        "stays = visual.frame < 0",
        "executor/test_before.py::test_by_change_the_first_frame_stays_and_then_what_differs_most",
    ),
    (
        "rows that stay are taken from the first columns", CALL,
        "self._row_index if self.in_sequence is self.packing else self._to(self.in_sequence.row_index())",
        "self._row_index",
        f"{LANES}[stride-left-torch]",
    ),
    (
        "slots of a known call at the columns of what is left", CALL,
        "return self.in_sequence.slots()",
        "return self.packing.slots()",
        "executor/test_before_lanes.py::test_layouts_that_repeat_keep_their_tables_by_what_stays",
        "executor/test_before_lanes.py::test_a_kept_cache_goes_on_and_its_bytes_are_the_counted_ones",
    ),
    (
        "tables of other tokens", "patches/state.py",
        "for table in (mask, ends, asked.kept))",
        "for table in (mask, ends))",
        "executor/test_before_lanes.py::test_layouts_that_repeat_keep_their_tables_by_what_stays",
    ),
    (
        "answers have a say", BEFORE,
        "is_text &= columns < ends[:, None]",
        "pass",
        "executor/test_before_lanes.py::test_the_prompts_text_chooses_by_relevance",
    ),
    (
        "padding has a say", BEFORE,
        "else asked.mask[:, asked.past :].copy()",
        "else np.ones_like(asked.mask[:, asked.past :])",
        "executor/test_before_lanes.py::test_the_prompts_text_chooses_by_relevance",
    ),
    (
        "beams go on in what was said", BEFORE,
        "start = first\n",
        "first = start\n",
        "patches/test_before.py::test_beams_repeat_what_the_tower_said",
    ),
    (
        "duplicates run in the tower", TOWER,
        "return tables if stays.all() else tables.only(patches[stays].ravel())",
        "return tables",
        "patches/test_before.py::test_duplicates_leave_before_the_tower",
    ),
    (
        "received from all patches where there is a class token", TABLES,
        "asking = globals_ if globals_.shape[1] else index",
        "asking = index",
        "patches/test_before_tower.py::test_attention_received_in_the_last_layer_that_runs",
    ),
))
