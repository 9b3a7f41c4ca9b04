"""Decodes the content of a file, as a file and from memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.audio import codecs
from data_pipeline.audio.codecs import AudioError


def decoded(content: bytes, tmp_path: Path) -> np.ndarray:
    """Returns the audio of a file, (T,) at 16 kHz; it must be the same from memory."""
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    from_file = np.concatenate(list(codecs.decode(str(path), 16_000)))
    np.testing.assert_array_equal(np.concatenate(list(codecs.decode(content, 16_000))), from_file)
    return from_file


def seconds(content: bytes, tmp_path: Path) -> float:
    """Returns the seconds of its audio."""
    return len(decoded(content, tmp_path)) / 16_000


def reason(content: bytes, tmp_path: Path) -> str:
    """Returns the reason for which it is refused; fails where it is not."""
    with pytest.raises(AudioError) as caught:
        decoded(content, tmp_path)
    return caught.value.reason
