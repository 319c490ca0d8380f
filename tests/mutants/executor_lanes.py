"""Mutants of the executor's lanes, of what chooses tokens, and of weights."""

from .mutant import dropping, mutants, oracle

LANES, HEADS = "executor/lanes.py", "executor/head_map.py"
LAYER, ROWS = "executor/layer.py", "executor/rows.py"
SCORES, TOKENS = "executor/token_scores.py", "executor/tokens.py"
BOUND = "executor/bound.py"
INTERNALS, WEIGHTS = "executor/transformers_internals.py", "executor/weights.py"

MUTANTS = mutants((
    # Lanes
    (
        "groups share values though some count as zero", HEADS,
        "expand = groups if zero and 0 < len(work.value_heads) < num_heads else 1",
        "expand = 1",
        *oracle("one"),
    ),
    (
        "text reads what it must not", HEADS,
        "readers = work.value_heads if work.reads and not zero else heads if zero else ()",
        "readers = work.value_heads if not zero else heads",
        *dropping("unread between", "one"),
    ),
    (
        "visual heads lined up whatever is cut", HEADS,
        "None if lined_up else places,",
        "None,",
        *oracle("one", "left"),
    ),
    (
        "windows ignored where all heads are kept", LAYER,
        ' and work.attention == "full"',
        "",
        "executor/test_parity.py::test_shipped_plan_is_the_oracle[yopo-25-exclude-torch]",
        *dropping("near", "one"),
    ),
    (
        "text sees visual rows in layers that do not read them", LAYER,
        " and heads.blind is None",
        "",
        *dropping("unread between", "one"),
    ),
    (
        "visual rows stop a layer early", LANES,
        "if index == self.last_use + 1:",
        "if index == self.last_use:",
        *oracle("one"),
    ),
    (
        "layers that only read visual keys do not use them", LAYER,
        "return bool(self.work.key_heads) or self.work.updates",
        "return self.work.updates",
        *oracle("one", "left"),
    ),
    (
        "visual rows turned by the text's positions", LAYER,
        "(cos[num_text:], sin[num_text:]))",
        "(cos[: len(cos) - num_text], sin[: len(sin) - num_text]))",
        "executor/test_parity.py::test_random_plan_is_the_oracle[llama-gqa-frames-exclude-torch]",
        *oracle("one"),
    ),
    (
        "forgotten keys joined in another order", LAYER,
        "torch.cat([*past, visual, self.visual_units(text, 3)], 1)",
        "torch.cat([*past, self.visual_units(text, 3), visual], 1)",
        "executor/test_call_tables.py::test_layers_that_store_visual_keys_and_layers_that_do_not",
    ),
    (
        "values of heads that are cut count", LAYER,
        "        if self.zeroed:\n            flat =",
        "        if False:\n            flat =",
        *oracle("one"),
    ),
    (
        "an FFN without neurons adds its bias", LAYER,
        "self.cuts_ffn = len(neurons) > 0 and not self.whole_ffn",
        "self.cuts_ffn = not self.whole_ffn",
        "executor/test_call_tables.py::test_an_ffn_without_neurons_adds_nothing",
    ),
    (
        "heads that do not read rank too", LAYER,
        "if heads.blind is not None:\n            readers =",
        "if False:\n            readers =",
        "executor/test_tokens_kept.py::test_heads_that_read_no_visual_token_give_it_nothing",
    ),
    (
        "layers behind a cut share the book before it", LANES,
        "leaves = [lane.work.tokens is not None for lane in self.layers[:-1]]",
        "leaves = [False for lane in self.layers[:-1]]",
        "executor/test_tokens.py::test_bytes_of_the_cache_are_the_counted_ones",
        *dropping("fastv", "decode"),
    ),
    (
        "cached text is not expanded", LANES,
        "permute(0, 3, 1, 2, 4).repeat_interleave(lane.heads.expand, dim=3)",
        "permute(0, 3, 1, 2, 4).repeat(1, 1, 1, lane.heads.expand, 1)",
        *oracle("chunks", "left-chunks", "adjacent-chunks"),
    ),
    (
        "what DeepStack adds is not cut with its rows", LANES,
        "                for _, kept in passed:\n                    rows = rows.index_select(0, kept)\n",
        "                rows = rows[: x.shape[0] - call.num_text]\n",
        "patches/test_table.py::test_plan_under_which_tokens_leave_is_the_oracle[Qwen3VL-prefill]",
        "patches/test_table.py::test_plan_under_which_tokens_leave_is_the_oracle[Qwen3VL-left padding]",
    ),
    (
        "norms of the first rows", LANES,
        "scores = norms(x[call.num_text :].detach())",
        "scores = norms(x[: len(x) - call.num_text].detach())",
        *dropping("norm", "one"),
    ),
    (
        "rows that left put back in the wrong order", LANES,
        "for before, kept in reversed(passed):",
        "for before, kept in passed:",
        "executor/test_tokens.py::test_tokens_that_left_keep_their_last_value[pyramiddrop]",
    ),
    (
        "checkpointing needs inputs with gradients", LANES,
        "use_reentrant=False",
        "use_reentrant=True",
        "executor/test_training.py::test_checkpointing_with_frozen_inputs",
    ),
    (
        "rows added in place under gradients", ROWS,
        "if not (x.requires_grad or delta.requires_grad):",
        "if True:",
        "executor/test_checkpointing.py::test_same_gradients_from_layers_run_twice",
        "executor/test_tokens.py::test_gradients[fastv]",
    ),
    (
        "products and rotations written over recorded ones", LANES,
        "in_place = not (recording or",
        "in_place = not (",
        "executor/test_training.py",
    ),
    # Modules as they are bound
    (
        "replaced modules not noticed", BOUND,
        "all(map(is_, map(dict.get, self._owners, self._names), self._found))\n            and ",
        "",
        "executor/test_bound.py::test_a_change_is_noticed[replaced]",
    ),
    (
        "classes not compared", BOUND,
        "all(map(is_, map(type, self._modules), self._types))\n            and ",
        "",
        "executor/test_bound.py::test_a_change_is_noticed[class]",
    ),
    (
        "hooks not compared", BOUND,
        "list(map(bool, self._hooks)) == self._heard\n            and ",
        "",
        "executor/test_bound.py::test_a_change_is_noticed[hook]",
    ),
    (
        "own functions not compared", BOUND,
        "self._with_own_functions() == self._replaced\n            and ",
        "",
        "executor/test_bound.py::test_a_change_is_noticed[forward]",
    ),
    (
        "kinds of weights not compared", BOUND,
        "            and self._kinds_of_weights() == self._kinds\n",
        "",
        "executor/test_bound.py::test_a_change_is_noticed[weight]",
    ),
    # Which tokens stay
    (
        "the head with most attention decides", SCORES,
        "shares.index_select(1, heads)).mean(1)",
        "shares.index_select(1, heads)).amax(1)",
        *dropping("fastv", "left", "ragged", "chunks"),
    ),
    (
        "padding takes a share of the attention", SCORES,
        "if unread is not None:",
        "if False:",
        *dropping("fastv", "left", "right", "ragged"),
    ),
    (
        "the lowest scores stay", TOKENS,
        "np.argsort(-scores, kind",
        "np.argsort(scores, kind",
        "executor/test_tokens.py::test_orders_by_score_take_the_highest_and_of_equal_ones_the_first",
    ),
    (
        "equal scores in any order", TOKENS,
        ', kind="stable")',
        ")",
        "executor/test_tokens_kept.py::test_of_many_equal_scores_the_first_stay",
    ),
    (
        "the same random tokens in every layer", TOKENS,
        "np.random.default_rng(layer)",
        "np.random.default_rng(0)",
        "executor/test_tokens.py::test_random_tokens_are_the_same_in_every_call_and_others_in_every_layer",
    ),
    (
        "even spacing begins at the first token", TOKENS,
        "(2 * np.arange(count) + 1) * of // (2 * max(count, 1))",
        "np.arange(count) * of // max(count, 1)",
        "executor/test_tokens.py::test_orders_that_look_at_places",
    ),
    (
        "sub-grids of one height mixed up", TOKENS,
        "inside |= lies & (visual.height == height) & (visual.width == width)",
        "inside |= lies & (visual.height == height)",
        "executor/test_tokens_kept.py::test_grids_of_one_height_have_their_own_sub_grids",
    ),
    (
        "the first word of the answer ranks", TOKENS,
        "(columns < prompt_ends[:, None])",
        "(columns <= prompt_ends[:, None])",
        "executor/test_prompt_ends.py::test_teacher_forcing_gives_the_logits_of_decoding",
    ),
    (
        "prompts counted from the call, not from the start", TOKENS,
        "columns = packing.text_columns + packing.past",
        "columns = packing.text_columns",
        "executor/test_tokens_kept.py::test_prompts_that_came_in_two_calls",
    ),
    (
        "text of another sample follows the image", TOKENS,
        "> last[packing.visual.sample]",
        "> last.max()",
        "executor/test_tokens.py::test_images_without_text_after_them_have_nobody_to_choose",
    ),
    # What is asked of transformers
    (
        "offloaded caches not refused", INTERNALS,
        'and not getattr(cache, "offloading", False)',
        "",
        "patches/test_caches.py::test_offloaded_caches",
    ),
    (
        "checkpointing in evaluation too", INTERNALS,
        "torch.is_grad_enabled() and block.training and getattr",
        "torch.is_grad_enabled() and getattr",
        "executor/test_training.py::test_checkpointing_is_off_in_evaluation",
    ),
    (
        "any cache is taken", INTERNALS,
        "return holds and plain and",
        "return holds and",
        "patches/test_caches.py::test_caches_with_other_layers",
    ),
    # Weights
    (
        "is_plain ignores hooks", WEIGHTS,
        'held["_forward_hooks"]\n        or held["_forward_pre_hooks"]\n        or ',
        "",
        "executor/test_kept_cuts.py::test_hooks_on_projections_run",
    ),
    (
        "is_plain ignores replaced forwards", WEIGHTS,
        '        or "_hf_hook" in held\n        or "forward" in held\n',
        "",
        "executor/test_weights_seen.py::test_a_replaced_forward_is_called",
    ),
    (
        "subclasses of Linear taken for it", WEIGHTS,
        "return type(module) is nn.Linear and",
        "return isinstance(module, nn.Linear) and",
        "executor/test_weights_seen.py::test_a_subclass_is_called",
    ),
    (
        "biases of cut outputs lost", WEIGHTS,
        "return self._columns(weight, 1), bias",
        "return self._columns(weight, 1), None",
        "executor/test_parity.py::test_random_plan_is_the_oracle[llama-bias-one-exclude-torch]",
        "executor/test_parity.py::test_random_plan_is_the_oracle[llama-bias-left-zero-torch]",
    ),
    (
        "copies made in inference mode", WEIGHTS,
        "with torch.inference_mode(False), torch.no_grad():\n            self._kept",
        "with torch.no_grad():\n            self._kept",
        "executor/test_parity.py::test_training_a_projector_after_inference_mode",
    ),
    (
        "autocast ignored", WEIGHTS,
        '        and not torch.is_autocast_enabled("cpu")\n',
        "",
        "executor/test_weights.py::test_autocast_is_obeyed",
    ),
    (
        "gradients of inputs lost", WEIGHTS,
        "(x.requires_grad or weight.requires_grad)",
        "weight.requires_grad",
        "executor/test_training.py::test_gradients_of_inputs_through_frozen_weights",
    ),
))  # fmt: skip
