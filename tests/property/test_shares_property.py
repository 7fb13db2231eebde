from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperflexis.core.shares import fair_level

POSITIVE = st.floats(0.01, 100.0)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=20), POSITIVE)
def test_the_level_gives_out_the_capacity_and_no_more(asked: list[tuple[float, float]], capacity: float) -> None:
    level = fair_level(asked, capacity)
    total = sum(amount for amount, _ in asked)
    if total <= capacity:
        assert level == inf
    else:
        assert sum(min(amount, weight * level) for amount, weight in asked) == pytest.approx(capacity)
