"""PCM in parts of any size gives the audio of the whole stream."""

from __future__ import annotations

import numpy as np
import pytest
import soxr

from data_pipeline.audio.pcm import PcmStream, from_pcm16

RNG = np.random.default_rng(0)
SAMPLES = RNG.integers(-32_768, 32_767, 9_000).astype("<i2")
CONTENT = SAMPLES.tobytes()


def in_parts(rate: int, sizes: list[int], content: bytes = CONTENT) -> np.ndarray:
    stream, at, parts = PcmStream(rate), 0, []
    while at < len(content):
        size = sizes[len(parts) % len(sizes)]
        parts.append(stream.push(content[at : at + size]))
        at += size
    return np.concatenate([*parts, stream.finish()])


def test_samples_are_shares_of_full_scale() -> None:
    assert from_pcm16(np.array([-32_768, 16_384, 0], "<i2").tobytes()).tolist() == [-1.0, 0.5, 0.0]
    out = np.zeros(9_000, np.float32)
    assert from_pcm16(memoryview(CONTENT), out) is out
    assert np.array_equal(out, SAMPLES / np.float32(32_768))


@pytest.mark.parametrize("rate", [16_000, 8_000, 44_100])
def test_parts_of_any_size_give_the_whole(rate: int) -> None:
    whole = soxr.resample(from_pcm16(CONTENT), rate, 16_000) if rate != 16_000 else from_pcm16(CONTENT)
    assert np.allclose(in_parts(rate, [1, 7, 640, 3]), whole, atol=1e-6)
    assert np.array_equal(in_parts(rate, [1, 7, 640, 3], CONTENT + b"\1"), in_parts(rate, [1, 7, 640, 3]))
