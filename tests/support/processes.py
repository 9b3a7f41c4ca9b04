"""Worker processes that a test started."""

from __future__ import annotations

import multiprocessing

import psutil


def live_workers() -> list[psutil.Process]:
    """Returns the live worker processes of this process; those of a Ray that other tests share are not among them."""
    return [psutil.Process(child.pid) for child in multiprocessing.active_children()]
