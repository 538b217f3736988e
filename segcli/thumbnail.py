"""Small pictures of images and of their class maps, for pages that show many at once.

Arrays in, arrays out; an image is averaged, a class map never: a mean of two ids is a third class.
"""

from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from segcli.results import ClassMap, SmallPicture

_Image: TypeAlias = npt.NDArray[np.uint8]

# The height keeps a tall strip, such as a scanned page roll, from being as long as it is.
MOST_WIDE, MOST_HIGH = 320, 480


def thumbnail(image: _Image) -> _Image:
    """Returns the image, averaged over areas, within 320 pixels of width and 480 of height.

    Args:
        image: (H, W, 3) uint8 RGB; one that fits is returned as it is.

    Returns:
        (h, w, 3) uint8 RGB, each side at least one pixel.
    """
    height, width = image.shape[:2]
    scale = min(MOST_WIDE / width, MOST_HIGH / height)
    if scale >= 1:
        return image
    size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA), np.uint8)


def small_picture(
    image: _Image,
    class_map: ClassMap | None = None,
    truth: ClassMap | None = None,
    confidence: float | None = None,
) -> SmallPicture:
    """Returns what a report shows of an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        class_map: (H, W) class ids, of any size.
        truth: The true ids, of any size.
        confidence: As SmallPicture has it.
    """
    small = thumbnail(image)
    size_hw = (small.shape[0], small.shape[1])
    return SmallPicture(
        small,
        None if class_map is None else sample_class_map(class_map, size_hw),
        None if truth is None else sample_class_map(truth, size_hw),
        confidence,
    )


def sample_class_map(class_map: ClassMap, size_hw: tuple[int, int]) -> ClassMap:
    """Returns the ids at the centres of a coarser grid, dtype kept.

    Args:
        class_map: (H, W) class ids, of any size.
        size_hw: Height and width of what comes out, usually those of a thumbnail.
    """
    rows, columns = (
        (2 * np.arange(n) + 1) * full // (2 * n)
        for n, full in zip(size_hw, class_map.shape, strict=True)
    )
    return class_map[np.ix_(rows, columns)]
