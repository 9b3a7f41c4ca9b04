"""auricle board: serves TensorBoard on localhost, with runs listed by name."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launch.cli.parser import Parser
from launch.cli.signals import raised_signals

GRACE_SECONDS = 5.0
"""Seconds that TensorBoard may take to end."""


def run(arguments: list[str]) -> int:
    """Runs TensorBoard until Ctrl-C or SIGTERM; returns its exit code. Raises ConfigError if no run is found."""
    parser = Parser("auricle board", description="TensorBoard of runs, listed by name")
    parser.add_argument("runs", type=Path, nargs="*", default=[Path("runs")], help="run folders, or folders of runs")
    parser.add_argument("--port", type=int, default=6006, help="on localhost; 0 takes a free one (default: 6006)")
    parser.add_argument("--bands", type=Path, help="file of `auricle bands`: shown behind each run's curves")
    given = parser.parse_args(arguments)

    from data_pipeline.core.loopback import free_port
    from launch.runs.summary import find_runs

    folders = find_runs(given.runs)
    port = given.port or free_port()
    _require_free(port)
    with raised_signals(), tempfile.TemporaryDirectory(prefix="auricle-board-") as home:
        link(folders, Path(home))
        if given.bands is not None:
            print(f"{add_bands(folders, Path(home), given.bands)} charts with bands, under Custom Scalars", flush=True)
        count = f"{len(folders)} run{'' if len(folders) == 1 else 's'}"
        print(f"{count} at http://localhost:{port}/ (only from this machine; Ctrl-C ends it)", flush=True)
        return _serve(command(Path(home), port))


def _serve(line: list[str]) -> int:
    """Runs a command line until it ends or is interrupted; returns its exit code."""
    process = subprocess.Popen(line)
    try:
        return process.wait()
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        process.kill()
        process.wait()


def _require_free(port: int) -> None:
    """Raises ConfigError if the port is invalid or in use."""
    from data_pipeline.core.schema import ConfigError

    if not 0 < port < 1 << 16:
        raise ConfigError(f"--port {port}: must be from 1 to 65535, or 0 for a free one")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"--port {port}: {error.strerror}; take another port, or --port 0 for a free one"
            ) from None


def link(folders: list[Path], home: Path) -> None:
    """Creates one link per run below `home`, named after the run, plus as many parent folders as make it unique."""
    every = sorted({folder.resolve() for folder in folders})
    for folder, name in zip(every, unique_names(every), strict=True):
        (home / name).symlink_to(folder / "tb", target_is_directory=True)


def add_bands(folders: list[Path], home: Path, file: Path) -> int:
    """Adds a run NAME_band for each run, with its curves and their bands; returns the number of charts."""
    from launch.runs.band_board import write_charts
    from launch.runs.bands import read

    bands, every = read(file), sorted({folder.resolve() for folder in folders})
    named = zip(every, unique_names(every), strict=True)
    return sum(write_charts(bands, folder, home / f"{name}_band") for folder, name in named)


def unique_names(folders: list[Path]) -> Iterator[str]:
    """Yields a unique file name for each folder: a/b and a-b would both be a-b, so the second is a-b_2."""
    from data_pipeline.core.text import visible

    taken: set[str] = set()
    for folder in folders:
        length, others = 1, [other for other in folders if other != folder]
        while length < len(folder.parts) and any(other.parts[-length:] == folder.parts[-length:] for other in others):
            length += 1
        plain = "-".join(re.sub(r"[/\\]", "_", visible(part)) for part in folder.parts[-length:] if part != "/")
        name, number = plain, 1
        while name in taken:
            number += 1
            name = f"{plain}_{number}"
        taken.add(name)
        yield name


def command(home: Path, port: int) -> list[str]:
    """Returns TensorBoard's command line, for localhost only."""
    plain = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", str(port)]
    return [*plain, "--logdir", str(home), "--samples_per_plugin", "audio=200,images=200,text=50"]
