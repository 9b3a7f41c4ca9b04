"""Voice activity detection with Silero VAD, a streaming detector that ships with its weights.

Silero's network (https://github.com/snakers4/silero-vad) gives a speech probability for each 32 ms at 16 kHz; it needs
audio at that rate, so it runs behind the resampler. Start and end follow its own hysteresis rule.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np

from data_pipeline.audio.codecs import Wave
from data_pipeline.core.onnx_session import open_session
from data_pipeline.core.schema import ConfigError, about, config

WINDOW: Final = 512
CONTEXT: Final = 64
RATE: Final = 16_000
LEAD: Final = 128 * WINDOW
"""Samples before a part of a recording, about four seconds, that the detector hears first."""
HYSTERESIS: Final = 0.15
"""Speech ends below the threshold minus this."""


@config
class VadConfig:
    """Voice activity detection (Silero): keeps stretches of speech and drops the audio between them."""

    enabled: Annotated[bool, about("cut recordings into stretches of speech; needs onnxruntime and silero-vad")] = False
    threshold: Annotated[float, about("speech probability from which on a stretch begins", gt=0.15, lt=1)] = 0.5
    min_silence_seconds: Annotated[float, about("shortest pause that ends a stretch", gt=0)] = 0.5
    pad_seconds: Annotated[float, about("kept before and after a stretch", ge=0)] = 0.1


def require() -> None:
    """Raises ConfigError if onnxruntime or silero-vad is missing."""
    packages = {"onnxruntime": "onnxruntime", "silero_vad": "silero-vad"}
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"vad.enabled=true: needs {' and '.join(missing)}: pip install {' '.join(missing)}")


@functools.cache
def _session() -> Any:
    require()
    spec = importlib.util.find_spec("silero_vad")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return open_session(Path(spec.submodule_search_locations[0]) / "data" / "silero_vad.onnx", threads=1)


class Detector:
    """Computes speech probabilities of one recording, window by window."""

    def __init__(self) -> None:
        self._state = np.zeros((2, 1, 128), np.float32)
        self._context = np.zeros(CONTEXT, np.float32)

    def probability(self, window: Wave) -> float:
        """Returns the speech probability of the next window.

        Args:
            window: (`WINDOW`,) samples at 16 kHz; a shorter last window is padded with zeros.
        """
        padded = np.zeros(CONTEXT + WINDOW, np.float32)
        padded[:CONTEXT] = self._context
        padded[CONTEXT : CONTEXT + len(window)] = window
        self._context = padded[-CONTEXT:]
        feed = {"input": padded[None], "state": self._state, "sr": np.array(RATE)}
        output, self._state = _session().run(None, feed)
        return float(output[0, 0])


def speech(
    blocks: Iterable[Wave], longest: int, config: VadConfig, lead: Wave | None = None
) -> Iterator[tuple[int, Wave]]:
    """Yields the stretches of a recording that contain speech.

    A stretch longer than `longest` is cut where speech is least probable in its second half. Keeps at most `longest`
    samples and one block in memory.

    Args:
        blocks: The recording at 16 kHz, in blocks of any size.
        longest: Samples of the longest stretch.
        config: Threshold, pause and padding.
        lead: (T,) audio before the first block, which gives the detector its context and is in no stretch.

    Yields:
        (start, wave) in the order of the recording; `start` in samples from its beginning.
    """
    detector, probabilities = Detector(), list[float]()
    before = np.zeros(0, np.float32) if lead is None else lead
    for at in range(0, len(before) - WINDOW + 1, WINDOW):
        detector.probability(before[at : at + WINDOW])
    patience = max(1, round(config.min_silence_seconds * RATE / WINDOW))
    pad = round(config.pad_seconds * RATE / WINDOW)
    limit = longest // WINDOW
    held, first = np.zeros(0, np.float32), 0
    # in windows from the start of the recording: `begin` of the current stretch (None: silence), end of the `last`
    # window with speech, end of the stretch before (`free`), windows seen (`number`)
    begin: int | None = None
    last = free = number = 0

    def piece(start: int, stop: int) -> tuple[int, Wave]:
        return start * WINDOW, held[start * WINDOW - first : min(stop * WINDOW - first, len(held))]

    for block in blocks:
        held = np.concatenate([held, block])
        while (number + 1) * WINDOW <= first + len(held):
            window = held[number * WINDOW - first : (number + 1) * WINDOW - first]
            probabilities.append(detector.probability(window))
            value, number = probabilities[-1], number + 1
            if value >= config.threshold:
                begin = max(free, number - 1 - pad) if begin is None else begin
                last = number
            elif value >= config.threshold - HYSTERESIS and begin is not None:
                last = number
            if begin is not None and number - last >= max(patience, pad):
                free = min(last + pad, begin + limit)
                yield piece(begin, free)
                begin = None
            elif begin is not None and number - begin >= limit:
                middle = begin + limit // 2
                free = middle + 1 + int(np.argmin(probabilities[middle:number]))
                yield piece(begin, free)
                begin = free
        # drop audio that no later stretch can include
        keep = begin if begin is not None else max(free, number - pad)
        if keep * WINDOW > first:
            held, first = held[keep * WINDOW - first :], keep * WINDOW
    if begin is not None:
        yield piece(begin, min(begin + limit, max(number, last + pad) + 1))
