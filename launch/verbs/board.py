"""auricle board: TensorBoard on this machine's loopback, the runs by their names."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from launch.environment import free_port
from launch.history import find_runs


def run(arguments: list[str]) -> int:
    """Becomes TensorBoard, which runs until Ctrl-C. Raises ValueError where there is no run."""
    parser = argparse.ArgumentParser("auricle board", description="TensorBoard on the runs, by their names")
    parser.add_argument("runs", type=Path, nargs="*", default=[Path("runs")], help="run folders, or folders of runs")
    parser.add_argument("--port", type=int, default=6006, help="on localhost; 0 takes a free one (default: 6006)")
    given = parser.parse_args(arguments)
    folders = find_runs(given.runs)
    port = given.port or free_port()
    print(f"{len(folders)} runs at http://localhost:{port}/ (only from this machine; Ctrl-C ends it)", flush=True)
    os.execv(sys.executable, command(folders, port))


def command(folders: list[Path], port: int) -> list[str]:
    """TensorBoard's command line. Runs of one name in several places get their parent's name in front."""
    names = [folder.name for folder in folders]
    named = [
        f"{folder.parent.name}/{folder.name}" if names.count(folder.name) > 1 else folder.name for folder in folders
    ]
    spec = ",".join(f"{name}:{(folder / 'tb').resolve()}" for name, folder in zip(named, folders, strict=True))
    plain = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", str(port)]
    return [*plain, "--logdir_spec", spec, "--samples_per_plugin", "audio=200,images=200,text=50"]
