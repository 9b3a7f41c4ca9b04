"""Images: reading of files that may be damaged or hostile, the PNG that shards keep, and pixels for models."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any, Final

import fsspec
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.core.retries import error_text
from data_pipeline.core.storage import is_url

ENDINGS: Final = ("png", "jpg", "jpeg", "webp")
"""Endings of image members in tars; ours are png."""
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read. Others of Pillow's are not: EPS, for example, starts another program."""
MOST_BYTES: Final = 1 << 26
"""Size limit of an image file."""
MOST_PIXELS: Final = 1 << 26
"""Limit of width × height, which an image has in its header: a small file can decode to gigabytes."""
Pixels = npt.NDArray[np.uint8]


class ImageError(ValueError):
    """An image cannot be used; `reason` is a short code for reports."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageError, (self.reason, str(self))


def read_image(path: str) -> bytes:
    """Returns the content of an image file, a local path or fsspec URL.

    Raises:
        ImageError: it does not exist (`missing`), cannot be read (`read_error`), is empty or too large.
    """
    try:
        with fsspec.open(path if is_url(path) else path.removeprefix("file://"), "rb") as file:
            content: bytes = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ImageError("missing", f"{path}: there is no such file") from None
    except Exception as error:  # every protocol of fsspec has its own exceptions
        raise ImageError("read_error", f"{path}: cannot be read: {error_text(error)}") from None
    if len(content) > MOST_BYTES:
        raise ImageError("too_large", f"{path}: has more than {MOST_BYTES >> 20} MiB")
    return content


def decode(content: bytes) -> Image.Image:
    """Returns a whole image, upright, as L (grey) or RGB; transparent parts are white; of an animation the first frame.

    Raises:
        ImageError: its format is not in `FORMATS` (`not_image`), has too many pixels (`too_large`), or is truncated or
            damaged (`corrupt`).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is checked below
        try:
            found = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError:
            raise ImageError("too_large", f"has more than {MOST_PIXELS:,} pixels") from None
        except Exception as error:  # Pillow's readers raise many types for damaged headers
            # the text of UnidentifiedImageError is an address in memory
            detail = "" if isinstance(error, UnidentifiedImageError) else f" ({error_text(error)})"
            raise ImageError("not_image", f"is none of {', '.join(FORMATS)}{detail}") from None
        with found:
            if found.width * found.height > MOST_PIXELS:
                size = f"{found.width:,} × {found.height:,}"
                raise ImageError("too_large", f"has {size} pixels; at most {MOST_PIXELS:,} are read")
            try:
                return _upright(found)
            except ImageError:
                raise
            except Exception as error:  # as above
                raise ImageError("corrupt", f"cannot be decoded ({error_text(error)})") from None


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    with contextlib.suppress(Exception):  # a picture with a damaged orientation is kept as it is
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _from_numbers(np.asarray(image))
    if image.mode in ("1", "L"):
        return image.convert("L")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _from_numbers(values: npt.NDArray[Any]) -> Image.Image:
    """Returns a grey image of 16-bit or larger whole numbers, or of numbers from 0 to 1."""
    if not np.isfinite(values).all():
        raise ImageError("corrupt", "holds values that are not finite")
    most = float(values.max())
    if most > 255:
        values = values / 257.0
    elif values.dtype.kind == "f" and most <= 1:
        values = values * 255.0
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def stored(image: Image.Image, longest_side: int) -> bytes:
    """Returns the PNG that a shard keeps, without metadata; a larger image is reduced to `longest_side` pixels."""
    plain = Image.fromarray(np.asarray(image))
    plain.thumbnail((longest_side, longest_side), Image.Resampling.BICUBIC, reducing_gap=None)
    buffer = io.BytesIO()
    plain.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def pixels(image: Image.Image, side: int, channels: int) -> Pixels:
    """Returns a square for a model, (channels, side, side) uint8: the shorter side is scaled, the middle cropped."""
    mode = "L" if channels == 1 else "RGB"
    fitted = ImageOps.fit(image.convert(mode), (side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(fitted).reshape(side, side, channels).transpose(2, 0, 1))
