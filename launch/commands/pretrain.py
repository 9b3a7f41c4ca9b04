"""auricle pretrain: trains a model on shards."""

from __future__ import annotations

from launch.workflows import pretraining


def run(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return pretraining.run(arguments)
