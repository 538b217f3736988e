"""Class maps in COCO's two forms: run-length strings and polygons, every class in one pass.

The strings are those of ``pycocotools``, which is not needed to write them. The polygons run along
the edges of pixels, so that filling them gives the mask again and no pixel is lost or won.
"""

from collections.abc import Collection

import cv2
import numpy as np
import numpy.typing as npt

from segcli.results import ClassMap

_Ints = npt.NDArray[np.int64]

# Where a corner's class has these of the pixels around it: NW = 1, NE = 2, SW = 4, SE = 8.
_DIAGONALS = (1 | 8, 2 | 4)
_TURNS = np.array([bin(i).count("1") in (1, 3) or i in _DIAGONALS for i in range(16)])


def encode_rle(class_map: ClassMap, class_ids: Collection[int] | None = None) -> dict[int, str]:
    """Returns the mask of each class as COCO's compressed ``counts``, by class id.

    Runs go down the columns and begin with one of zeros, which may be empty. From the fourth on,
    each is written as its difference from the last but one, in digits of five bits, lowest first,
    as ``rleToString`` of pycocotools' maskApi.c does.

    Args:
        class_map: (H, W) class ids, H and W at least 1.
        class_ids: The classes to encode; None for those that occur.
    """
    # cv2's blocked transpose takes a third of the time of a NumPy copy.
    pixels = cv2.transpose(class_map).ravel()
    starts = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts = np.concatenate([[0], starts])
    ids = pixels[starts]
    bounds = np.stack([starts, np.append(starts[1:], pixels.size)], axis=1)
    order = np.argsort(ids, kind="stable")
    ids, bounds = ids[order], bounds[order]
    wanted = np.unique(ids).tolist() if class_ids is None else sorted(set(class_ids))
    result = {}
    for class_id in wanted:
        first, last = (int(np.searchsorted(ids, class_id, side)) for side in ("left", "right"))
        ends = bounds[first:last].ravel()
        if not ends.size or ends[-1] != pixels.size:
            ends = np.append(ends, pixels.size)
        result[class_id] = _compress(np.diff(ends, prepend=0))
    return result


def _compress(counts: _Ints) -> str:
    values = counts.copy()
    values[3:] -= counts[1:-2]
    # A digit is the last one when what is left is its own sign: -16..15.
    num_digits = np.ones(len(values), np.intp)
    rest = values.copy()
    while (long := (rest < -16) | (rest > 15)).any():
        num_digits += long
        rest >>= 5
    offsets = np.cumsum(num_digits) - num_digits
    text = np.empty(int(num_digits.sum()), np.uint8)
    for place in range(int(num_digits.max())):
        (here,) = np.nonzero(num_digits > place)
        digits = values[here] >> 5 * place & 31
        digits += 32 * (num_digits[here] > place + 1) + 48
        text[offsets[here] + place] = digits
    return text.tobytes().decode("ascii")


def trace_polygons(
    class_map: ClassMap, class_ids: Collection[int] | None = None
) -> dict[int, list[npt.NDArray[np.int64]]]:
    """Returns the outlines of each class along the edges of its pixels, by class id.

    Pixel (row y, column x) is the square from (x, y) to (x + 1, y + 1). Every region and every
    hole in one is a ring of its own, and an even-odd or nonzero fill of all rings is the mask.
    Pixels that touch at a corner alone are in different rings. Seen on the screen, outlines of
    regions run clockwise and those of holes the other way; each ring starts at its leftmost corner
    of the topmost, is not closed by repeating it, and names only corners where it turns. Rings are
    in the order of their first corners, by y and then x.

    Args:
        class_map: (H, W) class ids, H and W at least 1.
        class_ids: The classes to trace; None for those that occur.

    Returns:
        (N, 2) corners as x, y for each ring.
    """
    corners = _corners(class_map, class_ids)
    ids = corners[:, 0]
    wanted = np.unique(ids).tolist() if class_ids is None else sorted(set(class_ids))
    result: dict[int, list[npt.NDArray[np.int64]]] = {class_id: [] for class_id in wanted}
    points = corners[:, [2, 1]]
    for ring in _rings(corners):
        result[int(ids[ring[0]])].append(points[ring])
    return result


def _corners(class_map: ClassMap, class_ids: Collection[int] | None) -> _Ints:
    """Returns a row (class, y, x, pattern) for every corner of every class's outline.

    Sorted; a point where two pixels of a class touch diagonally is there twice.
    """
    # Ids go up by one, for 0 is what lies around the picture.
    height, width = class_map.shape
    padded = np.zeros((height + 2, width + 2), np.int32)
    padded[1:-1, 1:-1] = class_map
    padded[1:-1, 1:-1] += 1
    around = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    is_straight = (around[0] == around[1]) & (around[2] == around[3])
    is_straight |= (around[0] == around[2]) & (around[1] == around[3])
    y, x = np.nonzero(~is_straight)
    pixels = np.stack([plane[y, x] for plane in around])
    found = []
    for i, ids in enumerate(pixels):
        pattern = (pixels == ids).astype(np.uint8).T @ np.array([1, 2, 4, 8], np.uint8)
        keep = _TURNS[pattern] & (ids > 0)
        for earlier in pixels[:i]:
            keep &= ids != earlier
        found.append(np.stack([ids - 1, y, x, pattern], axis=1)[keep])
    corners = np.concatenate(found).astype(np.int64)
    if class_ids is not None:
        corners = corners[np.isin(corners[:, 0], list(class_ids))]
    corners = np.repeat(corners, 1 + np.isin(corners[:, 3], _DIAGONALS), axis=0)
    return corners[np.lexsort((corners[:, 2], corners[:, 1], corners[:, 0]))]


def _rings(corners: _Ints) -> list[list[int]]:
    """Returns the indices of each ring's corners, in the order that ``trace_polygons`` says."""
    ids, y, x, pattern = corners.T
    every = np.arange(len(corners))
    # Along a row, and down a column, outlines run from the first to the second corner, from the
    # third to the fourth, and so on.
    beside = (every ^ 1).tolist()
    by_column = np.lexsort((y, x, ids))
    # Of two corners at one point the first goes left. With pixels NW and SE it must go up,
    # and there the first is that already; with NE and SW, down: these two change places.
    swapped = by_column.copy()
    anti = np.flatnonzero(pattern[by_column] == _DIAGONALS[1])
    swapped[anti] = by_column[anti.reshape(-1, 2)[:, ::-1].ravel()]
    above = np.empty_like(every)
    above[swapped] = swapped[every ^ 1]
    below = above.tolist()

    is_hole = (pattern & 8 == 0).tolist()
    seen = bytearray(len(corners))
    rings = []
    for first in every.tolist():
        if seen[first]:
            continue
        one, two = (below, beside) if is_hole[first] else (beside, below)
        ring: list[int] = []
        corner = first
        while not seen[corner]:
            turn = one[corner]
            seen[corner] = seen[turn] = 1
            ring += (corner, turn)
            corner = two[turn]
        rings.append(ring)
    return rings
