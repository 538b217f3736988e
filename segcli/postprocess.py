"""From logits to answers: a class per pixel at full size, or scores and the best k labels.

Resizing K planes of logits to the image's size and taking the argmax can cost more than
the network did, and holds K x H x W floats. This room gives the same map without either:
between neighboring logits most classes cannot win, and only the others are interpolated.
"""

from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from segcli.artifact import Activation
from segcli.errors import InferenceError
from segcli.results import ClassMap

_Floats: TypeAlias = npt.NDArray[np.float32]
_Ints: TypeAlias = npt.NDArray[np.intp]

# A float32 interpolation of four values is off by less than 2**-21 of the largest, so a
# class that trails by this share at all four corners cannot even tie after rounding.
_SLACK = np.float32(2**-20)
_TINY = np.finfo(np.float32).tiny
# Values per array of one strip: 2 MB of float32 stays in a core's cache.
_STRIP_VALUES = 1 << 19
_LONGEST_SPAN = 32
_COUNTED_AT_ONCE = 1 << 20


def argmax_class_map(
    logits: _Floats, size_hw: tuple[int, int], *, align_corners: bool = False
) -> ClassMap:
    """Returns the argmax of bilinearly resized logits, without resizing them.

    The result is exactly that of ``h0*(w0*a + w1*b) + h1*(w0*c + w1*d)`` in float32 for each
    class and pixel, at the coordinates of ``torch.nn.functional.interpolate``, the lowest id
    on ties. Every operation in it is monotone even after rounding, so a class that trails
    another one at all four corners of a cell trails it everywhere inside. Such a class is
    dropped, and a cell with one class left needs no arithmetic.

    Args:
        logits: (K, h, w) float32.
        size_hw: Height and width of the result, larger or smaller than the logits.
        align_corners: Whether the outermost logits lie on the outermost pixels' centers.

    Returns:
        (H, W) uint8, uint16 above 256 classes.

    Raises:
        InferenceError: The logits hold NaN or infinity.
    """
    logits = np.asarray(logits, np.float32)
    require_finite(logits)
    num_classes, height, width = logits.shape
    class_map = np.empty(size_hw, np.uint8 if num_classes <= 256 else np.uint16)
    rows = _Axis(height, size_hw[0], align_corners)
    cols = _Axis(width, size_hw[1], align_corners)
    per_row = max(num_classes * max(width, cols.count), rows.longest * size_hw[1])
    step = max(1, _STRIP_VALUES // per_row)
    for start in range(0, rows.count, step):
        _fill_strip(class_map, logits, rows, cols, slice(start, start + step))
    return class_map


def against_nothing(logits: _Floats, activation: Activation) -> _Floats:
    """Returns the logits with a plane of zeros before them where one stands against nothing.

    With a sigmoid a logit above zero means p > 1/2, which the argmax of both planes then says.

    Args:
        logits: (K, h, w) float32.
        activation: What the model's own card names.
    """
    if activation == "sigmoid" and len(logits) == 1:
        return np.concatenate([np.zeros_like(logits), logits])
    return logits


def linear_taps(
    in_size: int, out_size: int, *, align_corners: bool
) -> tuple[_Ints, _Ints, _Floats]:
    """Returns which two logits each pixel of one axis lies between, and the second one's weight.

    Args:
        in_size: Number of logits.
        out_size: Number of pixels.
        align_corners: As for ``argmax_class_map``.

    Returns:
        Index before and index after, (out_size,) each, and (out_size,) float32 in [0, 1].
    """
    # float32 throughout, as ATen/native/UpSample.h computes it.
    position = np.arange(out_size, dtype=np.float32)
    if align_corners:
        position *= np.float32(in_size - 1) / np.float32(max(out_size - 1, 1))
    else:
        position += np.float32(0.5)
        position *= np.float32(in_size) / np.float32(out_size)
        position = np.maximum(position - np.float32(0.5), np.float32(0))
    low = np.minimum(position.astype(np.intp), in_size - 1)
    weight = np.clip(position - low.astype(np.float32), 0, 1)
    return low, np.minimum(low + 1, in_size - 1), weight


def count_classes(class_map: ClassMap, num_classes: int) -> npt.NDArray[np.int64]:
    """Returns how many pixels each class has, (num_classes,).

    Args:
        class_map: (H, W) uint8 or uint16, ids below ``num_classes``.
        num_classes: Length of the result.
    """
    counts = np.zeros(num_classes, np.int64)
    # OpenCV counts in float32, which is exact up to 2**24; NumPy by way of int64, eight times the
    # map's memory. Neither sees more than one strip.
    step = max(1, _COUNTED_AT_ONCE // class_map.shape[1])
    for top in range(0, class_map.shape[0], step):
        strip = class_map[top : top + step]
        if strip.dtype == np.uint8:
            histogram = cv2.calcHist([strip], [0], None, [num_classes], [0, num_classes])
            counts += histogram.ravel().astype(np.int64)
        else:
            counts += np.bincount(strip.ravel(), minlength=num_classes)
    return counts


class _Axis:
    """Where the pixels of one axis lie among the logits, cut into spans.

    A span is a run of pixels between the same two logits; row and column spans cross in
    cells. Runs longer than most are cut in equal parts, so that padding wastes little.

    Attributes:
        first, lengths: (count,) first pixel and number of pixels of each span.
        low, high: (count,) index of the logit before and after each span.
        pixels: (longest, count) the span's pixels, the last one repeated as padding.
        weights: Of ``low`` and of ``high`` at these pixels, (longest, count) float32 each.
    """

    def __init__(self, in_size: int, out_size: int, align_corners: bool) -> None:
        low, high, weight = linear_taps(in_size, out_size, align_corners=align_corners)
        runs = np.flatnonzero(np.diff(low, prepend=-1))
        lengths = np.diff(runs, append=out_size)
        limit = min(-(-out_size // in_size), _LONGEST_SPAN)
        parts = -(-lengths // limit)
        part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        runs, lengths, parts = (np.repeat(a, parts) for a in (runs, lengths, parts))
        self.first: _Ints = runs + lengths * part // parts
        self.lengths: _Ints = np.diff(self.first, append=out_size)
        self.count = len(self.first)
        self.longest = int(self.lengths.max())
        self.low: _Ints = low[self.first]
        self.high: _Ints = high[self.first]
        offset = np.arange(self.longest)[:, None]
        self.pixels: _Ints = self.first + np.minimum(offset, self.lengths - 1)
        high_weight: _Floats = weight[self.pixels]
        self.weights = (np.float32(1) - high_weight, high_weight)


def _fill_strip(
    class_map: ClassMap, logits: _Floats, rows: _Axis, cols: _Axis, spans: slice
) -> None:
    """Writes the pixels of some row spans into ``class_map``."""
    corners = _corners(logits, rows.low[spans], rows.high[spans], cols)
    leader, alive = _contenders(corners)
    grid = leader.astype(class_map.dtype).reshape(-1, cols.count)
    filled = grid.repeat(cols.lengths, axis=1).repeat(rows.lengths[spans], axis=0)
    top = rows.first[spans.start]
    class_map[top : top + len(filled)] = filled

    # Cells with equally many contenders go together, cells along the last, long axis.
    cell_of, class_of = np.divmod(np.flatnonzero(alive), len(logits))
    counts = np.bincount(cell_of)
    begins = np.cumsum(counts) - counts
    for count in np.unique(counts[counts > 1]):
        cells = np.flatnonzero(counts == count)
        classes = class_of[begins[cells] + np.arange(count)[:, None]]  # (count, cells)
        values = [corner[cells, classes] for corner in corners]
        row, col = np.divmod(cells, cols.count)
        row += spans.start
        above, below = (weights[:, None, row] for weights in rows.weights)
        left, right = (weights[:, col] for weights in cols.weights)
        shape = (rows.longest, cols.longest, len(cells))
        best = np.full(shape, -np.inf, np.float32)
        ids = np.zeros(shape, class_map.dtype)
        for class_id, a, b, c, d in zip(classes, *values, strict=True):
            value = above * (left * a + right * b)
            value += below * (left * c + right * d)
            np.copyto(ids, class_id, where=value > best, casting="unsafe")
            np.maximum(value, best, out=best)
        class_map[rows.pixels[:, None, row], cols.pixels[None, :, col]] = ids


def _corners(logits: _Floats, low: _Ints, high: _Ints, cols: _Axis) -> list[_Floats]:
    """Returns the logits at each cell's corners, four times (cells, K), row by row."""
    num_classes, _, width = logits.shape
    needed, place = np.unique(np.concatenate([low, high]), return_inverse=True)
    planes = logits[:, needed].reshape(num_classes, -1)
    # cv2's blocked transpose takes a third of the time of a NumPy copy.
    source: _Floats = np.asarray(cv2.transpose(planes), np.float32)
    source = source.reshape(-1, width, num_classes)
    return [
        source[place_of_row].take(col, axis=1).reshape(-1, num_classes)
        for place_of_row in np.split(place, 2)
        for col in (cols.low, cols.high)
    ]


def _contenders(corners: list[_Floats]) -> tuple[_Ints, npt.NDArray[np.bool_]]:
    """Returns a leading class per cell, (cells,), and all that may win, (cells, K) bool.

    The leader is the class whose smallest corner is largest. A class stays that reaches the
    leader at some corner: fewer than those whose largest corner reaches that value.
    """
    floor = np.minimum(corners[0], corners[1])
    for corner in corners[2:]:
        np.minimum(floor, corner, out=floor)
    leader = floor.argmax(axis=1)
    every = np.arange(len(leader))
    marks = np.stack([corner[every, leader] for corner in corners])
    marks -= np.abs(marks).max(axis=0) * _SLACK + _TINY
    alive = corners[0] > marks[0, :, None]
    for corner, mark in zip(corners[1:], marks[1:], strict=True):
        alive |= corner > mark[:, None]
    return leader, alive


def scores(logits: npt.NDArray[np.floating], activation: Activation) -> npt.NDArray[np.float64]:
    """Returns one image's logits as scores.

    Args:
        logits: (K,) floating.
        activation: What the model's own card names.

    Returns:
        (K,) float64; in [0, 1] unless the activation is ``identity``.

    Raises:
        InferenceError: The logits hold NaN or infinity.
    """
    values = np.array(logits, np.float64)
    require_finite(values)
    if activation == "softmax":
        values = np.exp(values - values.max())
        values /= values.sum()
    elif activation == "sigmoid":
        values = np.exp(-np.logaddexp(0.0, -values))
    return values


def top_k(scores: npt.NDArray[np.floating], k: int) -> list[tuple[int, float]]:
    """Returns the ``k`` best (id, score) pairs, best first, ties by id; all where K < k."""
    order = np.argsort(-scores, kind="stable")[:k]
    return [(int(i), float(scores[i])) for i in order]


def require_finite(logits: npt.NDArray[np.floating]) -> None:
    """Raises InferenceError where a logit is infinite or not a number."""
    # Two passes without a temporary: minimum and maximum hand NaN on.
    lowest, highest = float(logits.min()), float(logits.max())
    if not np.isfinite([lowest, highest]).all():
        found = "NaN" if np.isnan(lowest) else "infinite"
        raise InferenceError(f"the model produced {found} logits")
