"""Streams of recognition: audio pushed in pieces, and the words that come back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pretrain.recognition.streaming_recogniser import StreamingRecogniser, Update
from pretrain.recognition.transcript import Word


def updates_of(streams: StreamingRecogniser, wave_T: torch.Tensor, size: int) -> list[Update]:
    """Returns all updates of a stream that receives `size` samples at a time; the text begins with its stable part."""
    state, found = streams.start(), list[Update]()
    for at in range(0, len(wave_T), size):
        state, [update] = streams.push(state, [wave_T[at : at + size]])
        assert update.text.startswith(update.stable)
        found.append(update)
    return [*found, *streams.finish(state)[1]]


def words_of(updates: Sequence[Update]) -> list[Word]:
    """Returns the words of all updates."""
    return [word for update in updates for word in update.words]


def assert_same_words(found: Sequence[Word], expected: Sequence[Word]) -> None:
    """Asserts equal texts, and times and probabilities within 1e-4."""
    assert [word.text for word in found] == [word.text for word in expected]
    assert np.allclose([word[1:] for word in found], [word[1:] for word in expected], atol=1e-4)
