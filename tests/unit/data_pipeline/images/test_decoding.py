"""Images of any mode, and files that are damaged, hostile or no images."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.images import decoding
from tests.support.pictures import colours, encoded, png_of_size

COLOUR = colours("some", 12, 20)
GREY = COLOUR[:, :, 0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "I", "I;16", "F", "HSV"])
def test_every_mode_becomes_grey_or_rgb(mode: str) -> None:
    made = Image.fromarray(COLOUR)
    image = Image.fromarray(GREY.astype(np.uint16) * 257) if mode == "I;16" else made.convert(mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "TIFF" if mode in ("I", "F", "PA", "HSV") else "PNG"
    if mode in ("PA", "HSV"):  # no format keeps them
        image, kind = image.convert("RGBA" if mode == "PA" else "RGB"), "PNG"
    found = decoding.decode(encoded(image, kind))
    assert found.mode in ("L", "RGB")
    assert found.size == (20, 12)
    if mode in ("L", "I;16"):
        np.testing.assert_array_equal(np.asarray(found), GREY if mode == "I;16" else np.asarray(made.convert("L")))


def test_transparent_parts_are_white() -> None:
    transparent = np.dstack([COLOUR, np.zeros((12, 20), np.uint8)])
    assert np.asarray(decoding.decode(encoded(Image.fromarray(transparent)))).min() == 255


def test_an_image_is_turned_as_its_metadata_say() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoding.decode(encoded(Image.fromarray(COLOUR), exif=exif)).size == (12, 20)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not_image"),
        (b"no image at all", "not_image"),
        (encoded(Image.fromarray(COLOUR))[:-60], "corrupt"),
        (encoded(Image.fromarray(COLOUR), "JPEG")[:-40], "corrupt"),
        (encoded(Image.fromarray(COLOUR), "GIF")[:40], "not_image"),
        (png_of_size(50_000, 50_000), "too_large"),
        (png_of_size(9_000, 9_000), "too_large"),
        (png_of_size(100, 100), "corrupt"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not_image"),
        (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "corrupt"),
    ],
)
def test_files_that_cannot_be_used_have_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(decoding.ImageError) as caught:
        decoding.decode(content)
    assert caught.value.reason == reason
    assert " object at " not in str(caught.value), "the same file has the same message each time"


def test_every_truncation_of_a_file_decodes_or_has_a_reason() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = encoded(Image.fromarray(COLOUR), kind)
        for length in range(0, len(whole), 37):
            with contextlib.suppress(decoding.ImageError):
                assert decoding.decode(whole[:length]).size == (20, 12)


def test_missing_and_huge_files_have_a_reason(tmp_path: Path) -> None:
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(decoding.MOST_BYTES + 1)
    for path, reason in ((tmp_path / "none.png", "missing"), (huge, "too_large"), (tmp_path, "read_error")):
        with pytest.raises(decoding.ImageError) as caught:
            decoding.read_image(str(path))
        assert caught.value.reason == reason


def test_shards_keep_a_reduced_png_without_metadata() -> None:
    large = Image.fromarray(np.tile(COLOUR, (20, 20, 1)))
    large.info["comment"] = "secret"
    kept = decoding.stored(large, 64)
    with Image.open(io.BytesIO(kept)) as found:
        assert (found.format, max(found.size), found.info) == ("PNG", 64, {})
    assert kept == decoding.stored(large, 64)


def test_pixels_are_the_middle_square() -> None:
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 200
    np.testing.assert_array_equal(decoding.pixels(Image.fromarray(wide), 8, 1), np.full((1, 8, 8), 200, np.uint8))
    assert decoding.pixels(Image.fromarray(COLOUR), 6, 3).shape == (3, 6, 6)
    assert decoding.pixels(Image.fromarray(GREY), 6, 3).shape == (3, 6, 6)
