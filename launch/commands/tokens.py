"""auricle tokens: makes tokens of the texts in shards."""

from __future__ import annotations

from launch.cli import request
from launch.exit_codes import ExitCode


def run(arguments: list[str]) -> int:
    """Writes tokens.json and prints how it fits the texts; returns 0."""
    from data_pipeline.text.artefact import TokensConfig

    given = request.read("tokens", TokensConfig, arguments)
    if given is None:
        return ExitCode.DONE
    from launch.cli.tables import show, table
    from launch.workflows.tokens import make

    show(table(("", ""), make(given.config).rows()))
    return ExitCode.DONE
