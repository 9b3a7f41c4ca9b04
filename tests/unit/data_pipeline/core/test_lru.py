"""The cache of the values used last."""

from __future__ import annotations

import pytest

from data_pipeline.core.lru import LruCache


def test_the_value_unused_for_longest_leaves_first() -> None:
    evicted: list[str] = []
    cache = LruCache[int, str](2, evicted.append)
    for key in (1, 2, 1, 3):
        assert cache.get(key, lambda key=key: f"value {key}") == f"value {key}"
    assert evicted == ["value 2"]
    assert 1 in cache
    cache.evict(lambda key: key == 3)
    cache.clear()
    assert evicted == ["value 2", "value 3", "value 1"]


def test_nothing_is_kept_of_a_value_that_cannot_be_made() -> None:
    cache = LruCache[int, str](2)
    with pytest.raises(ZeroDivisionError):
        cache.get(1, lambda: str(1 // 0))
    assert cache.get(1, lambda: "made") == "made"
