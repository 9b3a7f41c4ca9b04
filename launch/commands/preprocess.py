"""auricle preprocess: converts raw audio to shards."""

from __future__ import annotations

from launch.workflows import submit


def run(arguments: list[str]) -> int:
    """Runs the command; returns its exit code: 0 if the job is done or queued."""
    return submit.run("preprocess", arguments)
