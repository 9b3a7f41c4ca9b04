"""The error of a recording that cannot be used."""

from __future__ import annotations

from typing import Any


class AudioError(ValueError):
    """A file has no usable audio; `reason` is a short code for reports."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return AudioError, (self.reason, str(self))
