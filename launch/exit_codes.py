"""Exit codes of `auricle` and of the processes that it starts."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the exit code of a process says, to a shell, a scheduler or the launcher that started it."""

    DONE = 0
    """Everything that was asked for is done, or queued."""
    FAILED = 1
    """The work failed; starting it again may succeed."""
    USAGE = 2
    """The command or the config is wrong; starting it again fails in the same way."""
    UNHEALTHY = 3
    """Health checks stopped the run (RUN/UNHEALTHY has the reason); starting it again ends in the same way."""
    SUPERSEDED = 4
    """A newer start of the run took over; starting this one again would take over from that one."""
    LOST = 70
    """An attempt on a Ray cluster lost a worker or a node; starting it again may succeed."""
    AGAIN = 75
    """`launch.launchers.retry end`: the job is to be started again (EX_TEMPFAIL); no rank ends with it."""
    STOPPED = 85
    """A rank stopped on request with a checkpoint; the same command continues."""
    INTERRUPTED = 130
    """Stopped with Ctrl-C."""


NEVER_RETRY = frozenset({ExitCode.USAGE, ExitCode.UNHEALTHY, ExitCode.SUPERSEDED})
"""Exit codes of a rank after which a launcher does not start it again."""
