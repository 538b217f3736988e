"""Bytes of an image file -> (H, W, 3) uint8 RGB, or the class ids of labels.

Pillow decodes everything, by its plugin classes and an allow-list of formats (JPEG, PNG, WebP,
TIFF, BMP, GIF, PPM), chosen by content and never by suffix; EPS, PS, WMF and other formats that
start programs or draw are out of reach. Animations and multi-page files give their first frame. A
file cut short is an error even where the format lets a decoder fill the rest with grey, unless the
caller allows it. What samples of each kind become stands in ``samples``.

Two of Pillow's process-wide settings would break these rules, so decoding moves them for good:
LOAD_TRUNCATED_IMAGES becomes what the caller asks for, the same for all threads of a run, and
MAX_IMAGE_PIXELS is raised to our own limit where it is lower, which ``decode_image`` checks itself
before any pixel is decoded.
"""

import io
import re
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from segcli.errors import ImageDecodeError, ImageTooLarge
from segcli.samples import class_ids, is_on_its_side, upright_rgb

DEFAULT_MAX_PIXELS = 178_956_970

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_FORMATS: tuple[tuple[str, re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    ("PNG", re.compile(re.escape(_PNG_SIGNATURE)), PngImageFile),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
    ("BMP", re.compile(rb"BM"), BmpImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImageFile),
    ("PPM", re.compile(rb"P[1-6]\s"), PpmImageFile),
)

_LABEL_FORMATS = ("PNG", "TIFF", "BMP")

_Pixels = TypeVar("_Pixels")


def decode_image(
    data: bytes,
    path: str,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    allow_truncated: bool = False,
) -> npt.NDArray[np.uint8]:
    """Decodes one image by the rules of the module docstring.

    Args:
        data: The encoded file.
        path: Where it came from, for messages.
        max_pixels: Refuse images with more pixels than this, from their header.
        allow_truncated: Take an image that is cut short as far as it goes; the rest is the
            decoder's grey or black.

    Returns:
        (H, W, 3) uint8 RGB after orientation; it may be read-only.

    Raises:
        ImageDecodeError: The bytes are not a complete image of a supported format.
        ImageTooLarge: The image has more than ``max_pixels`` pixels.
    """
    return _decode(data, path, max_pixels, allow_truncated, lambda image: None, upright_rgb)


def decode_reduced(
    data: bytes,
    path: str,
    needed_hw: Callable[[tuple[int, int]], tuple[int, int]],
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    allow_truncated: bool = False,
) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """Decodes one image; a JPEG at 1/2, 1/4 or 1/8 of its size where that is enough.

    The decoder leaves out high frequencies (libjpeg's ``scale_denom``): 20 ms instead of 173 for a
    photo of 12 megapixels, but not quite what a resize would make of the whole.

    Args:
        data: The encoded file.
        path: Where it came from, for messages.
        needed_hw: Given the whole image's height and width, the least that is to be returned.
        max_pixels: Refuse images with more pixels than this, from their header.
        allow_truncated: As for ``decode_image``.

    Returns:
        (h, w, 3) uint8 RGB after orientation, which may be read-only, and the height and width
        of the whole image.

    Raises:
        ImageDecodeError: The bytes are not a complete image of a supported format.
        ImageTooLarge: The image has more than ``max_pixels`` pixels.
    """
    whole_hw: tuple[int, int] | None = None

    def reduce(image: ImageFile.ImageFile) -> None:
        nonlocal whole_hw
        if isinstance(image, JpegImageFile):
            width, height = image.size
            on_its_side = is_on_its_side(image)
            whole_hw = (width, height) if on_its_side else (height, width)
            needed = needed_hw(whole_hw)
            image.draft(None, needed if on_its_side else needed[::-1])

    pixels = _decode(data, path, max_pixels, allow_truncated, reduce, upright_rgb)
    return pixels, whole_hw or (pixels.shape[0], pixels.shape[1])


def _decode(
    data: bytes,
    path: str,
    max_pixels: int,
    allow_truncated: bool,
    configure: Callable[[ImageFile.ImageFile], None],
    pixels_of: Callable[[ImageFile.ImageFile, str], _Pixels],
) -> _Pixels:
    """Returns what ``pixels_of`` makes of an image, its decoder configured after the header."""
    ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    name, plugin = _sniff(data, path)
    try:
        # Not Image.open: that compares with Pillow's limit, and warns, before ours is asked.
        with plugin(io.BytesIO(data)) as image:
            _check_size(image.size, max_pixels, path)
            configure(image)
            image.load()
            if not allow_truncated:
                _check_whole(name, data, path)
            return pixels_of(image, path)
    except (ImageDecodeError, ImageTooLarge):
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise _too_large(path, "its pixels do not fit in memory") from error
    # On damaged files Pillow raises SyntaxError, OSError, struct.error, TypeError and more.
    except Exception as error:
        reason = _lower_first(str(error).rstrip(".")) or type(error).__name__
        if _is_cut(name, data) or "truncated" in reason:
            raise _truncated(name, data, path) from error
        raise ImageDecodeError(f"cannot decode {path!r}: damaged {name} ({reason})") from error


def decode_labels(
    data: bytes, path: str, *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Decodes a label map: one class id per pixel, as the file stores it.

    A palette image gives its indices whatever its colors and transparency, a grey one its values.
    Nothing is scaled, and the EXIF orientation of a PNG does not count.

    Args:
        data: The encoded file: PNG, TIFF or BMP; the other formats lose or scale the values.
        path: Where it came from, for messages.
        max_pixels: Refuse images with more pixels than this, from their header.

    Returns:
        (H, W) uint8, uint16 where the file has 16 bits; it may be read-only.

    Raises:
        ImageDecodeError: The bytes are no complete image of such a format, or hold colors.
        ImageTooLarge: The image has more than ``max_pixels`` pixels.
    """
    name, _ = _sniff(data, path)
    if name not in _LABEL_FORMATS:
        raise ImageDecodeError(
            f"cannot read class ids from {path!r}: {name} does not keep pixel values as they were",
            hint="save labels as palette or grey PNG, whose pixel value is the class id",
        )
    return _decode(data, path, max_pixels, False, lambda image: None, partial(class_ids, data=data))


def _sniff(data: bytes, path: str) -> tuple[str, type[ImageFile.ImageFile]]:
    if not data:
        raise ImageDecodeError(f"cannot decode {path!r}: the file is empty")
    for name, magic, plugin in _FORMATS:
        if magic.match(data):
            return name, plugin
    raise ImageDecodeError(
        f"cannot decode {path!r}: not an image: starts with {data[:12]!r}",
        hint=f"supported formats: {', '.join(name for name, _, _ in _FORMATS)}",
    )


def _check_size(size_wh: tuple[int, int], max_pixels: int, path: str) -> None:
    width, height = size_wh
    if width * height > max_pixels:
        raise _too_large(path, f"{width}x{height} is {width * height} pixels, limit {max_pixels}")


def _too_large(path: str, reason: str) -> ImageTooLarge:
    return ImageTooLarge(
        f"{path!r} is too large: {reason}",
        hint="scale the image down, or raise --max-pixels",
    )


def _is_cut(name: str, data: bytes) -> bool:
    """Tells whether the end that every whole file of the format has is missing."""
    if name == "JPEG":
        return data.rfind(b"\xff\xd9") < 0
    if name == "PNG":
        return data.rfind(b"IEND") < 0
    if name == "WebP":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return False


def _check_whole(name: str, data: bytes, path: str) -> None:
    # Pillow is content without a PNG's end where the pixels are whole.
    if _is_cut(name, data):
        raise _truncated(name, data, path)


def _truncated(name: str, data: bytes, path: str) -> ImageDecodeError:
    return ImageDecodeError(
        f"cannot decode {path!r}: truncated {name} ({len(data)} bytes)",
        hint="--allow-truncated takes what is there",
    )


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
