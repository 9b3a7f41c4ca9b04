"""auricle speak: text to speech."""

from __future__ import annotations

from launch.cli import request
from launch.exit_codes import ExitCode
from pretrain.generation.config import SpeakConfig


def run(arguments: list[str]) -> int:
    """Speaks texts; returns 0, or 1 if a line of a file could not be spoken."""
    given = request.read("speak", SpeakConfig, arguments)
    if given is None:
        return ExitCode.DONE
    from launch.workflows import speaking

    return speaking.run(given.config)
