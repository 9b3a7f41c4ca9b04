"""The least-recently-used cache."""

from __future__ import annotations

import pytest

from data_pipeline.core.lru import LruCache


def test_the_least_recently_used_value_is_evicted_first() -> None:
    evicted: list[str] = []
    cache = LruCache[int, str](2, evicted.append)
    for key in (1, 2, 1, 3):
        assert cache.get(key, lambda key=key: f"value {key}") == f"value {key}"
    assert evicted == ["value 2"]
    assert 1 in cache
    cache.evict(lambda key: key == 3)
    cache.clear()
    assert evicted == ["value 2", "value 3", "value 1"]


def test_a_failed_computation_is_not_cached() -> None:
    cache = LruCache[int, str](2)
    with pytest.raises(ZeroDivisionError):
        cache.get(1, lambda: str(1 // 0))
    assert cache.get(1, lambda: "made") == "made"
