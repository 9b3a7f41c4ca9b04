"""Decoding of the samples of shards: parts, bounded counting and errors."""

from __future__ import annotations

import io

import numpy as np
import pytest

from data_pipeline.audio.codecs import encode
from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.samples import BLOCK_VALUES, open_sample

WAVE = (np.sin(np.arange(3 * BLOCK_VALUES) / 9) * 9000).astype(np.int16)


@pytest.mark.parametrize("codec", ["flac", "wav"])
def test_a_part_is_decoded_exactly(codec: str) -> None:
    content = encode(WAVE, 16_000, codec)
    with open_sample(memoryview(content)) as sample:
        assert (sample.rate, sample.channels, sample.frames) == (16_000, 1, len(WAVE))
        out = np.empty(500, np.float32)
        np.testing.assert_array_equal(sample.read(1000, 500, out), WAVE[1000:1500] / np.float32(32768))
        np.testing.assert_array_equal(out, WAVE[1000:1500] / np.float32(32768))
        assert len(sample.read(len(WAVE) - 10, 500)) == 10


def test_counting_ends_one_block_beyond_the_limit() -> None:
    content = encode(WAVE, 16_000, "flac")
    with open_sample(io.BytesIO(content)) as sample:
        assert sample.count(10) == BLOCK_VALUES
    with open_sample(content) as sample:
        assert sample.count() == len(WAVE)


def test_damaged_audio_is_an_audio_error() -> None:
    with pytest.raises(AudioError, match="cannot be decoded") as refused, open_sample(b"no audio"):
        pass
    assert refused.value.reason == "corrupt"
