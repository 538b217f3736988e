"""The loss of one image: cross-entropy of upsampled logits, never K x H x W of them at once.

The logits are interpolated as those whose argmax is the class map, at the same float32 coordinates,
a row of pixels at a time.
"""

from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli.errors import InferenceError
from segcli.evaluate import require_class_ids
from segcli.postprocess import linear_taps

_Floats: TypeAlias = npt.NDArray[np.float32]


def cross_entropy_sum(
    logits: _Floats,
    truth: npt.NDArray[Any],
    *,
    ignore_index: int | None = 255,
    align_corners: bool = False,
) -> float:
    """Returns the sum over pixels of -log softmax of the true class, in nats.

    Over the number of pixels that count it is ``torch.nn.functional.cross_entropy`` of
    ``interpolate(mode="bilinear")``. A foreground alone, a sigmoid's single logit x, is the two
    logits (0, x).

    Args:
        logits: (K, h, w) float32.
        truth: (H, W) class ids; the logits are resized to its size.
        ignore_index: True value of pixels that do not count; None where all do.
        align_corners: As for ``argmax_class_map``.

    Raises:
        InferenceError: The logits hold NaN or infinity.
        TruthError: A value that counts is no class id.
    """
    num_classes, height, width = logits.shape
    if not np.isfinite(logits).all():
        raise InferenceError("the model produced logits that are not finite")
    counted = np.ones(truth.shape, np.bool_) if ignore_index is None else truth != ignore_index
    require_class_ids(truth[counted], num_classes)
    low, high, down = linear_taps(height, truth.shape[0], align_corners=align_corners)
    left, right, across = linear_taps(width, truth.shape[1], align_corners=align_corners)

    @lru_cache(maxsize=2)
    def widened(row: int) -> _Floats:
        plane = logits[:, row]
        wide: _Floats = (1 - across) * plane[:, left]
        wide += across * plane[:, right]
        return wide

    total = 0.0
    for y in np.flatnonzero(counted.any(axis=1)):
        row = (1 - down[y]) * widened(int(low[y])) + down[y] * widened(int(high[y]))
        here = counted[y]
        total += _loss_sum(row if here.all() else row[:, here], truth[y, here])
    return total


def _loss_sum(logits: _Floats, truth: npt.NDArray[Any]) -> float:
    """Returns the loss of pixels, (K, n) logits and (n,) ids."""
    every = np.arange(logits.shape[1])
    best = logits.argmax(axis=0)
    values = logits - logits[best, every]
    behind = -values[truth.astype(np.intp), every].astype(np.float64)
    # The best one's own term is left to log1p: beside 1, small ones vanish in float32.
    np.exp(values, out=values)
    values[best, every] = 0
    return float((np.log1p(values.sum(axis=0, dtype=np.float64)) + behind).sum())
