"""Mutants of what finds layouts, plans and caches of a model's calls."""

from .mutant import dense, mutants, oracle

STATE, SCOPES, ARGUMENTS = "patches/state.py", "patches/scopes.py", "patches/arguments.py"
DECODER, VERIFY, FAMILY = "patches/decoder.py", "patches/verify.py", "patches/family.py"
PLACEHOLDERS, ORIGINAL = "patches/placeholders.py", "patches/original_llava.py"
WRAPS, STAND_INS = "patches/wraps.py", "patches/stand_ins.py"

CALLS = "patches/test_calls.py"
ORIGINAL_TESTS = "patches/test_original_llava.py::test_dense_plan_is_the_unpatched_model"

MUTANTS = mutants((
    # A call's own
    (
        "layout never reset", STAND_INS,
        "        RUNNING.reset(token)",
        "        pass",
        "patches/test_state.py::test_a_layout_ends_with_its_call",
    ),
    (
        "encoder methods left wrapped after unpatch", STATE,
        "for module, name, previous in reversed(self._replaced):",
        "for module, name, previous in (each for each in self._replaced if each[1] not in self.family.methods):",
        "patches/test_table.py::test_unpatch_is_exact[Llava]",
    ),
    (
        "methods put back in the order they were replaced in", STATE,
        "for module, name, previous in reversed(self._replaced):",
        "for module, name, previous in self._replaced:",
        f"{ORIGINAL_TESTS}[one-llama]",
    ),
    (
        "what stood in a place before is thrown away", STATE,
        "            if previous is None:\n                delattr",
        "            if True:\n                delattr",
        "patches/test_state.py::test_unpatch_puts_back_what_the_caller_put_there",
    ),
    (
        "a cache of another plan is taken", STATE,
        "if name is None or asked is not None and self.plans[asked] != plan:",
        "if name is None:",
        f"{CALLS}::test_a_cache_belongs_to_its_plan",
    ),
    (
        "the plan of a cache is forgotten", STATE,
        "return name if asked is None else asked",
        "return self.default if asked is None else asked",
        f"{CALLS}::test_a_cache_belongs_to_its_plan",
    ),
    (
        "tables of another mask", STATE,
        "for table in (mask, ends, asked.kept))",
        "for table in (ends, asked.kept))",
        "patches/test_state.py::test_tables_are_those_of_the_mask",
    ),
    (
        "tables of another prompt", STATE,
        "for table in (mask, ends, asked.kept))",
        "for table in (mask, asked.kept))",
        "executor/test_prompt_ends.py::test_an_answer_changes_nothing_before_it",
    ),
    (
        "tables of another length", STATE,
        "key = None if past else (name, layout, length, device, general, *tables)",
        "key = None if past else (name, layout, device, general, *tables)",
        "patches/test_state.py::test_tables_are_those_of_the_length",
    ),
    (
        "tables of chunks kept as those of first calls", STATE,
        "key = None if past else (name, layout, length, device, general, *tables)",
        "key = (name, layout, length, device, general, *tables)",
        "patches/test_state.py::test_chunks_of_one_length_have_tables_of_their_own",
    ),
    (
        "a repeated layout leaves the cache's book empty", STATE,
        "        elif layers is not None:\n            layers[0].book.append(call.own_slots, length)\n",
        "",
        "executor/test_cache.py::test_the_callers_cache_is_used",
    ),
    (
        "layouts counted from the call", STATE,
        "return layout.window(past, past + length)",
        "return layout.window(0, length)",
        *oracle("grid-chunks", "chunks"),
    ),
    (
        "decode positions begin at 0", STATE,
        "torch.arange(past, past + length, device=inputs_embeds.device)",
        "torch.arange(length, device=inputs_embeds.device)",
        "patches/test_state.py::test_positions_go_on_where_the_cache_ends",
    ),
    (
        "M-RoPE's planes shifted", ARGUMENTS,
        "return position_ids[-3:]",
        "return position_ids[:3]",
        *dense("Qwen2VL-greedy", "Qwen3VL-greedy", "Qwen2.5VL-greedy"),
    ),
    (
        "copies of weights never refreshed", STATE,
        "            executor.kept_cuts.refresh(bound)\n",
        "            if not executor.kept_cuts.bytes:\n                executor.kept_cuts.refresh(bound)\n",
        "executor/test_kept_cuts.py::test_no_change_of_weights_is_missed[by_data]",
    ),
    (
        "old storages stay after a conversion", STAND_INS,
        "        for executor in state.executors.values():\n            executor.kept_cuts.forget()\n",
        "        pass\n",
        "executor/test_kept_cuts.py::test_old_storages_are_released",
    ),
    (
        "replaced layers ignored", WRAPS,
        "if now != then:",
        "if False:",
        "patches/test_arguments.py::test_refused_changes[replace_attention]",
    ),
    (
        "layers taken away ignored", WRAPS,
        "for number in (len(text_model.layers), text_model.config.num_hidden_layers):",
        "for number in ():",
        "patches/test_arguments.py::test_refused_changes[shorten]",
    ),
    (
        "prompt lengths repeated in turn", STATE,
        "return ends.repeat(batch // len(ends))",
        "return np.tile(ends, batch // len(ends))",
        "patches/test_state.py::test_prompt_lengths_follow_repeated_samples",
    ),
    (
        "labels of a later call counted from the start", STAND_INS,
        "prompt_ends(labels) + (0 if past is None else past.get_seq_length())",
        "prompt_ends(labels)",
        "patches/test_state.py::test_labels_behind_a_cache",
    ),
    (
        "images of a second turn placed in the first", STAND_INS,
        "return state.family.read_layout(state.outer, arguments, 0 if past is None else past.get_seq_length())",
        "return state.family.read_layout(state.outer, arguments, 0)",
        "executor/test_tokens.py::test_two_turns",
    ),
    (
        "drafts choose tokens", STAND_INS,
        "generating = Running(prompt_ends=None if spliced else np.array([prompt.shape[1]]))",
        "generating = Running()",
        "executor/test_prompt_ends.py::test_assisted_decoding_is_greedy_decoding",
    ),
    (
        "a cache is handed out though none was wanted", STATE,
        "if use_cache and past_key_values is None:",
        "if past_key_values is None:",
        "patches/test_state.py::test_no_cache_where_none_is_wanted",
    ),
    # Scopes
    (
        "what holds for one model holds for all", SCOPES,
        "if entry.owner is owner and entry.name == name",
        "if entry.name == name",
        "patches/test_scopes.py",
    ),
    (
        "the outermost value counts", SCOPES,
        "for entry in reversed(_HELD.get()):",
        "for entry in _HELD.get():",
        "patches/test_scopes.py",
    ),
    (
        "blocks end in the order they began", SCOPES,
        "_HELD.set(tuple(other for other in _HELD.get() if other is not entry))",
        "_HELD.set(_HELD.get()[:-1])",
        "patches/test_scopes.py",
    ),
    (
        "a generator's layout leaks to whoever advances it", SCOPES,
        "(entry.frame is None or _is_running(entry.frame))",
        "True",
        f"{CALLS}::test_interleaved_generators_keep_their_layouts",
    ),
    # What is refused
    (
        "the window refused a column early", ARGUMENTS,
        "past + length > window:",
        "past + length >= window:",
        "patches/test_text_models.py::test_decoding_up_to_the_window_and_no_further",
    ),
    (
        "cached columns not counted against the window", ARGUMENTS,
        "past + length > window:",
        "length > window:",
        "patches/test_text_models.py::test_decoding_up_to_the_window_and_no_further",
    ),
    (
        "is_causal=False ignored", ARGUMENTS,
        "or name in _SAME and value == _SAME[name]:",
        "or name in _SAME:",
        "patches/test_arguments.py::test_refused_arguments[is_causal]",
    ),
    (
        "unknown arguments ignored", ARGUMENTS,
        "        if name in _PACKED:\n",
        "        if name not in _PACKED:\n            continue\n        if name in _PACKED:\n",
        "patches/test_arguments.py::test_refused_arguments[unknown]",
    ),
    (
        "packed samples ignored", ARGUMENTS,
        "if attention_mask is None and not past:",
        "if False:",
        "patches/test_arguments.py::test_packed_positions",
    ),
    (
        "packing found across samples", ARGUMENTS,
        "position_ids.diff(dim=-1)",
        "position_ids.flatten().diff(dim=-1)",
        "patches/test_state.py::test_positions_of_several_samples_start_again",
    ),
    (
        "dropout of attention accepted", DECODER,
        'if getattr(config, "attention_dropout", 0.0):',
        "if False:",
        "patches/test_decoder.py::test_attention_dropout",
    ),
    (
        "fused projections overlap", DECODER,
        "                start += sizes[part]\n",
        "                start += 0\n",
        *dense("InternVL (Phi3)-prefill"),
    ),
    (
        "modules without a known place ignored", DECODER,
        "if children == structure.keys() - weightless and",
        "if children >= structure.keys() - weightless and",
        "patches/test_refusals.py::test_decoders_of_another_structure",
    ),
    (
        "only the prompt is verified", VERIFY,
        "zip(layers, (slice(0, _LENGTH), slice(_LENGTH, _LENGTH + 1))):",
        "zip(layers, (slice(0, _LENGTH),)):",
        "patches/test_verify.py::test_a_decode_step_that_differs_is_seen",
    ),
    (
        "the last layer is not verified", VERIFY,
        "*first, last})",
        "*first})",
        "patches/test_verify.py::test_a_last_layer_that_differs_is_seen",
    ),
    (
        "one kind of layer is verified in a decode step", VERIFY,
        "last}), first\n",
        "last}), first[:1]\n",
        "patches/test_verify.py::test_a_decode_step_that_differs_in_one_kind_of_layer_is_seen",
    ),
    (
        "verified at the first positions", VERIFY,
        'start = max(0, (getattr(config, "max_position_embeddings", None) or 0) - len(columns))',
        "start = 0",
        "patches/test_text_models.py::test_what_is_done_from_a_position_on_is_seen",
    ),
    (
        "a model in training is left in evaluation", VERIFY,
        "            module.training = True",
        "            pass",
        "patches/test_verify.py::test_the_check_leaves_the_mode_as_it_was",
    ),
    (
        "a rotary embedding that was called stays", VERIFY,
        "text_model.rotary_emb = copy.deepcopy(rotary)",
        "text_model.rotary_emb = rotary",
        "patches/test_verify.py::test_the_check_leaves_rotary_frequencies_as_they_were",
    ),
    (
        "a patch that fails takes the earlier one away", "patches/__init__.py",
        "    except BaseException:\n        if before is not None:\n            before.install()\n",
        "    except BaseException:\n",
        "patches/test_verify.py::test_a_patch_that_fails_leaves_the_earlier_one",
    ),
    (
        "copies over threads made", STATE,
        '        self._replace(self.text_model, "_replicate_for_data_parallel", refuse_replicas)\n',
        "",
        "patches/test_wraps.py::test_copies_over_threads_are_refused",
    ),
    (
        "several devices computed on", WRAPS,
        "if len(computing) > 1:",
        "if len(computing) > 2:",
        "patches/test_wraps.py::test_what_lies_on_the_cpu_or_disk_computes_elsewhere",
    ),
    (
        "what is offloaded counts as a device", WRAPS,
        ' - {"cpu", "disk"}\n',
        "\n",
        "patches/test_wraps.py::test_what_lies_on_the_cpu_or_disk_computes_elsewhere",
    ),
    # Where visual tokens lie
    (
        "prompts without an answer end at column 0", FAMILY,
        "np.where(answers.any(1), answers.argmax(1), answers.shape[1])",
        "answers.argmax(1)",
        "patches/test_state.py::test_prompts_end_at_the_first_label",
    ),
    (
        "a grid's tokens need not lie in a row", PLACEHOLDERS,
        "if len(run) < _size(grid) or run[-1] - run[0] + 1 != len(run):",
        "if len(run) < _size(grid):",
        "patches/test_placeholders.py::test_tokens_of_a_grid_lie_in_a_row",
    ),
    (
        "beams take the first samples", PLACEHOLDERS,
        "enumerate(columns[::times])",
        "enumerate(columns[: len(columns) // times])",
        *dense("Llava-beams", "Qwen2VL-beams"),
    ),
    (
        "cached columns not counted", PLACEHOLDERS,
        "(start + past, grid, name)",
        "(start, grid, name)",
        "executor/test_tokens.py::test_two_turns",
    ),
    (
        "features as a tuple forget their grids", PLACEHOLDERS,
        'output = plain(*args, **(kwargs | {"return_dict": True} if wants_tuple else kwargs))',
        "output = plain(*args, **kwargs)",
        "patches/test_placeholders.py::test_features_as_a_tuple",
    ),
    (
        "every image of several is tiled", "patches/llava_next.py",
        "[n == 1 for n in counts for _ in range(n)]",
        "[True for n in counts for _ in range(n)]",
        *dense("LlavaOnevision-two images"),
    ),
    (
        "patches counted for merged tokens", "patches/qwen_vl.py",
        "(frames, height // merge, width // merge)",
        "(frames, height // merge, width)",
        *dense("Qwen2VL-prefill"),
    ),
    (
        "an image for a sample without one", ORIGINAL,
        "            next(features)  # the package skips an image there",
        "            pass",
        "patches/test_original_llava_layout.py::test_a_sample_without_an_image_uses_one_up",
    ),
    (
        "the placeholder counts as a column", ORIGINAL,
        "at += token != _IMAGE_TOKEN",
        "at += 1",
        f"{ORIGINAL_TESTS}[two-llama]",
    ),
    (
        "left padding forgotten", ORIGINAL,
        "[(start + longest - length, grid) for start, grid in placed]",
        "[(start, grid) for start, grid in placed]",
        "patches/test_original_llava_layout.py::test_padding_on_the_left_moves_the_shorter_sample",
    ),
))  # fmt: skip
