"""Runs a command in a session of its own, stops it with a checkpoint and leaves none of its processes behind.

    python launch/launchers/process_guard.py [--run RUN_FOLDER] [--start ID] [--grace SECONDS] [--signal] -- COMMAND ...

stdin is the life line. When it ends, because the parent closed it or was killed, or when SIGTERM or SIGHUP arrives:

1. The command is asked through RUN_FOLDER/STOP to save a checkpoint and end, and has `grace_seconds` for that. With
   --signal it is one rank of several: it gets SIGTERM and that time where RUN_FOLDER/STOP exists; otherwise its peers
   are lost, and nothing could be saved. Skipped after SIGUSR1 and without --run.
2. Every process of the session gets SIGTERM and, after KILL_SECONDS, SIGKILL.

The exit code is the command's, 128 + N after signal N. Standard library only and no import of this project: it starts
in milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

LEAST_GRACE = 30.0
"""Seconds that a run has at least to end by itself."""
UPDATES_OF_GRACE = 3
"""… plus this many times its longest recent update: one is going on, the next sees the request, then it saves."""
KILL_SECONDS = 10.0
"""Seconds between SIGTERM and SIGKILL."""
POLL = 0.1
RECENT_BYTES = 1 << 16
"""Length of the end of metrics.jsonl that the time of an update is measured from."""


def main(arguments: list[str]) -> int:
    """Runs the command until it ends or stdin does; returns its exit code."""
    parser = argparse.ArgumentParser("process_guard")
    parser.add_argument("--run", type=Path, help="run folder of the command")
    parser.add_argument("--start", default="", help="id of this start of the run, for RUN_FOLDER/STOP")
    parser.add_argument("--grace", type=float, default=0.0, help="seconds to save and end; 0 measures the updates")
    parser.add_argument("--signal", action="store_true", help="the command is one rank of several")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    if os.getsid(0) != os.getpid():
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked: set[int] = set()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, _: asked.add(number))
    child = subprocess.Popen(given.command, stdin=subprocess.DEVNULL, preexec_fn=_default_signals)
    life_line = True
    while child.poll() is None and life_line and not asked:
        ready, _, _ = select.select([0], [], [], POLL)
        life_line = not ready or bool(os.read(0, 4096))
    if child.poll() is None and signal.SIGUSR1 not in asked and _ask_to_save(child, given):
        deadline = time.monotonic() + grace_seconds(given.run, given.grace)
        while child.poll() is None and signal.SIGUSR1 not in asked and time.monotonic() < deadline:
            time.sleep(POLL)
    _sweep(child)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _ask_to_save(child: subprocess.Popen[bytes], given: argparse.Namespace) -> bool:
    """Asks the command to save a checkpoint and end; returns whether that makes sense."""
    if given.run is None:
        return False
    request = given.run / "STOP"
    if given.signal:
        if request.exists():
            child.terminate()
        return bool(request.exists())
    with contextlib.suppress(OSError):
        request.write_text(f"{given.start}\n" if given.start else "", encoding="utf-8")
    return True


def grace_seconds(run: Path, configured: float) -> float:
    """Seconds that a run has to finish its update, save a checkpoint and end.

    Args:
        run: the run folder, of which the end of metrics.jsonl is read.
        configured: taken instead where it is not 0.
    """
    if configured:
        return configured
    longest, before = 0.0, None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - RECENT_BYTES))
        for line in file.read().split(b"\n")[1 if file.tell() > RECENT_BYTES else 0 :]:
            if not line:
                continue
            row = json.loads(line)
            if before and row["step"] > before["step"]:  # a resumed run's gap is no update
                longest = max(longest, (row["time"] - before["time"]) / (row["step"] - before["step"]))
            before = row
    return LEAST_GRACE + UPDATES_OF_GRACE * longest


def _default_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _sweep(child: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the session."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for pid in session_members(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
        deadline = time.monotonic() + KILL_SECONDS
        while session_members(os.getpid()):
            child.poll()
            if time.monotonic() > deadline:
                break
            time.sleep(POLL)
        else:
            return


def session_members(leader: int) -> list[int]:
    """Living processes of the session that `leader` leads, without itself. Linux; elsewhere only the group is known."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the name in parentheses may hold anything, so count from the last one on
            state, _, _, session = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:4]
        except OSError:
            continue
        pid = int(entry.parent.name)
        if int(session) == leader and pid != leader and state not in "ZX":
            members.append(pid)
    return members


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
