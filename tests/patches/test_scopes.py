"""What `hold` holds: for whom, and for how long."""

from vis_sparse.patches.scopes import held, hold


def test_values_are_their_owners():
    one, other = object(), object()
    with hold(one, "plan", "fast"):
        assert held(one, "plan") == "fast"
        assert held(other, "plan") is None and held(one, "layout") is None
    assert held(one, "plan") is None


def test_the_innermost_value_counts():
    owner = object()
    with hold(owner, "plan", "fast"):
        with hold(owner, "plan", "exact"):
            assert held(owner, "plan") == "exact"
        assert held(owner, "plan") == "fast"


def test_blocks_may_end_in_any_order():
    owner = object()
    first, second = hold(owner, "plan", "fast"), hold(owner, "layout", "left")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert held(owner, "plan") is None and held(owner, "layout") == "left"
    second.__exit__(None, None, None)
    assert held(owner, "layout") is None
