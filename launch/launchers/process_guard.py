"""Runs a command in a session of its own and leaves none of its processes behind.

    python launch/launchers/process_guard.py COMMAND ...

stdin is the life line: when it ends, because the parent closed it or was killed, every process of the session gets
SIGTERM and, after GRACE seconds, SIGKILL. The exit code is the command's, 128 + N after signal N. Standard library
only, and no import of this project: it starts in milliseconds.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""
POLL = 0.1


def main(command: list[str]) -> int:
    """Runs `command` until it ends or stdin does."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = [False]
    signal.signal(signal.SIGTERM, lambda *_: stop.__setitem__(0, True))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_default_signals)
    while child.poll() is None and not stop[0]:
        ready, _, _ = select.select([0], [], [], POLL)
        stop[0] = stop[0] or (bool(ready) and not os.read(0, 4096))
    _sweep(child)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _default_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _sweep(child: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the session."""
    for sign, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        for pid in session_members(os.getpid()):
            try:
                os.kill(pid, sign)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + patience
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
            state, _, _, session = entry.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        pid = int(entry.parent.name)
        if int(session) == leader and pid != leader and state not in "ZX":
            members.append(pid)
    return members


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
