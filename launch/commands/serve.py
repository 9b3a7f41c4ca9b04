"""auricle serve: a WebSocket server of streaming recognition, with a web page."""

from __future__ import annotations

from data_pipeline.core.schema import ConfigError
from launch.cli import request
from launch.exit_codes import ExitCode
from launch.serving.config import ServeConfig


def run(arguments: list[str]) -> int:
    """Serves until Ctrl-C or SIGTERM; returns 0."""
    given = request.read("serve", ServeConfig, arguments)
    if given is None:
        return ExitCode.DONE
    try:
        from launch.serving.server import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve needs {error.name}: pip install {error.name}") from None

    serve(given.config, lambda line: print(line, flush=True))
    return ExitCode.DONE
