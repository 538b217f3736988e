"""How well answers match the truth: one confusion matrix and what is read off it; ranks of labels.

The formulas are those of mmsegmentation's ``IoUMetric``: intersections and unions are summed
over all images before any division, and a class that occurs neither in the truth nor in
the predictions counts for nothing.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli.errors import TruthError, UsageError

VOID = 255
TOP = 5

Confusion: TypeAlias = npt.NDArray[np.int64]
_Scores: TypeAlias = npt.NDArray[np.float64]


def confusion_matrix(
    truth: npt.NDArray[Any],
    prediction: npt.NDArray[Any],
    num_classes: int,
    ignore_index: int | None = VOID,
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
        TruthError: The shapes differ, or a true value that counts is no class id.
        UsageError: A predicted value that counts is no class id.
    """
    if truth.shape != prediction.shape:
        raise TruthError(f"the truth has shape {truth.shape}, the prediction {prediction.shape}")
    if ignore_index is not None:
        counted = truth != ignore_index
        truth, prediction = truth[counted], prediction[counted]
    require_class_ids(truth, num_classes)
    if (wrong := _no_class_id(prediction, num_classes)) is not None:
        raise UsageError(
            f"the prediction holds the value {wrong}, expected class ids 0..{num_classes - 1}"
        )
    pairs = truth.ravel().astype(np.int64)
    pairs *= num_classes
    pairs += prediction.ravel().astype(np.int64)
    counts = np.bincount(pairs, minlength=num_classes * num_classes)
    return counts.astype(np.int64).reshape(num_classes, num_classes)


def require_class_ids(truth: npt.NDArray[Any], num_classes: int) -> None:
    """Raises TruthError where a true value is none of ``num_classes`` ids."""
    if (wrong := _no_class_id(truth, num_classes)) is not None:
        raise TruthError(
            f"the truth holds the value {wrong}, expected class ids 0..{num_classes - 1}",
            hint="is the truth of the model's classes, counted from 0, with void ignored?",
        )


def reduce_labels(truth: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns labels that count classes from 1 as ids from 0: 0 and 255 become 255, void.

    What ADE20K's own files need; ``reduce_zero_label`` of mmsegmentation, ``do_reduce_labels`` of
    transformers.

    Args:
        truth: (H, W) unsigned, no value above 255.

    Raises:
        TruthError: A value is above 255.
    """
    if truth.size and truth.max() > VOID:
        raise TruthError(
            f"the truth holds the value {truth.max()}, expected at most {VOID} where labels are "
            "reduced by one"
        )
    # Unsigned, 0 wraps around to the void of uint8.
    reduced = truth.astype(np.uint8) - np.uint8(1)
    reduced[truth == VOID] = VOID
    return reduced


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


def figures(confusion: Confusion, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns what a report says of a matrix, for JSON: shares in [0, 1], None where there is none.

    Args:
        confusion: (K, K), of all images.
        class_names: K names.

    Returns:
        ``miou``, ``mean_accuracy``, ``pixel_accuracy``, ``pixels`` that counted, and ``classes``
        in id order with ``class_id``, ``name``, ``iou``, ``accuracy``, and the ``pixels`` of the
        truth.
    """
    rows = zip(
        class_names,
        iou_per_class(confusion).tolist(),
        accuracy_per_class(confusion).tolist(),
        confusion.sum(axis=1).tolist(),
        strict=True,
    )
    return {
        "miou": json_number(mean_iou(confusion)),
        "mean_accuracy": json_number(mean_accuracy(confusion)),
        "pixel_accuracy": json_number(pixel_accuracy(confusion)),
        "pixels": int(confusion.sum()),
        "classes": [
            {
                "class_id": class_id,
                "name": name,
                "iou": json_number(iou),
                "accuracy": json_number(accuracy),
                "pixels": pixels,
            }
            for class_id, (name, iou, accuracy, pixels) in enumerate(rows)
        ],
    }


def json_number(value: float) -> float | None:
    """Returns the number, None for NaN, which JSON does not have."""
    return None if math.isnan(value) else float(value)


class Hits(NamedTuple):
    """How many images have their true class first, or among the first five; these add up."""

    images: int = 0
    top1: int = 0
    top5: int = 0

    def plus(self, rank: int) -> "Hits":
        """Returns the counts with one image more, whose true class has this rank, 0 the best."""
        return Hits(self.images + 1, self.top1 + (rank == 0), self.top5 + (rank < TOP))

    def figures(self) -> dict[str, Any]:
        """Returns ``top1`` and ``top5`` as shares of ``images``, None of none, for JSON."""
        shares = [n / self.images if self.images else None for n in (self.top1, self.top5)]
        return {"top1": shares[0], "top5": shares[1], "images": self.images}


def has_background(class_names: Sequence[str], num_true: int) -> bool:
    """Tells whether class 0 of a classifier is a background that the truth does not have.

    The 1001 classes of TensorFlow-slim's ImageNet weights against ImageNet's own 1000: there logit
    0 is dropped before ranking, and class i of the truth is the model's i + 1.

    Args:
        class_names: Of the model.
        num_true: Number of classes of the truth.
    """
    return len(class_names) == num_true + 1 and class_names[0].strip().casefold() == "background"


def true_rank(logits: npt.NDArray[np.floating], class_id: int) -> int:
    """Returns the place of a class among logits or scores, 0 the best; ties by id.

    Args:
        logits: (K,), less a background that the truth does not have.
        class_id: The true class.

    Raises:
        TruthError: The class is none of K.
    """
    require_class_ids(np.array([class_id]), len(logits))
    true = logits[class_id]
    return int((logits > true).sum() + (logits[:class_id] == true).sum())


def _ratio(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> _Scores:
    ratio = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _mean(values: _Scores) -> float:
    occurring = values[~np.isnan(values)]
    return float(occurring.mean()) if occurring.size else float("nan")


def _no_class_id(ids: npt.NDArray[Any], num_classes: int) -> int | None:
    if not ids.size:
        return None
    extremes = int(ids.min()), int(ids.max())
    return next((value for value in extremes if not 0 <= value < num_classes), None)
