"""Mutants of the executor's caches and tables."""

from .mutant import dropping, mutants, oracle

CACHE, CALL = "executor/cache.py", "executor/call.py"
STEPS = "executor/steps.py"
KEPT_CALLS, KEPT_CUTS = "executor/kept_calls.py", "executor/kept_cuts.py"

MUTANTS = mutants((
    # The KV cache
    (
        "slots counted for columns", CACHE,
        "self.length += length\n",
        "self.length += slots.column.shape[1]\n",
        "executor/test_cache.py::test_length_is_that_of_the_sequence",
    ),
    (
        "samples with other columns count as uniform", CACHE,
        "bool(slots.valid.all() and (slots.column == slots.column[:1]).all())",
        "bool(slots.valid.all())",
        "executor/test_cache_layers.py::test_reorder_of_samples_with_images_at_other_columns",
    ),
    (
        "segments of earlier calls keep their identity", CACHE,
        "earlier = earlier._replace(segment=np.where(earlier.is_visual, np.iinfo(np.int64).max, -1))",
        "pass",
        *oracle("chunks", "grid-chunks"),
    ),
    (
        "crop keeps a slot too few", CACHE,
        ".max(initial=-1) + 1",
        ".max(initial=-1)",
        "executor/test_cache.py::test_crop_of_a_batch",
    ),
    (
        "crop to a length takes it for a number to remove", CACHE,
        "max(length - tokens_to_remove, 0)",
        "tokens_to_remove",
        "executor/test_cache_layers.py::test_crop_to_a_length",
    ),
    (
        "stores grown in place under gradients", CACHE,
        "elif not self._grows_in_place():",
        "elif False:",
        "patches/test_wraps.py::test_backward_through_a_cache",
    ),
    (
        "stores grown in place while only queries train", CACHE,
        "            torch.is_grad_enabled()\n            or self.buffer.requires_grad",
        "            self.buffer.requires_grad",
        "patches/test_wraps.py::test_backward_through_a_cache",
    ),
    (
        "only one of the stores follows its samples", CACHE,
        "for store in (self.seen, self.rest):",
        "for store in (self.seen,):",
        "executor/test_cache.py::test_reorder",
    ),
    (
        "a bool mask taken for indices", CACHE,
        "self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)",
        "self._select(indices.long())",
        "executor/test_cache_layers.py::test_select_by_a_mask",
    ),
    (
        "samples repeated in turn, not in place", CACHE,
        "torch.arange(batch).repeat_interleave(repeats)",
        "torch.arange(batch).repeat(repeats)",
        "executor/test_cache.py::test_repeat_interleave",
    ),
    (
        "bytes of the whole buffers", CACHE,
        "self.used.numel() * self.buffer.element_size()",
        "self.buffer.numel() * self.buffer.element_size()",
        "executor/test_cache_layers.py::test_bytes_are_those_of_the_slots_in_use",
    ),
    (
        "a cache that is reset keeps its stores", CACHE,
        "            self.book.__init__(len(self.book.slots.sample), self.book.plan)\n"
        "        self.seen, self.rest = Store(), Store()",
        "            self.book.__init__(len(self.book.slots.sample), self.book.plan)",
        "executor/test_cache.py::test_reset",
    ),
    # Decode steps
    (
        "steps read what is masked later", STEPS,
        "read = mask.gather(1, self.columns[place][:, :taken].expand(self.batch, -1))",
        "read = torch.ones_like(self.columns[place][:, :taken], dtype=torch.bool)",
        "executor/test_steps.py::test_steps_are_the_unpatched_models[ragged]",
    ),
    (
        "steps read the prompt's padding", STEPS,
        "valid = None if self.is_whole else",
        "valid = None if True else",
        "executor/test_steps.py::test_padding_stays_unread_without_a_mask",
    ),
    (
        "tables of steps stay in the old order", STEPS,
        "[table.index_select(0, samples) for table in tables]",
        "[table.index_select(0, samples.sort().values) for table in tables]",
        "executor/test_cache.py::test_grow_after_each",
        "executor/test_steps.py::test_reordered_between_steps",
    ),
    (
        "no room is made", STEPS,
        "        if self.length > self.end:\n",
        "        if False:\n",
        "executor/test_steps.py::test_more_steps_than_there_was_room_for",
    ),
    (
        "blind heads read visual keys in steps", STEPS,
        "hidden = None if blind is None else tables.blind(blind)",
        "hidden = None",
        *oracle("one"),
    ),
    # A call's tables
    (
        "columns that are masked later are read", CALL,
        "seen, rest = book.slots.masked(mask), book.text_slots().masked(mask)\n        return cls(",
        "seen, rest = book.slots, book.text_slots()\n        return cls(",
        "executor/test_call_tables.py::test_columns_that_are_masked_later_are_read_no_longer",
    ),
    (
        "columns counted without those that left are looked up again", CALL,
        "left = self.in_sequence.keep(kept)",
        "left = self.packing.keep(kept)",
        *dropping("pyramiddrop", "left-chunks", "chunks"),
    ),
    (
        "chunks attend to themselves alone", CALL,
        "if covers and not self.packing.past else None",
        "if covers else None",
        "executor/test_parity.py::test_dense_plan_is_the_unpatched_model[llama-chunks-torch]",
        *oracle("chunks"),
    ),
    (
        "lanes write into the caller's rows", CALL,
        "return hidden.flatten(0, 1).clone(), cos, sin",
        "return hidden.flatten(0, 1), cos, sin",
        "executor/test_call_tables.py::test_rows_of_the_caller_stay_as_they_were",
    ),
    (
        "scores of the cache's first slots", CALL,
        "seen[:, end - self.packing.visual_slots.shape[1] : end]",
        "seen[:, : self.packing.visual_slots.shape[1]]",
        *dropping("fastv", "chunks"),
        "executor/test_tokens.py::test_two_turns",
    ),
    (
        "the first text row ranks", CALL,
        "return text[:, -1]",
        "return text[:, 0]",
        *dropping("fastv", "one"),
    ),
    (
        "the ranking row reads the answer behind it", CALL,
        "read = read & (self._seen.column <= last[:, None])",
        "read = read & (self._seen.column <= last.max() + 99)",
        "executor/test_prompt_ends.py::test_teacher_forcing_gives_the_logits_of_decoding",
        "executor/test_call_tables.py::test_slots_behind_the_ranking_row_are_not_read",
    ),
    (
        "layers share a mask whichever heads are blind", CALL,
        "self._patterns[seen, blind] = TextPattern(columns, slots, blind, self.device, self._general, unblind)",
        "self._patterns[seen, blind] = TextPattern(columns, slots, None, self.device, self._general)",
        *oracle("one", "left", "ragged"),
    ),
    (
        "layers share windows, stored or not", CALL,
        """        if (attention, stored) not in self._patterns:
            slots = self._seen if stored else self._unstored_slots()
            visual = self.packing.visual
            self._patterns[attention, stored] = VisualPattern(attention, visual, slots, self.device, self._general)
        return self._patterns[attention, stored]""",
        """        if attention not in self._patterns:
            slots = self._seen if stored else self._unstored_slots()
            visual = self.packing.visual
            self._patterns[attention] = VisualPattern(attention, visual, slots, self.device, self._general)
        return self._patterns[attention]""",
        "executor/test_call_tables.py::test_layers_that_store_visual_keys_and_layers_that_do_not",
    ),
    (
        "padding rows are written back", CALL,
        "return None if self._is_real.all() else self._to(np.flatnonzero(self._is_real))",
        "return None",
        "executor/test_call_tables.py::test_columns_of_padding_keep_their_values",
    ),
    # Kept tables
    (
        "kept calls never evicted", KEPT_CALLS,
        "while self._calls and sum(self._bytes.values()) > self.limit:",
        "while False:",
        "patches/test_calls.py::test_kept_tables_are_bounded",
    ),
    (
        "the newest call is evicted", KEPT_CALLS,
        "popitem(last=False)",
        "popitem(last=True)",
        "executor/test_kept_calls.py",
    ),
    (
        "a call that is used again grows no younger", KEPT_CALLS,
        "self._calls.move_to_end(key)",
        "pass",
        "executor/test_kept_calls.py",
    ),
    (
        "tables added later are not weighed", KEPT_CALLS,
        "self._bytes.pop(key, None)  # a run may add tables",
        "pass",
        "executor/test_kept_calls.py",
    ),
    (
        "views are weighed by their own size", KEPT_CALLS,
        "            while isinstance(item.base, np.ndarray):\n                item = item.base\n",
        "",
        "executor/test_kept_calls.py",
    ),
    # Kept weights
    (
        "copies kept while gradients are recorded", KEPT_CUTS,
        "if all(map(is_plain, found)) and not records_gradients(found):",
        "if all(map(is_plain, found)):",
        "executor/test_kept_cuts.py::test_training_keeps_no_copies",
    ),
    (
        "versions of parameters not asked", KEPT_CUTS,
        "if state != self._state or not _equal(seen, self._print):",
        "if not _equal(seen, self._print):",
        "executor/test_weights_seen.py::test_an_edit_of_one_element_is_seen_by_its_version",
    ),
    (
        "values of parameters not looked at", KEPT_CUTS,
        "if state != self._state or not _equal(seen, self._print):",
        "if state != self._state:",
        "executor/test_kept_cuts.py::test_no_change_of_weights_is_missed[by_copy_in_storage]",
    ),
    (
        "biases not looked at", KEPT_CUTS,
        'for p in (each["weight"], each["bias"]) if p is not None]',
        'for p in (each["weight"],)]',
        "executor/test_kept_cuts.py::test_no_change_of_weights_is_missed[by_bias]",
    ),
    (
        "the fingerprint looks at one column", KEPT_CUTS,
        "step = max(1, min(rows, columns - 1))\n    while gcd(step, columns) > 1:\n        step -= 1\n",
        "step = columns\n",
        "executor/test_kept_cuts.py::test_the_fingerprint_looks_at_every_row_and_column",
    ),
    (
        "copies let go are taken for kept", KEPT_CUTS,
        "            cut.forget()\n        self._state, self._print = None, []",
        "            cut.forget()",
        "executor/test_weights_seen.py::test_copies_that_were_let_go_are_made_again",
    ),
    # Recordings
    (
        "a recording serves two caches at once", "executor/step_graphs.py",
        "                self._free.remove(found)\n",
        "                pass\n",
        "executor/test_step_graphs.py::test_caches_side_by_side_have_recordings_of_their_own",
    ),
    (
        "weights that moved are read where they lay", "executor/step_graphs.py",
        "return bound is self._bound and places == self._places",
        "return bound is self._bound",
        "executor/test_step_graphs.py::test_changes_between_steps_are_noticed[other_data]",
    ),
    (
        "a prompt runs on the tables of another", "executor/prompt_graphs.py",
        "            if self._holds() is not call:\n",
        "            if False:\n",
        "executor/test_prompt_graphs.py::test_prompts_are_the_eager_ones[ragged-left-701-zero]",
    ),
    (
        "masks of steps stay in the recording", "executor/step_graphs.py",
        "            self._mask[:, : mask.shape[1]] = mask\n",
        "            pass\n",
        "executor/test_step_graphs.py::test_steps_are_the_eager_ones[random-600-right]",
    ),
))  # fmt: skip
