"""auricle evaluate: evaluates frozen encoders with probes and with measures that need no labels."""

from __future__ import annotations

from launch.workflows import submit


def run(arguments: list[str]) -> int:
    """Runs the command; returns its exit code: 0 if the job is done or queued."""
    return submit.run("evaluate", arguments)
