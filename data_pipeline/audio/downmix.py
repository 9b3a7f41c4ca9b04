"""Downmix to mono: the mean of the channels, except where they cancel each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

Wave = npt.NDArray[np.float32]
LEAST: Final = 0.1
"""Channels cancel where their mean has less than this share of the power that uncorrelated channels would give it."""
ENOUGH: Final = 0.2
"""Share above which they no longer cancel. One speaker per channel gives 1, the same signal in two channels 2."""
SUSPECT: Final = 0.9
"""Stretches below this share are examined in `FINE` steps."""
SILENT: Final = 1e-9
"""Mean square below which a stretch is too quiet to decide."""
COARSE, FINE, FADE = 0.25, 0.02, 0.005
"""Seconds: length of a stretch, step in which the decision may change, and length of the cross-fade."""


class Downmix:
    """Mixes the channels of a recording, given in consecutive blocks of any size.

    Two microphones that record one signal with opposite polarity cancel in the mean; there the stronger channel is
    taken. The decision is made every 20 ms, so that neither a jingle nor a hum at the start determines the rest, and
    does not depend on how the recording is split into blocks.
    """

    def __init__(self, rate: int, channels: int) -> None:
        self.rate, self.channels = rate, channels
        self._fine = max(round(FINE * rate), 1)
        self._window = self._fine * round(COARSE / FINE)
        self._held = np.zeros((0, channels), np.float32)
        self._mean_share: float | None = None
        """1 where the mean is taken, 0 where one channel is; None at the start."""
        self._channel = 0

    def push(self, block: Wave) -> Iterator[Wave]:
        """Yields mono audio for (frames, channels); holds back up to a quarter of a second."""
        if self.channels == 1:
            yield block[:, 0]
            return
        held = np.concatenate([self._held, block]) if len(self._held) else block
        whole = len(held) // self._window * self._window
        self._held = held[whole:].copy()
        if whole:
            yield self._mixed(held[:whole])

    def flush(self) -> Iterator[Wave]:
        """Yields what was held back."""
        if len(self._held):
            yield self._mixed(self._held)
            self._held = self._held[:0]

    def _mixed(self, block: Wave) -> Wave:
        mixed: Wave = block.mean(axis=1, dtype=np.float32)
        for start in range(0, len(block), self._window):
            wave, mean = block[start : start + self._window], mixed[start : start + self._window]
            flat = wave.reshape(-1)
            total = float(np.dot(flat, flat))
            if total <= SILENT * flat.size:
                if self._mean_share == 0:
                    mean[:] = wave[:, self._channel]
            elif self._mean_share == 0 or self.channels**2 * float(np.dot(mean, mean)) < SUSPECT * total:
                self._decide(wave, mean)
            elif self._mean_share is None:
                self._mean_share = 1.0
        return mixed

    def _decide(self, wave: Wave, mean: Wave) -> None:
        """Writes the mix of a stretch that may cancel into `mean`, which holds the mean of the channels."""
        starts = list(range(0, len(wave), self._fine))
        power = np.add.reduceat(np.square(wave), starts, axis=0)
        mixed = np.add.reduceat(np.square(mean), starts)
        total = power.sum(axis=1)
        counts = np.diff(np.array([*starts, len(wave)]))
        share, choice = self._mean_share, np.empty(len(starts), np.float32)
        for step in range(len(starts)):
            if total[step] > SILENT * counts[step] * self.channels:
                kept = self.channels**2 * mixed[step] / total[step]
                if kept < LEAST:
                    share = 0.0
                elif kept > ENOUGH or share is None:
                    share = 1.0
            choice[step] = 1.0 if share is None else share
        if (choice == 1).all() and self._mean_share != 0:
            self._mean_share = share
            return
        if (choice == 0).any() and self._mean_share != 0:
            self._channel = _strongest(power[choice == 0].sum(axis=0))
        weight = np.repeat(choice, counts)
        before = choice[0] if self._mean_share is None else self._mean_share
        self._mean_share = share
        ramp = _faded(weight, float(before), max(round(FADE * self.rate), 1))
        mean *= ramp
        mean += (1 - ramp) * wave[:, self._channel]


def _strongest(power: Wave) -> int:
    """Returns the strongest channel; the first one unless another has more than twice its power."""
    best = int(power.argmax())
    return best if power[best] > 2 * power[0] else 0


def _faded(weight: Wave, before: float, length: int) -> Wave:
    """Returns a weight per sample with its steps replaced by ramps of `length` samples."""
    steps = np.flatnonzero(np.diff(weight, prepend=np.float32(before)))
    out = weight.copy()
    for step in steps.tolist():
        stop = min(step + length, len(out))
        first = out[step - 1] if step else before
        out[step:stop] = first + (weight[step] - first) * np.arange(1, stop - step + 1, dtype=np.float32) / length
    return out
