"""auricle pipeline: runs preprocess, targets, pretrain and evaluate in order; keeps results that are up to date."""

from __future__ import annotations

from launch.workflows import pipeline


def run(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return pipeline.run(arguments)
