"""The loss of one image: cross-entropy of what a model says of every pixel."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli.evaluate import require_class_ids
from segcli.fields import Field, empty_class_map, strips
from segcli.results import ClassMap

_Floats: TypeAlias = npt.NDArray[np.float32]


def class_map_and_loss(
    field: Field, truth: npt.NDArray[Any], *, ignore_index: int | None = 255
) -> tuple[ClassMap, float]:
    """Returns the class map, and the sum over pixels of -log softmax of the true class, in nats.

    Over the number of pixels that count it is ``torch.nn.functional.cross_entropy`` of
    ``interpolate(mode="bilinear")``. Both from one pass: a field of windows runs the network when
    it is read.

    Args:
        field: Logits of the truth's height and width.
        truth: (H, W) class ids.
        ignore_index: True value of pixels that do not count; None where all do.

    Raises:
        InferenceError: The model failed on the image.
        TruthError: A value that counts is no class id.
    """
    counted = np.ones(truth.shape, np.bool_) if ignore_index is None else truth != ignore_index
    require_class_ids(truth[counted], field.num_classes)
    class_map = empty_class_map(field)
    loss = 0.0
    for rows, values in strips(field):
        class_map[rows] = values.argmax(axis=0)
        here = counted[rows]
        loss += _loss_sum(values[:, here], truth[rows][here])
    return class_map, loss


def _loss_sum(logits: _Floats, truth: npt.NDArray[Any]) -> float:
    """Returns the loss of pixels, (K, n) logits and (n,) ids."""
    if not truth.size:
        return 0.0
    every = np.arange(logits.shape[1])
    best = logits.argmax(axis=0)
    values = logits - logits[best, every]
    behind = -values[truth.astype(np.intp), every].astype(np.float64)
    # The best one's own term is left to log1p: beside 1, small ones vanish in float32.
    np.exp(values, out=values)
    values[best, every] = 0
    return float((np.log1p(values.sum(axis=0, dtype=np.float64)) + behind).sum())
