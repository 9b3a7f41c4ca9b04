"""Model and instruction sets of this machine's processor, from /proc/cpuinfo."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


@functools.cache
def _described() -> dict[str, str]:
    """Returns the fields of the first processor; empty on systems without /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    parted = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in parted}


def model_name() -> str:
    """Returns the processor's model, or its architecture where the system does not name the model."""
    return _described().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> frozenset[str]:
    """Returns Linux's names of the processor's features, such as avx512f; empty where they are unknown."""
    described = _described()
    return frozenset((described.get("flags") or described.get("Features", "")).split())
