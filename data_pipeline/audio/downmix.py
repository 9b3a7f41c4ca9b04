"""Downmix to mono: the mean of the channels, of which some are inverted where they would cancel others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

Wave = npt.NDArray[np.float32]
CANCELS: Final = -0.9
"""Correlation of two channels below which one of them is inverted: their mean has a tenth of the power of uncorrelated
channels."""
DIFFERS: Final = -0.5
"""Correlation above which it no longer is."""
SAME: Final = 0.5
"""Correlation above which two channels have one polarity."""
SPEECH_BAND: Final = (200.0, 4_000.0)
"""Hz: what decides, because hum may be louder than speech and have the other polarity."""
BESIDE: Final = 0.01
"""Weight of the amplitudes beside the speech band, which decide where it is empty."""
SILENT: Final = 1e-9
"""Mean square below which a channel is too quiet to decide."""
COARSE, FINE, FADE = 0.25, 0.02, 0.005
"""Seconds: length of a stretch, step in which the decision may change, and length of the cross-fade."""


class Downmix:
    """Mixes the channels of a recording, given in consecutive blocks of any size.

    Two microphones that record one signal with opposite polarity cancel in the mean; there one is inverted, so that
    what only one of them records is kept. The decision is made every 20 ms by the correlations of the channels in the
    speech band. Neither a jingle nor a hum determines the rest, and the result does not depend on how the recording is
    split into blocks.
    """

    def __init__(self, rate: int, channels: int) -> None:
        self.rate, self.channels = rate, channels
        self._fine = max(round(FINE * rate), 1)
        self._window = self._fine * round(COARSE / FINE)
        self._held = np.zeros((0, channels), np.float32)
        self._signs = np.ones(channels, np.float32)
        self._decided = False
        frequency = np.fft.rfftfreq(self._fine, 1 / rate)
        inside = (frequency >= SPEECH_BAND[0]) & (frequency <= SPEECH_BAND[1])
        self._weight = np.where(inside, 1.0, BESIDE).astype(np.float32)[:, None]
        self._taper = np.hanning(self._fine + 2)[1:-1, None].astype(np.float32)

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
        before, decided = self._signs, self._decided
        signs = self._polarities(block)
        before = before if decided else signs[0]
        if (signs == 1).all() and (before == 1).all():
            mean: Wave = block.mean(axis=1, dtype=np.float32)
            return mean
        inverted = block.copy()
        for channel in np.flatnonzero((signs != 1).any(axis=0) | (before != 1)).tolist():
            weight = np.repeat(signs[:, channel], self._fine)[: len(block)]
            inverted[:, channel] *= _faded(weight, float(before[channel]), max(round(FADE * self.rate), 1))
        mixed: Wave = inverted.mean(axis=1, dtype=np.float32)
        return mixed

    def _polarities(self, block: Wave) -> Wave:
        """Returns the sign of each channel (steps, channels) and keeps the last ones."""
        correlation, audible = self._correlations(block)
        signs = np.empty(audible.shape, np.float32)
        for step in range(len(signs)):
            if not self._decided or (correlation[step] < DIFFERS).any() or (self._signs != 1).any():
                self._signs = self._after(correlation[step], audible[step])
                if not self._decided and audible[step].any():
                    self._decided = True
                    signs[:step] = self._signs  # no fade after silence at the start
            signs[step] = self._signs
        return signs

    def _after(self, correlation: Wave, audible: npt.NDArray[np.bool_]) -> Wave:
        """Returns the signs of the channels from their correlations (channels, channels) in one step.

        Each channel follows the one before it with which it correlates most.
        """
        signs = self._signs.copy()
        for channel in range(1, self.channels):
            if not audible[channel]:
                continue
            other = int(np.abs(correlation[channel, :channel]).argmax())
            found = correlation[channel, other]
            if found < CANCELS:
                signs[channel] = -signs[other]
            elif found > SAME:
                signs[channel] = signs[other]
            elif found > DIFFERS and audible[:channel].any():
                signs[channel] = 1
        return signs

    def _correlations(self, block: Wave) -> tuple[Wave, npt.NDArray[np.bool_]]:
        """Returns the correlations (steps, channels, channels), and which channels are not silent (steps, channels)."""
        steps = -(-len(block) // self._fine)
        padded = block
        if len(block) < steps * self._fine:
            padded = np.zeros((steps * self._fine, self.channels), np.float32)
            padded[: len(block)] = block
        framed = padded.reshape(steps, self._fine, self.channels)
        audible = np.square(framed).mean(axis=1) > SILENT
        spectrum = np.fft.rfft(framed * self._taper, axis=1) * self._weight
        parts = np.concatenate([spectrum.real, spectrum.imag], axis=1).astype(np.float32)
        products = parts.transpose(0, 2, 1) @ parts
        power = np.diagonal(products, axis1=1, axis2=2)
        scale = np.sqrt(power[:, :, None] * power[:, None, :])
        both = audible[:, :, None] & audible[:, None, :] & (scale > 0)
        return np.where(both, products / np.where(both, scale, 1), 0).astype(np.float32), audible


def _faded(weight: Wave, before: float, length: int) -> Wave:
    """Returns a weight per sample with its steps replaced by ramps of `length` samples."""
    steps = np.flatnonzero(np.diff(weight, prepend=np.float32(before)))
    out = weight.copy()
    for step in steps.tolist():
        stop = min(step + length, len(out))
        first = out[step - 1] if step else before
        out[step:stop] = first + (weight[step] - first) * np.arange(1, stop - step + 1, dtype=np.float32) / length
    return out
