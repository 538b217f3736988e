"""Bytes to (H, W, 3) uint8 RGB and back, and label maps; the only room that knows image files.

Pillow decodes everything, by its plugin classes and an allow-list of formats (JPEG, PNG, WebP,
TIFF, BMP, GIF, PPM), chosen by content and never by suffix; EPS, PS, WMF and other formats that
start programs or draw are out of reach. What a file becomes:

- EXIF orientation 1 to 8 is applied (from EXIF, TIFF tag or XMP); a damaged one counts as 1.
- Grey is replicated to three channels; 1-bit is 0 or 255.
- Transparency (RGBA, grey with alpha, a palette's or a colour key's) is composited on white:
  round((c * a + 255 * (255 - a)) / 255).
- 16 bits per channel keep their high byte, grey and colour alike. 32-bit and floating-point
  samples have no range of their own and are refused.
- CMYK and YCCK become RGB by Pillow's rule, Adobe's inverted values undone; ICC profiles are
  ignored, as the models' own processors ignore them.
- Animations and multi-page files give their first frame.
- A file cut short is an error even where the format lets a decoder fill the rest with grey,
  unless the caller allows it.

Two of Pillow's process-wide settings would break these rules, so decoding moves them for good:
LOAD_TRUNCATED_IMAGES becomes what the caller asks for, the same for all threads of a run, and
MAX_IMAGE_PIXELS is raised to our own limit
where it is lower, which ``decode_image`` checks itself before any pixel is decoded.
"""

import io
import re
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from segcli import __version__
from segcli.errors import ImageDecodeError, ImageTooLarge

DEFAULT_MAX_PIXELS = 178_956_970

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SOFTWARE = f"segcli {__version__}"
_ORIENTATION_TAG = 0x0112

_FORMATS: tuple[tuple[str, re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    ("PNG", re.compile(re.escape(_PNG_SIGNATURE)), PngImageFile),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
    ("BMP", re.compile(rb"BM"), BmpImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImageFile),
    ("PPM", re.compile(rb"P[1-6]\s"), PpmImageFile),
)

# Byte of the header, behind the signature, IHDR's length and kind, width and height.
_PNG_BIT_DEPTH = 24
_LABEL_FORMATS = ("PNG", "TIFF", "BMP")

_RgbImage: TypeAlias = npt.NDArray[np.uint8]
_Labels: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
_Pixels = TypeVar("_Pixels")

# EXIF 2.32, tag 0x0112: what turns the stored rows and columns upright.
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Rows become columns; and the first row comes last, as row or as column.
_ON_THEIR_SIDE, _FROM_THE_END = (5, 6, 7, 8), (3, 4, 6, 7)

# Pillow keeps four bytes a pixel and hands an array over as two copies: for a photo of 100
# megapixels 1 GB at once, so such a one goes over in strips of this many pixels.
_STRIP_PIXELS = 1 << 22


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
    return _decode(data, path, max_pixels, allow_truncated, lambda image: None, _upright_rgb)


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
            on_its_side = _orientation(image) in _ON_THEIR_SIDE
            whole_hw = (width, height) if on_its_side else (height, width)
            needed = needed_hw(whole_hw)
            image.draft(None, needed if on_its_side else needed[::-1])

    pixels = _decode(data, path, max_pixels, allow_truncated, reduce, _upright_rgb)
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
    return _decode(
        data, path, max_pixels, False, lambda image: None, partial(_class_ids, data=data)
    )


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


def _upright_rgb(image: ImageFile.ImageFile, path: str) -> _RgbImage:
    return _pixels(_to_rgb(image, path), _orientation(image))


def _class_ids(image: ImageFile.ImageFile, path: str, data: bytes) -> _Labels:
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16, copy=False)
    if image.mode == "P" or _is_plain_grey(image, data):
        return np.asarray(image).astype(np.uint8, copy=False)
    if image.mode == "L" and isinstance(image, PngImageFile):
        # Of 2 or 4 bits, which Pillow stretches to 0..255: 3 becomes 255 or 51.
        return np.asarray(image) // np.uint8(255 // ((1 << data[_PNG_BIT_DEPTH]) - 1))
    packed = image.mode in ("1", "L")
    found = f"{image.format} of fewer than 8 bits or with white as 0" if packed else image.mode
    raise ImageDecodeError(
        f"cannot read class ids from {path!r}: found {found}, "
        "expected a palette or one grey channel of 8 or 16 bits",
        hint="these are colors, no class ids: take the labels that they were drawn from, or "
        "replace each color by its class's id"
        if image.mode in ("RGB", "RGBA")
        else "save labels as palette or grey PNG, whose pixel value is the class id",
    )


def _is_plain_grey(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Tells whether Pillow gives the grey values, 8 bits or 1, as they are in the file."""
    if isinstance(image, PngImageFile):
        return image.mode == "1" or (image.mode == "L" and data[_PNG_BIT_DEPTH] == 8)
    if isinstance(image, TiffImageFile):
        # TIFF 6.0: BitsPerSample, and PhotometricInterpretation, where 0 is white as 0.
        bits, black_is_zero = image.tag_v2.get(258, (1,)), image.tag_v2.get(262) == 1
        return black_is_zero and (image.mode == "1" or (image.mode == "L" and bits == (8,)))
    return image.mode == "L"


def _to_rgb(image: ImageFile.ImageFile, path: str) -> Image.Image:
    # Pillow reads 16-bit PPM as "I", the mode it also has for 32 bits.
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if (key := image.info.get("transparency")) is not None:
            grey[values == key] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageDecodeError(
            f"cannot decode {path!r}: {image.format} with 32-bit or floating-point samples",
            hint="convert it to 8 or 16 bits per channel",
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        flat = Image.new("RGB", rgba.size, "white")
        flat.paste(rgba, mask=rgba)
        return flat
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixels(image: Image.Image, orientation: int) -> _RgbImage:
    """Returns the pixels of an RGB image, upright."""
    width, height = image.size
    turn = _ORIENTATIONS.get(orientation)
    step = max(1, _STRIP_PIXELS // width)
    if height <= step:
        return np.asarray(image if turn is None else image.transpose(turn))
    on_its_side = orientation in _ON_THEIR_SIDE
    pixels = np.empty((width, height, 3) if on_its_side else (height, width, 3), np.uint8)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        strip = image.crop((0, top, width, bottom))
        if turn is not None:
            strip = strip.transpose(turn)
        from_end = orientation in _FROM_THE_END
        place = slice(height - bottom, height - top) if from_end else slice(top, bottom)
        pixels[(slice(None), place) if on_its_side else place] = np.asarray(strip)
    return pixels


def _orientation(image: ImageFile.ImageFile) -> int:
    # After load(): by then Pillow has turned a TIFF itself and dropped the tag.
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata does not spoil the pixels
        return 1
    return value if isinstance(value, int) else 1


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


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
