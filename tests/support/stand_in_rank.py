"""Replaces launch.workers.rank in tests of launchers; the variable STAND_IN selects the behaviour of its ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch.workers.environment import log_to_folder
from launch.workers.stop_request import stop_requested

STEPS = 5


def main(run_folder: Path) -> int:
    """Behaves as STAND_IN selects; returns the rank's exit code."""
    rank, act = int(os.environ.get("RANK", "0")), os.environ["STAND_IN"]
    log_to_folder(run_folder)
    print(f"rank {rank} of {os.environ.get('WORLD_SIZE', '1')} at {os.environ.get('MASTER_PORT', 'no port')}")
    (run_folder / f"pid_{rank}").write_text(str(os.getpid()))
    if act == "fail" and rank == 1:
        print("ValueError: rank 1 cannot read its data", file=sys.stderr)
        return 1
    if act in ("hang", "fail"):
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (run_folder / f"helper_{rank}").write_text(str(helper.pid))
        time.sleep(600)
    if act in ("until_stop", "slow_save"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while not stop_requested(run_folder):
            time.sleep(0.05)
        time.sleep(12.0 if act == "slow_save" else 0.0)  # longer than KILL_SECONDS of process_guard
        _save(run_folder, 3)
        return 85
    if rank == 0:
        _save(run_folder, STEPS)
    return 0


def _save(run_folder: Path, step: int) -> None:
    folder = run_folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    (folder / "latest").write_text(f"step_{step:08d}\n")
    row = {"step": step, "loss/total": 1.0, "opt/lr": 0.1, "perf/audio_seconds_per_second": 7.0}
    (run_folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[-1])))
