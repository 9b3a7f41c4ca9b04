"""auricle targets: makes frame labels of shards with k-means on MFCC or on a layer of a checkpoint."""

from __future__ import annotations

from launch.workflows import submit


def run(arguments: list[str]) -> int:
    """Runs the command; returns its exit code: 0 if the job is done or queued."""
    return submit.run("targets", arguments)
