"""auricle search: recordings, texts and images near a query."""

from __future__ import annotations

from launch.cli import request
from launch.exit_codes import ExitCode
from pretrain.retrieval.config import SearchConfig


def run(arguments: list[str]) -> int:
    """Prints the results; returns 0."""
    given = request.read("search", SearchConfig, arguments)
    if given is None:
        return ExitCode.DONE
    from launch.workflows import retrieval

    return retrieval.search(given.config)
