"""How sure a segmentation is: the margin between the two likeliest classes of every pixel."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from segcli.artifact import Activation
from segcli.fields import Field, empty_class_map, strips
from segcli.results import ClassMap

_Floats: TypeAlias = npt.NDArray[np.float32]


def class_map_and_confidence(field: Field, activation: Activation) -> tuple[ClassMap, _Floats]:
    """Returns the class map, and each pixel's best probability less its second.

    From one pass over the field, of which K x H x W values are never held. Where the sigmoid of a
    single logit is p, the field has a plane of zeros before it, and the margin is ``|2 p - 1|``.

    Args:
        field: Logits.
        activation: What the model's own card names; ``sigmoid`` gives each of several classes a
            probability of its own, any other makes all of them sum to one.

    Returns:
        (H, W) uint8, uint16 above 256 classes; (H, W) float32 in [0, 1], 1 where there is only one
        class.
    """
    class_map = empty_class_map(field)
    margins = np.ones(field.size_hw, np.float32)
    is_independent = activation == "sigmoid" and field.num_classes > 2
    for rows, values in strips(field):
        class_map[rows] = values.argmax(axis=0)
        if field.num_classes > 1:
            margins[rows] = _margin(values, is_independent=is_independent)
    return class_map, margins


def _margin(values: _Floats, *, is_independent: bool) -> _Floats:
    """Returns the margin of (K, rows, columns) logits."""
    best = np.maximum(values[0], values[1])
    second = np.minimum(values[0], values[1])
    lesser = np.empty_like(best)
    for plane in values[2:]:
        np.minimum(best, plane, out=lesser)
        np.maximum(second, lesser, out=second)
        np.maximum(best, plane, out=best)
    if is_independent:
        return _sigmoid(best) - _sigmoid(second)
    below = values - best
    total = np.exp(below, out=below).sum(axis=0)
    # -expm1 keeps the digits of a small difference, which 1 - exp would lose.
    margin: _Floats = -np.expm1(second - best) / total
    return margin


def _sigmoid(values: _Floats) -> _Floats:
    return np.exp(-np.logaddexp(np.float32(0), -values))
