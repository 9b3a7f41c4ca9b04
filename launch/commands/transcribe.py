"""auricle transcribe: recordings to text, with word times."""

from __future__ import annotations

from launch.cli import request
from launch.exit_codes import ExitCode
from pretrain.recognition.config import TranscribeConfig


def run(arguments: list[str]) -> int:
    """Transcribes recordings; returns 0, or 1 if a recording could not be read."""
    given = request.read("transcribe", TranscribeConfig, arguments)
    if given is None:
        return ExitCode.DONE
    from launch.workflows import transcription

    return transcription.run(given.config)
