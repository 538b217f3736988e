"""Colours, class ids and values -> the bytes of a PNG or JPEG file; ``image_io`` reads such."""

import io
import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from segcli import __version__

_SOFTWARE = f"segcli {__version__}"


def encode_png_rgb(image: npt.NDArray[np.uint8], text: Mapping[str, str] | None = None) -> bytes:
    """Encodes colours as PNG.

    Args:
        image: (H, W, 3) uint8 RGB, or (H, W, 4) RGBA.
        text: Entries beside ``Software``.
    """
    return _encode_png(Image.fromarray(image), text)


def encode_palette_png(
    class_map: npt.NDArray[np.uint8],
    palette: npt.NDArray[np.uint8],
    text: Mapping[str, str] | None = None,
) -> bytes:
    """Encodes class ids as a palette PNG: the pixel value is the id, and it looks coloured.

    Args:
        class_map: (H, W) uint8.
        palette: (K, 3) uint8 RGB, K <= 256; ids from K on are black.
        text: Entries beside ``Software``.
    """
    image = Image.fromarray(class_map)
    # Always 256 entries: Pillow packs shorter palettes into 1, 2 or 4 bits and then
    # loses every id beyond them.
    image.putpalette(palette.tobytes().ljust(768, b"\0"))
    return _encode_png(image, text)


def encode_gray_png(values: npt.NDArray[np.uint8], text: Mapping[str, str] | None = None) -> bytes:
    """Encodes one 8-bit channel as grey PNG.

    Args:
        values: (H, W) uint8.
        text: Entries beside ``Software``.
    """
    return _encode_png(Image.fromarray(values), text)


def encode_gray16_png(
    values: npt.NDArray[np.uint16], text: Mapping[str, str] | None = None
) -> bytes:
    """Encodes one 16-bit channel as grey PNG.

    Args:
        values: (H, W) uint16.
        text: Entries beside ``Software``.
    """
    return _encode_png(Image.fromarray(values), text)


def encode_id_png(class_map: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    """Encodes class ids as PNG for programs that see three channels of 8 bits, such as a browser.

    Args:
        class_map: (H, W) uint8, written as grey; or uint16, whose low byte becomes red, the high
            one green.
    """
    if class_map.dtype == np.uint8:
        return _encode_png(Image.fromarray(class_map), None)
    low, high = (class_map & 0xFF).astype(np.uint8), (class_map >> 8).astype(np.uint8)
    return _encode_png(Image.fromarray(np.dstack([low, high, np.zeros_like(low)])), None)


def encode_jpeg(image: npt.NDArray[np.uint8], quality: int = 90) -> bytes:
    """Encodes (H, W, 3) uint8 RGB as baseline JPEG, ``quality`` in 1..100."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _encode_png(image: Image.Image, text: Mapping[str, str] | None) -> bytes:
    info = PngInfo()
    # First, so that is_segcli_png finds it whatever else is written.
    info.add_text("Software", _SOFTWARE)
    for key, value in (text or {}).items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    # Run-length matching suits class maps: as small as zlib's default, in a third of the time. A
    # photo that is cut out, or a confidence, has no runs.
    has_runs = image.mode not in ("RGBA", "L")
    strategy = zlib.Z_RLE if has_runs else zlib.Z_DEFAULT_STRATEGY
    image.save(buffer, "PNG", pnginfo=info, compress_type=strategy)
    return buffer.getvalue()
