"""Small images, and files that only look like one."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def colours(name: str, height: int = 10, width: int = 10) -> np.ndarray:
    """Returns the random pixels of a name, (height, width, 3) uint8."""
    return np.random.default_rng(list(name.encode())).integers(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Returns an image as a file of Pillow's format `kind`."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """Returns a PNG whose header names a size, with hardly any data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def save(path: Path, name: str) -> None:
    """Writes the picture of a name."""
    Image.fromarray(colours(name)).save(path)
