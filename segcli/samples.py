"""What the samples of a decoded image become: upright RGB, or the class ids of labels.

- EXIF orientation 1 to 8 is applied (from EXIF, TIFF tag or XMP); a damaged one counts as 1.
- Grey is replicated to three channels; 1-bit is 0 or 255.
- Transparency (RGBA, grey with alpha, a palette's or a colour key's) is composited on white:
  round((c * a + 255 * (255 - a)) / 255).
- 16 bits per channel keep their high byte, grey and colour alike. 32-bit and floating-point
  samples have no range of their own and are refused.
- CMYK and YCCK become RGB by Pillow's rule, Adobe's inverted values undone; ICC profiles are
  ignored, as the models' own processors ignore them.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from segcli.errors import ImageDecodeError

# Byte of the header, behind the signature, IHDR's length and kind, width and height.
_PNG_BIT_DEPTH = 24

_Labels: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

# EXIF 2.32: what turns the stored rows and columns upright.
_ORIENTATION_TAG = 0x0112
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


def upright_rgb(image: ImageFile.ImageFile, path: str) -> npt.NDArray[np.uint8]:
    """Returns a loaded image's pixels, (H, W, 3) uint8 RGB; they may be read-only.

    Args:
        image: Of any mode.
        path: Where it came from, for messages.

    Raises:
        ImageDecodeError: Its samples are of 32 bits.
    """
    return _pixels(_to_rgb(image, path), _orientation(image))


def is_on_its_side(image: ImageFile.ImageFile) -> bool:
    """Tells whether rows and columns of an image change places when it is turned upright."""
    return _orientation(image) in _ON_THEIR_SIDE


def class_ids(image: ImageFile.ImageFile, path: str, data: bytes) -> _Labels:
    """Returns the values that a loaded image's pixels have in its file, (H, W) uint8 or uint16.

    Args:
        image: A PNG, TIFF or BMP.
        path: Where it came from, for messages.
        data: The file's bytes.

    Raises:
        ImageDecodeError: The pixels are colours, or values that Pillow has changed.
    """
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


def _pixels(image: Image.Image, orientation: int) -> npt.NDArray[np.uint8]:
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
