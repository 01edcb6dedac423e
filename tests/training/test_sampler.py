"""The order of the pictures."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from cat_rs.training.sampler import BatchSampler


@pytest.mark.parametrize(("pictures", "batch_size"), [(5, 4), (1, 4), (4, 4), (7, 1)])
def test_every_picture_comes_equally_often(pictures: int, batch_size: int) -> None:
    order = BatchSampler(pictures, batch_size, seed=0)
    batches = [order.next_batch() for _ in range(pictures * 3)]
    assert {len(batch) for batch in batches} == {batch_size}
    assert set(Counter(chain(*batches)).values()) == {batch_size * 3}


def test_state_continues_the_order() -> None:
    order = BatchSampler(5, 3, seed=0)
    order.next_batch()
    state = order.state_dict()
    expected = [order.next_batch() for _ in range(10)]
    other = BatchSampler(5, 3, seed=1)
    other.load_state_dict(state)
    assert [other.next_batch() for _ in range(10)] == expected
