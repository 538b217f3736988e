"""The numbers behind a report's charts: plain lists, ready to be drawn. Nothing is drawn here."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_MOST_BARS = 120


class TimeBar(NamedTuple):
    """Some consecutive images of a run, counted from 1, and how long they took."""

    first: int
    last: int
    mean_ms: float
    largest_ms: float


class Timings(NamedTuple):
    """How long the images of a run took."""

    median_ms: float
    p95_ms: float
    largest_ms: float
    bars: list[TimeBar]


class Mistake(NamedTuple):
    """Pixels of one class taken for another; ``share`` of the true class, in [0, 1]."""

    truth: int
    prediction: int
    pixels: int
    share: float


def timings(elapsed_ms: Sequence[float]) -> Timings | None:
    """Returns what there is to draw of times in the order of the run, None where there is none."""
    if not len(elapsed_ms):
        return None
    values = np.asarray(elapsed_ms, np.float64)
    edges = np.linspace(0, len(values), min(len(values), _MOST_BARS) + 1).astype(int).tolist()
    bars = [
        TimeBar(start + 1, end, float(part.mean()), float(part.max()))
        for start, end in pairwise(edges)
        for part in (values[start:end],)
    ]
    median, p95 = np.percentile(values, [50, 95]).tolist()
    return Timings(median, p95, float(values.max()), bars)


def row_shares(confusion: npt.NDArray[np.int64]) -> list[list[float] | None]:
    """Returns each true class's shares among the predicted; None for a class that has no pixel.

    Args:
        confusion: (K, K), rows truth, columns prediction.
    """
    totals = confusion.sum(axis=1)
    return [
        (row / total).tolist() if total else None
        for row, total in zip(confusion, totals, strict=True)
    ]


def worst_mistakes(confusion: npt.NDArray[np.int64], most: int = 10) -> list[Mistake]:
    """Returns what costs the most pixels, largest first, ties by ids.

    Args:
        confusion: (K, K), rows truth, columns prediction.
        most: How many at most.
    """
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    totals = confusion.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    places = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [
        Mistake(int(i), int(j), int(wrong[i, j]), float(wrong[i, j] / totals[i]))
        for i, j in places
        if wrong[i, j]
    ]
