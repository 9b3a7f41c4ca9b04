"""A least-recently-used cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Keeps the `size` most recently used values.

    Args:
        size: maximum number of values.
        on_evict: called with each evicted value, e.g. to close a file.
    """

    def __init__(self, size: int, on_evict: Callable[[V], None] | None = None) -> None:
        self.size, self._on_evict = size, on_evict
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """Returns the value of `key`, created by `make` if it is not cached; nothing is stored if `make` raises."""
        if key not in self._values:
            self._values[key] = make()
            while len(self._values) > max(self.size, 1):
                self._drop(next(iter(self._values)))
        self._values.move_to_end(key)
        return self._values[key]

    def evict(self, chosen: Callable[[K], bool]) -> None:
        """Evicts the values whose key `chosen` accepts."""
        for key in [key for key in self._values if chosen(key)]:
            self._drop(key)

    def clear(self) -> None:
        """Evicts every value."""
        self.evict(lambda _: True)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def _drop(self, key: K) -> None:
        value = self._values.pop(key)
        if self._on_evict is not None:
            self._on_evict(value)
