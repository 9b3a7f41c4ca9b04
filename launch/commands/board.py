"""auricle board: TensorBoard on this machine's loopback, the runs by their names."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from launch.cli.parser import Parser
from launch.runs.summary import find_runs
from launch.workers.environment import free_port


def run(arguments: list[str]) -> int:
    """Runs TensorBoard until Ctrl-C. Raises ValueError where there is no run."""
    parser = Parser("auricle board", description="TensorBoard on the runs, by their names")
    parser.add_argument("runs", type=Path, nargs="*", default=[Path("runs")], help="run folders, or folders of runs")
    parser.add_argument("--port", type=int, default=6006, help="on localhost; 0 takes a free one (default: 6006)")
    given = parser.parse_args(arguments)
    folders = find_runs(given.runs)
    port = given.port or free_port()
    print(f"{len(folders)} runs at http://localhost:{port}/ (only from this machine; Ctrl-C ends it)", flush=True)
    with tempfile.TemporaryDirectory(prefix="auricle-board-") as home:
        link(folders, Path(home))
        return subprocess.call(command(Path(home), port))


def link(folders: list[Path], home: Path) -> None:
    """One link per run below `home`, by its name; runs of one name get as many of their parents' as tell them apart."""
    every = sorted({folder.resolve() for folder in folders})
    for folder in every:
        length, others = 1, [other for other in every if other != folder]
        while any(other.parts[-length:] == folder.parts[-length:] for other in others):
            length += 1
        name = "-".join(part.strip("/") for part in folder.parts[-length:])
        (home / name).symlink_to(folder / "tb", target_is_directory=True)


def command(home: Path, port: int) -> list[str]:
    """TensorBoard's command line, on the loopback only."""
    plain = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", str(port)]
    return [*plain, "--logdir", str(home), "--samples_per_plugin", "audio=200,images=200,text=50"]
