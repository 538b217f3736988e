"""Text in pictures, by the fonts that OpenCV 5 brings: no font file, no other library.

They have Latin, Greek, Cyrillic, Chinese, Japanese and Korean letters. OpenCV draws one letter
after the other from left to right, so Hebrew and Arabic, which it has too, come out wrong and count
as missing. Sizes are in pixels, from about the top of an accent on a capital to the baseline; tails
of letters go down by another quarter.
"""

import unicodedata
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

_FONT = "sans"
_WEIGHT = 500
_LONGEST_NAME = 40


def readable_name(name: str, class_id: int | None = None) -> str:
    """Returns a class name on one line, cut to 40 letters, of letters that can be drawn.

    Args:
        name: As the model's card has it.
        class_id: What a name with another letter becomes, ``class 7`` for instance; if None, only
            the letter is replaced, by a question mark.
    """
    text = unicodedata.normalize("NFC", " ".join(name.split()))
    drawable = "".join(letter if _has_glyph(letter) else "?" for letter in text)
    if class_id is not None and (drawable != text or not text):
        return f"class {class_id}"
    if len(drawable) > _LONGEST_NAME:
        drawable = drawable[: _LONGEST_NAME - 3].rstrip() + "..."
    return drawable


def text_width(text: str, size: int) -> int:
    """Returns how far the text reaches to the right of its origin, in pixels."""
    if not text:
        return 0
    box = cv2.getTextSize((0, 0), text, (0, 0), cv2.FontFace(_FONT), size, _WEIGHT)
    return int(box[0] + box[2])


def draw_text(
    canvas: npt.NDArray[np.uint8],
    text: str,
    left: int,
    baseline: int,
    size: int,
    color: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """Draws text into ``canvas``, (H, W, 3) uint8 RGB, which it must fit."""
    if text:
        cv2.putText(canvas, text, (left, baseline), color, cv2.FontFace(_FONT), size, _WEIGHT)


def text_coverage(text: str, size: int, margin: int = 0) -> npt.NDArray[np.uint8]:
    """Returns how much of each pixel the text covers, in 1/255, cut to the text and a margin."""
    # Stacked accents leave the line; OpenCV's box of the text does not say so.
    canvas = np.zeros((2 * size, text_width(text, size) + 2 * size), np.uint8)
    origin = (size, size + size // 3)
    cv2.putText(canvas, text, origin, 255, cv2.FontFace(_FONT), size, _WEIGHT)
    left, top, width, height = cv2.boundingRect(canvas)
    return np.pad(canvas[top : top + height, left : left + width], margin)


@lru_cache(maxsize=4096)
def _has_glyph(letter: str) -> bool:
    if letter.isascii():
        return letter.isprintable()
    # Half a surrogate pair, or a mark that belongs above or below its neighbor.
    if unicodedata.category(letter) in ("Cs", "Mn", "Mc", "Me"):
        return False
    if unicodedata.bidirectional(letter) in ("R", "AL", "AN"):
        return False
    return not np.array_equal(text_coverage(letter, 24), text_coverage("?", 24))
