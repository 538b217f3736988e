"""How sure a segmentation is: the margin between the two likeliest classes of every pixel.

As with the class map, the logits resized to the picture, K x H x W floats, are never held: tiles
of them are made, reduced, and made again in the same memory.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from segcli.artifact import Activation
from segcli.errors import InferenceError

_Floats: TypeAlias = npt.NDArray[np.float32]

# A tile and its classes, 2 MB of float32, stay in a core's cache.
_TILE_VALUES = 1 << 19
_TILE_COLUMNS = 128


def confidence_map(
    logits: _Floats, size_hw: tuple[int, int], activation: Activation, *, align_corners: bool
) -> _Floats:
    """Returns the margin of every pixel: its best class's probability less the second's.

    The logits are resized as ``torch.nn.functional.interpolate`` does it in mode ``bilinear``,
    then turned into probabilities. Where the sigmoid of a single logit is p, the classes are the
    foreground, p, and nothing, 1 - p, so that the margin is ``|2 p - 1|``.

    Args:
        logits: (K, h, w) float32.
        size_hw: Height and width of the result, larger or smaller than the logits.
        activation: What the model's own card names; ``sigmoid`` gives each of several classes a
            probability of its own, any other makes all of them sum to one.
        align_corners: Whether the outermost logits lie on the outermost pixels' centers.

    Returns:
        (H, W) float32 in [0, 1]; 1 where there is only one class.

    Raises:
        InferenceError: The logits hold NaN or infinity.
    """
    logits = np.asarray(logits, np.float32)
    if not np.isfinite([logits.min(), logits.max()]).all():
        raise InferenceError("the model produced logits that are NaN or infinite")
    is_independent = activation == "sigmoid" and len(logits) > 1
    if activation == "sigmoid" and not is_independent:
        # A softmax over 0 and x is the sigmoid of x.
        logits = np.concatenate([np.zeros_like(logits), logits])
    num_classes, in_height, in_width = logits.shape
    margins = np.ones(size_hw, np.float32)
    if num_classes == 1:
        return margins

    low, high, weight = _positions(in_height, size_hw[0], align_corners)
    columns = _column_tiles(in_width, size_hw[1], align_corners)
    step = max(1, _TILE_VALUES // (num_classes * min(_TILE_COLUMNS, size_hw[1])))
    for top in range(0, size_hw[0], step):
        rows = slice(top, top + step)
        strip = logits[:, low[rows]] * (np.float32(1) - weight[rows, None])
        strip += logits[:, high[rows]] * weight[rows, None]
        for out, source, weights in columns:
            values = strip[:, :, source] @ weights
            margins[rows, out] = _margin(values, is_independent=is_independent)
    return margins


def _margin(values: _Floats, *, is_independent: bool) -> _Floats:
    """Returns the margin of (K, rows, columns) logits, which it uses up."""
    best = np.maximum(values[0], values[1])
    second = np.minimum(values[0], values[1])
    lesser = np.empty_like(best)
    for plane in values[2:]:
        np.minimum(best, plane, out=lesser)
        np.maximum(second, lesser, out=second)
        np.maximum(best, plane, out=best)
    if is_independent:
        return _sigmoid(best) - _sigmoid(second)
    values -= best
    total = np.exp(values, out=values).sum(axis=0)
    # -expm1 keeps the digits of a small difference, which 1 - exp would lose.
    margin: _Floats = -np.expm1(second - best) / total
    return margin


def _sigmoid(values: _Floats) -> _Floats:
    return np.exp(-np.logaddexp(np.float32(0), -values))


def _column_tiles(
    in_width: int, out_width: int, align_corners: bool
) -> list[tuple[slice, slice, _Floats]]:
    """Returns for each tile its columns, those of the logits below it, and the weights.

    A product with a narrow matrix of weights, two to a column, resizes faster than a gather.
    """
    low, high, weight = _positions(in_width, out_width, align_corners)
    tiles = []
    for left in range(0, out_width, _TILE_COLUMNS):
        out = slice(left, min(left + _TILE_COLUMNS, out_width))
        source = slice(int(low[out][0]), int(high[out][-1]) + 1)
        weights = np.zeros((source.stop - source.start, out.stop - out.start), np.float32)
        column = np.arange(out.stop - out.start)
        weights[low[out] - source.start, column] = np.float32(1) - weight[out]
        weights[high[out] - source.start, column] += weight[out]
        tiles.append((out, source, weights))
    return tiles


def _positions(
    in_size: int, out_size: int, align_corners: bool
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], _Floats]:
    """Returns for each pixel the logits before and after it, and the weight of the latter."""
    # float64: the float32 positions of ATen/native/UpSample.h are off by up to 1e-5 of a logit's
    # width and differ with the machine's rounding, which a steep margin shows in its fourth digit.
    position = np.arange(out_size, dtype=np.float64)
    if align_corners:
        position *= (in_size - 1) / max(out_size - 1, 1)
    else:
        position = np.maximum((position + 0.5) * (in_size / out_size) - 0.5, 0)
    low = np.minimum(position.astype(np.intp), in_size - 1)
    weight = np.clip(position - low, 0, 1).astype(np.float32)
    return low, np.minimum(low + 1, in_size - 1), weight
