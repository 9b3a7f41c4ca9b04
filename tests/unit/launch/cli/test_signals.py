"""`auricle board` and the signals that end it; tests/board looks at TensorBoard itself."""

from __future__ import annotations

import signal

import pytest

from launch.cli.signals import SignalledError, raised_signals


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
