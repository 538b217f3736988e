"""Values per class at full size, computed a few rows at a time and never held whole.

What a network says of an image comes in several ways: one grid of logits, windows that overlap, the
same image flipped or at another scale. Each is a field that gives any rows of its K planes; fields
are made of fields, and the class map is the argmax of one, strip by strip.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli.postprocess import argmax_class_map, linear_taps
from segcli.results import ClassMap

_Floats: TypeAlias = npt.NDArray[np.float32]

# Values of one strip: 2 MB of float32 stays in a core's cache.
_STRIP_VALUES = 1 << 19
# Less than any probability that matters, and its logarithm is finite.
_TINY = np.finfo(np.float32).tiny


class Field(Protocol):
    """K planes of values of one height and width."""

    @property
    def num_classes(self) -> int:
        """K."""

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width."""

    def rows(self, start: int, stop: int) -> _Floats:
        """Returns (K, stop - start, W) float32; asked for from top to bottom."""


class Upsampled:
    """Logits resized bilinearly, in float32 at the coordinates of ``torch.nn.functional``.

    Args:
        logits: (K, h, w) float32.
        size_hw: Height and width of the field.
        align_corners: Whether the outermost logits lie on the outermost pixels' centers.
    """

    def __init__(
        self, logits: _Floats, size_hw: tuple[int, int], *, align_corners: bool = False
    ) -> None:
        self.logits, self.size_hw, self.align_corners = logits, size_hw, align_corners
        self.num_classes = len(logits)

    def rows(self, start: int, stop: int) -> _Floats:
        """Returns (K, stop - start, W) float32."""
        return _resized(
            lambda low, high: self.logits[:, low:high],
            (self.logits.shape[1], self.logits.shape[2]),
            self.size_hw,
            slice(start, stop),
            align_corners=self.align_corners,
        )


class Resized:
    """A field resized bilinearly, as its logits would be.

    Args:
        field: Of any size.
        size_hw: Height and width of this one.
        align_corners: As for ``Upsampled``.
    """

    def __init__(
        self, field: Field, size_hw: tuple[int, int], *, align_corners: bool = False
    ) -> None:
        self.size_hw, self.num_classes = size_hw, field.num_classes
        self._field, self._align_corners = field, align_corners

    def rows(self, start: int, stop: int) -> _Floats:
        """Returns (K, stop - start, W) float32."""
        return _resized(
            self._field.rows,
            self._field.size_hw,
            self.size_hw,
            slice(start, stop),
            align_corners=self._align_corners,
        )


class Tiled:
    """The mean of windows that overlap: ``slide_inference`` of mmsegmentation.

    Windows begin at multiples of the stride; those that would reach over the edge are moved
    inward, and an image smaller than a window is one window, not padded. A row of windows is run
    when its first pixels are asked for, and forgotten below its last.

    Args:
        size_hw: Height and width of the field.
        tile: Height and width of a window.
        overlap: Pixels that neighbors share.
        look: Given the rows and columns of a window, returns its logits, (K, h, w) float32.
        num_classes: K.
        align_corners: Of the resize from a window's logits to its pixels.
    """

    def __init__(
        self,
        size_hw: tuple[int, int],
        tile: int,
        overlap: int,
        look: Callable[[slice, slice], _Floats],
        num_classes: int,
        *,
        align_corners: bool = False,
    ) -> None:
        self.size_hw, self.num_classes = size_hw, num_classes
        self._look, self._align_corners = look, align_corners
        self._bands, self._columns = (tuple(windows(n, tile, tile - overlap)) for n in size_hw)
        self._kept: dict[int, list[Upsampled]] = {}

    def rows(self, start: int, stop: int) -> _Floats:
        """Returns (K, stop - start, W) float32."""
        total = np.zeros((self.num_classes, stop - start, self.size_hw[1]), np.float32)
        for index, band in enumerate(self._bands):
            if band.stop <= start:
                self._kept.pop(index, None)
            elif band.start < stop:
                first, last = max(start, band.start), min(stop, band.stop)
                for column, window in zip(self._columns, self._windows(index), strict=True):
                    values = window.rows(first - band.start, last - band.start)
                    total[:, first - start : last - start, column] += values
        return total / self._counts(start, stop)

    def _windows(self, index: int) -> list[Upsampled]:
        if index not in self._kept:
            band = self._bands[index]
            height = band.stop - band.start
            self._kept[index] = [
                Upsampled(
                    self._look(band, column),
                    (height, column.stop - column.start),
                    align_corners=self._align_corners,
                )
                for column in self._columns
            ]
        return self._kept[index]

    def _counts(self, start: int, stop: int) -> _Floats:
        """Returns how many windows cover each pixel, (rows, W) float32."""
        down, across = (np.zeros(n, np.float32) for n in self.size_hw)
        for counts, parts in ((down, self._bands), (across, self._columns)):
            for part in parts:
                counts[part] += 1
        return down[start:stop, None] * across


class Flipped:
    """A field mirrored from left to right."""

    def __init__(self, field: Field) -> None:
        self._field, self.size_hw, self.num_classes = field, field.size_hw, field.num_classes

    def rows(self, start: int, stop: int) -> _Floats:
        """Returns (K, stop - start, W) float32."""
        return self._field.rows(start, stop)[:, :, ::-1]


class MeanProbability:
    """The mean of the softmax of several fields of one size: mmsegmentation's ``aug_test``.

    Given as its logarithm, so that it is logits again: their softmax is the mean.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self._fields = fields
        self.size_hw, self.num_classes = fields[0].size_hw, fields[0].num_classes

    def rows(self, start: int, stop: int) -> _Floats:
        """Returns (K, stop - start, W) float32, at most 0."""
        total = softmax(self._fields[0].rows(start, stop))
        for field in self._fields[1:]:
            total += softmax(field.rows(start, stop))
        total /= np.float32(len(self._fields))
        return np.log(np.maximum(total, _TINY), out=total)


def softmax(logits: _Floats) -> _Floats:
    """Returns the softmax over the first axis."""
    values: _Floats = logits - logits.max(axis=0)
    np.exp(values, out=values)
    values /= values.sum(axis=0)
    return values


def strips(field: Field) -> Iterator[tuple[slice, _Floats]]:
    """Yields the rows and the values, (K, n, W) float32, of strips from top to bottom."""
    height, width = field.size_hw
    step = max(1, _STRIP_VALUES // (field.num_classes * width))
    for start in range(0, height, step):
        stop = min(start + step, height)
        yield slice(start, stop), field.rows(start, stop)


def class_map(field: Field) -> ClassMap:
    """Returns the class of largest value at each pixel, the lowest id on ties.

    Returns:
        (H, W) uint8, uint16 above 256 classes.
    """
    if isinstance(field, Upsampled):
        return argmax_class_map(field.logits, field.size_hw, align_corners=field.align_corners)
    found = empty_class_map(field)
    for rows, values in strips(field):
        found[rows] = values.argmax(axis=0)
    return found


def empty_class_map(field: Field) -> ClassMap:
    """Returns (H, W) uint8, uint16 above 256 classes, to be filled."""
    if field.num_classes <= 256:
        return np.empty(field.size_hw, np.uint8)
    return np.empty(field.size_hw, np.uint16)


def windows(length: int, tile: int, stride: int) -> Iterator[slice]:
    """Yields where the windows of one axis lie, the last one moved inward to end with it."""
    for start in range(0, max(length - tile, 0) + stride, stride):
        first = max(min(start, length - tile), 0)
        yield slice(first, min(first + tile, length))
        if first + tile >= length:
            return


def _resized(
    take: Callable[[int, int], _Floats],
    in_hw: tuple[int, int],
    out_hw: tuple[int, int],
    rows: slice,
    *,
    align_corners: bool,
) -> _Floats:
    """Returns some rows of planes that are resized from those that ``take`` gives."""
    if in_hw == out_hw:
        return take(rows.start, rows.stop)
    taps = linear_taps(in_hw[0], out_hw[0], align_corners=align_corners)
    low, high, weight = taps[0][rows], taps[1][rows], taps[2][rows]
    first = int(low[0])
    planes = take(first, int(high[-1]) + 1)
    if in_hw[1] != out_hw[1]:
        left, right, share = linear_taps(in_hw[1], out_hw[1], align_corners=align_corners)
        # As argmax_class_map does it: across first, in float32.
        planes = (np.float32(1) - share) * planes[..., left] + share * planes[..., right]
    weight = weight[:, None]
    return (np.float32(1) - weight) * planes[:, low - first] + weight * planes[:, high - first]
