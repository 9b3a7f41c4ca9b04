"""Cuts a stream of audio into segments. Source times stay exact: `start` counts samples from the recording's begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from data_pipeline.audio import Wave


def cut(blocks: Iterable[Wave], longest: int) -> Iterator[tuple[int, Wave, bool]]:
    """(start, wave, whole) pieces of at most `longest` samples, without gaps; `whole` where it is all of the recording.

    The last two pieces of a recording are of equal length, so that none is a short remainder. Holds at most
    2 · `longest` samples and one block.
    """
    waiting: list[Wave] = []
    held = start = 0
    for block in blocks:
        waiting.append(block)
        held += len(block)
        while held >= 2 * longest:
            whole = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
            yield start, whole[:longest], False
            waiting, held, start = [whole[longest:]], held - longest, start + longest
    if not held:
        return
    whole = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
    if held <= longest:
        yield start, whole, start == 0
        return
    half = -(-held // 2)
    yield start, whole[:half], False
    yield start + half, whole[half:], False
