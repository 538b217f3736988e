"""The loss of one image: cross-entropy of upsampled logits, never K x H x W of them at once.

The logits are interpolated as those whose argmax is the class map, at the same float32 coordinates,
a strip of rows at a time.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from segcli.errors import InferenceError
from segcli.evaluate import require_class_ids
from segcli.postprocess import linear_taps

# Values per array of one strip: 4 MB of float64.
_STRIP_VALUES = 1 << 19


def cross_entropy_sum(
    logits: npt.NDArray[np.float32],
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
    low, high, weights = linear_taps(height, truth.shape[0], align_corners=align_corners)
    left, right, across = linear_taps(width, truth.shape[1], align_corners=align_corners)
    step = max(1, _STRIP_VALUES // (num_classes * truth.shape[1]))
    total = 0.0
    for top in range(0, len(truth), step):
        rows = slice(top, top + step)
        if not counted[rows].any():
            continue
        weight = weights[rows, None]
        strip = (1 - weight) * _widened(logits[:, low[rows]], left, right, across)
        strip += weight * _widened(logits[:, high[rows]], left, right, across)
        total += _loss_sum(strip[:, counted[rows]], truth[rows][counted[rows]])
    return total


def _widened(
    rows: npt.NDArray[np.float32],
    left: npt.NDArray[np.intp],
    right: npt.NDArray[np.intp],
    across: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Returns rows of logits, (K, r, w), interpolated along their columns."""
    wide: npt.NDArray[np.float32] = (1 - across) * rows[:, :, left]
    wide += across * rows[:, :, right]
    return wide


def _loss_sum(logits: npt.NDArray[np.float32], truth: npt.NDArray[Any]) -> float:
    """Returns the loss of pixels, (K, n) logits and (n,) ids."""
    # float64 from here: 1 plus the small terms of a sure pixel is 1 in float32.
    values = logits - logits.max(axis=0).astype(np.float64)
    true = values[truth.astype(np.intp), np.arange(values.shape[1])]
    return float((np.log(np.exp(values, out=values).sum(axis=0)) - true).sum())
