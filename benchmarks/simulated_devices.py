"""Measures a federated run with a thousand simulated devices, whose answers are Ray tasks on this machine.

    python benchmarks/simulated_devices.py      # 1,000 devices, 50 a round, some processor minutes
    python benchmarks/simulated_devices.py --devices 20 --per-round 5 --rounds 2

Each device has a folder of shards of its own, with four seconds of noise: what is measured is rounds, not audio. The
recipe is federated_tiny with a small model. Writes benchmarks/results/simulated_devices.json and .md.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from benchmarks.prove.common import markdown_table, parser_of  # noqa: E402
from data_pipeline.core import jsonl  # noqa: E402
from tests.support.tiny_shards import sounds, write_shards  # noqa: E402

MODEL = ("encoder.layers=2", "encoder.dim=64", "encoder.heads=2", "encoder.ffn_dim=128")
SECONDS = 4.0
"""Audio of a device, in segments of a second."""


def write_devices(folder: Path, count: int) -> None:
    """Writes the shards of devices d0000 … that are not there yet."""
    for number in range(count):
        place = folder / f"d{number:04d}"
        if not (place / "_done").is_dir():
            write_shards(place, [sounds([1.0] * int(SECONDS), corpus=place.name, speaker=place.name)])


def watched(process: subprocess.Popen[bytes]) -> float:
    """Waits for a command; returns the processor time of all its processes, looked at every half second."""
    seconds: dict[int, float] = {}
    while process.poll() is None:
        for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                seconds[member.pid] = sum(member.cpu_times()[:2])
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"the run ended with exit code {process.returncode}")
    return sum(seconds.values())


def page(found: dict[str, Any]) -> str:
    """Returns the table of a result."""
    rounds = found["rounds"]
    rows = [
        (
            str(number),
            str(int(row["devices"])),
            f"{row['seconds']:.1f}",
            f"{row['sent'] / 1e6:.1f}",
            f"{row['received'] / 1e6:.1f}",
            f"{row['server_gib']:.2f}",
            f"{row['loss']:.3f}",
        )
        for number, row in enumerate(rounds, 1)
    ]
    heads = ("round", "devices", "seconds", "MB sent", "MB received", "peak memory of the server in GiB", "loss")
    lines = [
        "# A thousand simulated devices", "",
        f"{found['when']}, {found['machine']}, load {found['load']:.0f}: `{found['command']}`", "",
        f"{found['devices']} devices, {found['per_round']} of them asked a round, "
        f"{SECONDS / 2:.0f} s of audio each. With its start the run took {found['wall_seconds']:.0f} s and "
        f"{found['processor_seconds']:.0f} s of processor time; a round took "
        f"{found['median_seconds']:.1f} s (median).", "",
        *markdown_table(heads, rows),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns exit code 0 where every device that was asked answered."""
    parser = parser_of(__doc__, "simulated_devices")
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--per-round", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    write_devices(given.work / "devices", given.devices)
    shutil.rmtree(given.work / "run", ignore_errors=True)
    os.environ.setdefault("RAY_worker_niceness", "0")  # else tasks give way to any other work of the machine
    seconds = SECONDS / 2 * given.per_round
    begun = time.monotonic()
    words = [
        "pretrain", "+experiment=federated_tiny", *MODEL, f"data.shards={given.work / 'devices'}",
        f"runs={given.work}", "name=run", "device=cpu", "launcher.processes=1", f"data.batch_seconds={seconds}",
        f"data.micro_batches={given.per_round}", "data.min_seconds=0.5", "data.max_seconds=2",
        "engine.federated.transport=ray", f"engine.federated.per_round={given.per_round}",
        "engine.federated.min_devices=2", "engine.federated.answer_seconds=300", f"train.steps={given.rounds}",
        f"train.checkpoint_every={given.rounds}", "train.media_every=0", "health.on_collapse=warn",
    ]  # fmt: skip
    used = watched(subprocess.Popen([sys.executable, "-m", "launch.main", *words], cwd=ROOT))
    rows = jsonl.read(given.work / "run" / "metrics.jsonl").rows
    found = {
        "when": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[1],
        "command": " ".join(["python", "benchmarks/simulated_devices.py", *sys.argv[1:]]),
        "devices": given.devices,
        "per_round": given.per_round,
        "wall_seconds": time.monotonic() - begun,
        "processor_seconds": used,
        "median_seconds": statistics.median(row["federated/round_seconds"] for row in rows),
        "rounds": [
            {
                "devices": row["federated/devices"],
                "seconds": row["federated/round_seconds"],
                "sent": row["federated/bytes_sent"],
                "received": row["federated/bytes_received"],
                "server_gib": row["perf/memory_gib"],
                "loss": row["loss/total"],
            }
            for row in rows
        ],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "simulated_devices.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (given.out / "simulated_devices.md").write_text(page(found), encoding="utf-8")
    print(page(found))
    return 0 if all(row["devices"] == given.per_round for row in found["rounds"]) else 1


if __name__ == "__main__":
    sys.exit(main())
