"""Grids of videos by hand; `tests/cost/test_shapes.py` holds them against transformers' processors."""

from vis_sparse.layout.video_grids import FixedFrames, ResizedFrames


def test_frames_of_one_size():
    joined = FixedFrames(patches=16, projected=4, grid=(2, 2), is_joined=True, newline=True).encode(3, 99, 50)
    assert joined.grids == ((3, 2, 2), (1, 1, 1))
    assert joined.sequences == ((4, 4),) * 3 and joined.projected == 12
    apart = FixedFrames(patches=16, projected=4, grid=(2, 2), is_joined=False).encode(3, 99, 50)
    assert apart.grids == ((1, 2, 2),) * 3 and apart.projected == 12


def test_the_last_frame_is_repeated_to_fill_a_patch():
    rule = ResizedFrames(patch=4, merge=2, temporal=2, min_pixels=64, max_pixels=10**6)
    assert [rule.encode(frames, 16, 24).grids for frames in (1, 2, 3)] == [((steps, 2, 3),) for steps in (1, 1, 2)]
    assert rule.encode(3, 16, 24).projected == 12
