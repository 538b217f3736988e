"""Features of an image -> one array: the mean of a map, windows of it, or the map itself."""

from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from segcli.errors import InferenceError

Pool: TypeAlias = Literal["mean", "7x7", "none"]
POOLS: tuple[Pool, ...] = get_args(Pool)

_WINDOW = 7
_Floats: TypeAlias = npt.NDArray[np.float32]


def pool(features: _Floats, how: Pool) -> _Floats:
    """Returns an array for one image.

    Args:
        features: A map (C, h, w), tokens (N, C), or a vector (C,), which stays as it is.
        how: ``mean``: (C,), over all places. ``7x7``: (C, h - 6, w - 6), the mean of each window
            of 7x7, the original MobileNetV2's average pooling with a fixed window and a stride of
            one; at 224x224 the map is one window. ``none``: the features.

    Returns:
        float32.

    Raises:
        InferenceError: There is no map of at least 7x7 to take windows of.
    """
    if how == "none" or features.ndim == 1:
        return features
    if how == "mean":
        axes = (1, 2) if features.ndim == 3 else (0,)
        return np.asarray(features.mean(axis=axes, dtype=np.float64), np.float32)
    if features.ndim != 3 or min(features.shape[1:]) < _WINDOW:
        raise InferenceError(
            f"features of shape {features.shape} have no windows of 7x7",
            hint="choose a map with --layer, and a larger size with --resize",
        )
    # Sums from the left and above, so that a window is four of them.
    sums = np.zeros((len(features), *(n + 1 for n in features.shape[1:])))
    sums[:, 1:, 1:] = features.cumsum(axis=1, dtype=np.float64).cumsum(axis=2)
    rows = sums[:, _WINDOW:] - sums[:, :-_WINDOW]
    windows = rows[:, :, _WINDOW:] - rows[:, :, :-_WINDOW]
    return np.asarray(windows / _WINDOW**2, np.float32)
