"""How well class maps match the truth: one confusion matrix, and what is read off it.

The formulas are those of mmsegmentation's ``IoUMetric``: intersections and unions are summed
over all images before any division, and a class that occurs neither in the truth nor in
the predictions counts for nothing.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli.errors import UsageError

Confusion: TypeAlias = npt.NDArray[np.int64]
_Scores: TypeAlias = npt.NDArray[np.float64]


def confusion_matrix(
    truth: npt.NDArray[Any],
    prediction: npt.NDArray[Any],
    num_classes: int,
    ignore_index: int | None = 255,
) -> Confusion:
    """Returns how many pixels of each true class got each predicted class.

    Matrices of several images add up.

    Args:
        truth: Integer class ids, any shape.
        prediction: Integer class ids below ``num_classes``, the same shape.
        num_classes: K.
        ignore_index: True value of pixels that do not count; None where all do.

    Returns:
        (K, K) int64, rows truth, columns prediction.

    Raises:
        UsageError: The shapes differ, or a value that counts is no class id.
    """
    if truth.shape != prediction.shape:
        raise UsageError(f"the truth has shape {truth.shape}, the prediction {prediction.shape}")
    if ignore_index is not None:
        counted = truth != ignore_index
        truth, prediction = truth[counted], prediction[counted]
    _require_ids(truth, num_classes, "truth")
    _require_ids(prediction, num_classes, "prediction")
    pairs = truth.ravel().astype(np.int64)
    pairs *= num_classes
    pairs += prediction.ravel().astype(np.int64)
    counts = np.bincount(pairs, minlength=num_classes * num_classes)
    return counts.astype(np.int64).reshape(num_classes, num_classes)


def iou_per_class(confusion: Confusion) -> _Scores:
    """Returns (K,) intersection over union, NaN for classes that occur nowhere."""
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal()
    return _ratio(confusion.diagonal(), union)


def accuracy_per_class(confusion: Confusion) -> _Scores:
    """Returns (K,) share of each class's true pixels found, NaN where it has none."""
    return _ratio(confusion.diagonal(), confusion.sum(axis=1))


def mean_iou(confusion: Confusion) -> float:
    """Returns the mean of ``iou_per_class`` over the classes that occur; NaN for none."""
    return _mean(iou_per_class(confusion))


def mean_accuracy(confusion: Confusion) -> float:
    """Returns the mean of ``accuracy_per_class`` over the true classes; NaN for none."""
    return _mean(accuracy_per_class(confusion))


def pixel_accuracy(confusion: Confusion) -> float:
    """Returns the share of counted pixels with the true class; NaN for no pixel."""
    return float(_ratio(np.trace(confusion), confusion.sum()))


def _ratio(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> _Scores:
    ratio = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _mean(values: _Scores) -> float:
    occurring = values[~np.isnan(values)]
    return float(occurring.mean()) if occurring.size else float("nan")


def _require_ids(ids: npt.NDArray[Any], num_classes: int, what: str) -> None:
    if not ids.size:
        return
    for value in (int(ids.min()), int(ids.max())):
        if not 0 <= value < num_classes:
            raise UsageError(
                f"the {what} holds the value {value}, expected class ids 0..{num_classes - 1}"
            )
