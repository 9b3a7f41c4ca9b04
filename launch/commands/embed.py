"""auricle embed: vectors of recordings, texts and images."""

from __future__ import annotations

from launch.cli import request
from launch.exit_codes import ExitCode
from pretrain.retrieval.config import EmbedConfig


def run(arguments: list[str]) -> int:
    """Writes vectors; returns 0, or 1 if something could not be embedded."""
    given = request.read("embed", EmbedConfig, arguments)
    if given is None:
        return ExitCode.DONE
    from launch.workflows import retrieval

    return retrieval.embed(given.config)
