"""Marks on a picture of a class map: borders between classes, and names within them.

Arrays in, arrays out. Both grow with the picture, so that they are seen alike at any size.
"""

from collections.abc import Collection, Sequence
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from segcli.lettering import readable_name, text_coverage
from segcli.results import ClassMap

_Image: TypeAlias = npt.NDArray[np.uint8]

# Names are placed on a grid of points no finer than this, whatever the size of the picture.
_GRID_SIDE = 640
_SMALLEST_TEXT = 11
_TEXT_STEPS = (1.0, 0.8, 0.65, 0.5)


def draw_contours(
    picture: _Image,
    class_map: ClassMap,
    palette: _Image,
    visible: Collection[int] | None = None,
) -> _Image:
    """Returns the picture with a line along every border, each side of it in its own color.

    Args:
        picture: (H, W, 3) uint8 RGB, an overlay for instance.
        class_map: (H, W) class ids below K.
        palette: (K, 3) uint8 RGB.
        visible: The classes to surround; None for all. Borders among the others are not drawn,
            nor their side of a line.
    """
    _require_same_size(picture, class_map)
    is_hidden = np.zeros(len(palette), np.bool_)
    if visible is not None:
        is_hidden[:] = True
        is_hidden[list(visible)] = False
    # The hidden classes become one, so that no border lies between them.
    table: npt.NDArray[np.unsignedinteger] = np.arange(len(palette)).astype(class_map.dtype)
    table[is_hidden] = is_hidden.argmax()
    joined = table[class_map]
    side = max(1, round(max(class_map.shape) / 800))
    around = np.ones((2 * side + 1, 2 * side + 1), np.uint8)
    on_border = cv2.dilate(joined, around) != cv2.erode(joined, around)
    on_border &= ~is_hidden[class_map]
    drawn = picture.copy()
    drawn[on_border] = palette[class_map[on_border]]
    return drawn


def draw_names(
    picture: _Image,
    class_map: ClassMap,
    class_names: Sequence[str],
    visible: Collection[int] | None = None,
) -> _Image:
    """Returns the picture with each class's name in the largest of its regions.

    A name is white with a black outline, so that it can be read on any color. Its box lies in the
    region, as deep inside as it can (the pole of inaccessibility among the places where it fits),
    so no two overlap. A name that does not fit at half the usual size is left out.

    Args:
        picture: (H, W, 3) uint8 RGB, an overlay for instance.
        class_map: (H, W) class ids below K.
        class_names: One per class id.
        visible: The classes to name; None for all.
    """
    _require_same_size(picture, class_map)
    drawn = picture.copy()
    step = -(-max(class_map.shape) // _GRID_SIDE)
    grid = np.ascontiguousarray(class_map[::step, ::step])
    usual = max(14, round(min(class_map.shape) / 28))
    sizes = sorted({max(_SMALLEST_TEXT, round(usual * s)) for s in _TEXT_STEPS}, reverse=True)
    for class_id in np.unique(grid).tolist():
        if visible is not None and class_id not in visible:
            continue
        region, (top, left) = _largest_region(grid == class_id)
        name = readable_name(class_names[class_id], class_id)
        for size in sizes:
            outline = max(1, round(size / 10))
            coverage = text_coverage(name, size, outline)
            # All points that the box may cover, wherever between two of them it ends.
            box_hw = tuple(-(-side // step) + (step > 1) for side in coverage.shape)
            place = _deepest_place(region, box_hw)
            if place is not None:
                y, x = (top + place[0]) * step, (left + place[1]) * step
                _draw_outlined(drawn, coverage, y, x, outline)
                break
    return drawn


def _largest_region(mask: npt.NDArray[np.bool_]) -> tuple[_Image, tuple[int, int]]:
    """Returns the largest connected part, 0 and 1, cut to its bounds, and its top left corner."""
    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=4)
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    left, top, width, height = stats[largest, : cv2.CC_STAT_AREA].tolist()
    cut = parts[top : top + height, left : left + width] == largest
    return cut.view(np.uint8), (top, left)


def _deepest_place(region: _Image, box_hw: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the top left corner of the box in the region whose middle is farthest from outside.

    None if it fits nowhere.
    """
    height, width = box_hw
    if height > region.shape[0] or width > region.shape[1]:
        return None
    middle = (width // 2, height // 2)
    fits = cv2.erode(
        np.pad(region, 1),
        np.ones(box_hw, np.uint8),
        anchor=middle,
        borderType=cv2.BORDER_CONSTANT,
        borderValue=(0,),
    )
    if not fits.any():
        return None
    depth = cv2.distanceTransform(np.pad(region, 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    depth[fits == 0] = 0
    # In a corridor many places are as deep as the first: then the one in the middle of them.
    places = np.argwhere(depth > depth.max() - 1)
    off_middle = ((places - places.mean(axis=0)) ** 2).sum(axis=1)
    y, x = places[off_middle.argmin()].tolist()
    return y - 1 - middle[1], x - 1 - middle[0]


def _draw_outlined(canvas: _Image, coverage: _Image, top: int, left: int, outline: int) -> None:
    """Draws text into ``canvas``: white, within black."""
    around = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * outline + 1, 2 * outline + 1))
    black = cv2.dilate(coverage, around)[..., None] / np.float32(255)
    white = coverage[..., None] / np.float32(255)
    box = canvas[top : top + len(coverage), left : left + coverage.shape[1]]
    box[...] = np.rint(box * (1 - black) * (1 - white) + 255 * white)


def _require_same_size(picture: _Image, class_map: ClassMap) -> None:
    if picture.shape[:2] != class_map.shape:
        raise ValueError(f"the picture is {picture.shape[:2]}, its class map {class_map.shape}")
