"""`auricle board` and the signals that end it; tests/board looks at TensorBoard itself."""

from __future__ import annotations

import io
import signal
import time
from typing import Any

import numpy as np
import pytest
import soundfile

from launch.cli.signals import SignalledError, kept_interrupts, raised_signals


class Interrupting(io.BytesIO):
    """A file during whose reading the user types Ctrl-C, once."""

    typed = False

    def read(self, size: int | None = -1) -> bytes:
        if not self.typed:
            self.typed = True
            signal.raise_signal(signal.SIGINT)
        return super().read(size)

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def test_an_interrupt_while_a_file_is_decoded_ends_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    before, file = signal.getsignal(signal.SIGINT), io.BytesIO()
    soundfile.write(file, np.zeros(16_000), 16_000, format="WAV")
    read = Interrupting(file.getvalue())

    def work() -> None:
        wave, _ = soundfile.read(read)
        assert len(wave) == 16_000, "the file is read as if nothing had happened"
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt), kept_interrupts():
        work()
    assert read.typed
    assert signal.getsignal(signal.SIGINT) is before
    assert "Traceback" not in capfd.readouterr().err


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised_signals():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(SignalledError):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
