"""Mutants of layouts, packing and image grids."""

from .mutant import mutants, oracle

LAYOUT, PACKING = "layout/layout.py", "layout/packing.py"
IMAGES, VIDEOS = "layout/image_grids.py", "layout/video_grids.py"

MUTANTS = mutants((
    (
        "segments that touch overlap", LAYOUT,
        "previous.end > segment.start",
        "previous.end >= segment.start",
        "layout/test_layout.py::test_segments_may_touch_and_samples_may_repeat_positions",
    ),
    (
        "samples of a layout repeated in turn, not in place", LAYOUT,
        "sample=s.sample * times + k)",
        "sample=s.sample + k * self.batch_size)",
        "layout/test_layout.py::test_expanded_repeats_each_sample_in_place",
    ),
    (
        "a segment that begins at the end lies before it", LAYOUT,
        "if s.start < end))",
        "if s.start <= end))",
        "executor/test_parity.py::test_random_plan_is_the_oracle[llama-grid-chunks-exclude-torch]",
    ),
    (
        "height and width swapped", PACKING,
        "s.height * one, s.width * one)",
        "s.width * one, s.height * one)",
        "executor/test_tokens.py::test_orders_that_look_at_places",
    ),
    (
        "rows of a grid run down its columns", PACKING,
        "frame, y, x = (a.ravel() for a in np.indices((s.frames, s.height, s.width)))",
        "frame, x, y = (a.ravel() for a in np.indices((s.frames, s.width, s.height)))",
        "executor/test_tokens.py::test_orders_that_look_at_places",
    ),
    (
        "rows of chunks counted from the start of the sequence", PACKING,
        "self.visual.sample * self.length + self.visual.column - self.past])",
        "self.visual.sample * self.length + self.visual.column])",
        "layout/test_packing.py::test_rows_of_a_chunk_are_its_own_and_slots_those_of_the_sequence",
    ),
    (
        "text slots of chunks begin at column 0", PACKING,
        "text_coordinates(sample, self.text_columns + self.past, self.text_valid)",
        "text_coordinates(sample, self.text_columns, self.text_valid)",
        "layout/test_packing.py::test_rows_of_a_chunk_are_its_own_and_slots_those_of_the_sequence",
    ),
    (
        "padded visual slots count", PACKING,
        "self.visual.take(self.visual_slots)._replace(valid=self.visual_valid)",
        "self.visual.take(self.visual_slots)",
        *oracle("left", "ragged"),
    ),
    (
        "the mask of a call is written to", PACKING,
        "is_text = np.ones((batch, length), dtype=bool) if mask is None else mask.copy()",
        "is_text = np.ones((batch, length), dtype=bool) if mask is None else mask",
        "layout/test_packing.py::test_the_mask_is_not_written_to",
    ),
    (
        "visual tokens may be padding", PACKING,
        "if mask is not None and not mask[visual.sample, local].all():",
        "if False:",
        "layout/test_packing.py::test_visual_tokens_are_no_padding",
    ),
    (
        "text padded on the right", PACKING,
        "valid = np.arange(longest)[None, :] >= longest - counts[:, None]",
        "valid = np.arange(longest)[None, :] < counts[:, None]",
        "layout/test_packing.py::test_text_rows_are_padded_on_the_left",
    ),
    (
        "places counted from one", PACKING,
        "np.maximum(present.cumsum(1) - 1, 0)",
        "present.cumsum(1)",
        "layout/test_packing.py::test_places_are_counted_over_real_tokens",
    ),
    (
        "padding counts as a place", PACKING,
        "present[slots.sample[slots.valid], slots.column[slots.valid]] = True",
        "present[slots.sample, slots.column] = True",
        "layout/test_packing.py::test_places_are_counted_over_real_tokens",
    ),
    (
        "rows that left keep their slots", PACKING,
        "return replace(self, visual=visual, visual_slots=slots, visual_valid=valid)",
        "return replace(self, visual=visual)",
        "layout/test_packing.py::test_rows_that_left_leave_no_slots",
    ),
    (
        "no newline at the end of a row", IMAGES,
        "(1, rows, columns + 1)), (self.grid,) * tiles",
        "(1, rows, columns)), (self.grid,) * tiles",
        "cost/test_shapes.py::test_llava_next_grids_are_transformers",
    ),
    (
        "padding cut off the wrong side", IMAGES,
        "if width / height > columns / rows:",
        "if width / height < columns / rows:",
        "cost/test_shapes.py::test_llava_next_grids_are_transformers",
    ),
    (
        "the tightest pinpoint wins", IMAGES,
        "return kept, kept - pinpoint[0] * pinpoint[1]",
        "return kept - pinpoint[0] * pinpoint[1], kept",
        "cost/test_shapes.py::test_llava_next_grids_are_transformers",
    ),
    (
        "images above the bound rounded up", IMAGES,
        "max(1, math.floor(side / shrink / unit))",
        "max(1, math.ceil(side / shrink / unit))",
        "layout/test_image_grids.py::test_sides_keep_the_pixels_within_bounds",
    ),
    (
        "images below the bound rounded down", IMAGES,
        "math.ceil(side * grow / unit)",
        "math.floor(side * grow / unit)",
        "layout/test_image_grids.py::test_sides_keep_the_pixels_within_bounds",
    ),
    (
        "a thumbnail for a single tile", IMAGES,
        "if self.thumbnail and tiles > 1:",
        "if self.thumbnail:",
        "cost/test_shapes.py::test_internvl_tiles_are_transformers",
    ),
    (
        "half a patch of frames forgotten", VIDEOS,
        """rows, columns = smart_resize(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)
        steps, patches = math.ceil(frames / self.temporal), (rows""",
        """rows, columns = smart_resize(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)
        steps, patches = frames // self.temporal, (rows""",
        "cost/test_shapes.py::test_videos_of_qwen2_vl_are_transformers",
        "layout/test_video_grids.py::test_the_last_frame_is_repeated_to_fill_a_patch",
    ),
    (
        "newlines among the frames", VIDEOS,
        "return EncodedImage(grids + newline, ((side, side),) * frames",
        "return EncodedImage(newline + grids, ((side, side),) * frames",
        "layout/test_video_grids.py::test_frames_of_one_size",
    ),
))  # fmt: skip
