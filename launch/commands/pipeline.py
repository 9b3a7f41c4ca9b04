"""auricle pipeline: preprocess, targets, pretrain and evaluate in order; results that are up to date are kept."""

from __future__ import annotations

from launch.workflows import pipeline


def run(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return pipeline.run(arguments)
