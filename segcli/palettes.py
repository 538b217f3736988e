"""Colors that stay apart for color-blind eyes, in any number; a choice beside ``labels``' palettes.

About one man in twelve sees red and green alike or nearly so, and a few see blue and green so.
Distances here are the smallest of four: as normal eyes see two colors, and as eyes see them that
lack one of the three kinds of cones.
"""

from functools import cache

import numpy as np
import numpy.typing as npt

from segcli.artifact import Rgb

_Floats = npt.NDArray[np.float64]

# Okabe and Ito, "Color Universal Design", 2008, so ordered that the first few differ most.
_OKABE_ITO: tuple[Rgb, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (240, 228, 66),
    (86, 180, 233),
    (204, 121, 167),
    (230, 159, 0),
    (0, 158, 115),
)
# Their eighth is not handed out, nor anything like it: what --classes hides is black.
_BLACK: Rgb = (0, 0, 0)
MOST_COLORS = 256
# Of each channel of the candidates beyond them: 16 levels.
_LEVEL_STEP = 17

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency", 2009, severity 1, on linear RGB: protanopia, deuteranopia, tritanopia.
_SEEN_BY = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ],
    ]
)
# IEC 61966-2-1, linear sRGB to XYZ; its rows sum to the white point, D65.
_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def safe_palette(num_classes: int) -> tuple[Rgb, ...]:
    """Returns colors for color-blind eyes; the first ones do not depend on how many are wanted.

    Seven are Okabe and Ito's; each further one is that of 4096 candidates which is farthest from
    all before it and from black. The least CIELAB distance of any two, for the worst of the four
    kinds of eyes, is

    ======  ==  ==  ==  ==  ==  =====  ==  ===  ===  ===
    colors  2   3   4   5   6   7..24  32  64   150  256
    least   91  33  24  20  17  16     13  8.5  5.7  3.9
    ======  ==  ==  ==  ==  ==  =====  ==  ===  ===  ===

    and 2.3 is where eyes begin to tell two areas apart that touch. To find a class by a legend
    takes some 15: up to 24 classes.

    Raises:
        ValueError: More than 256 colors are asked for.
    """
    if not 0 <= num_classes <= MOST_COLORS:
        raise ValueError(f"a safe palette has 0 to {MOST_COLORS} colors, not {num_classes}")
    if num_classes <= len(_OKABE_ITO):
        return _OKABE_ITO[:num_classes]
    return (_OKABE_ITO + _farther_colors())[:num_classes]


@cache
def _farther_colors() -> tuple[Rgb, ...]:
    levels = np.arange(0, 256, _LEVEL_STEP)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    seen = _as_seen(candidates)
    taken = _as_seen(np.array([*_OKABE_ITO, _BLACK]))
    nearest = np.min([_distance(seen, color) for color in taken], axis=0)
    chosen: list[Rgb] = []
    while len(_OKABE_ITO) + len(chosen) < MOST_COLORS:
        # To the last digit that matters, so that ties fall alike on every machine.
        farthest = int(nearest.round(6).argmax())
        r, g, b = candidates[farthest].tolist()
        chosen.append((r, g, b))
        nearest = np.minimum(nearest, _distance(seen, seen[farthest]))
    return tuple(chosen)


def _as_seen(colors: npt.NDArray[np.integer]) -> _Floats:
    """Returns (N, 3) sRGB in 0..255 as CIELAB for each kind of eyes, (N, 4, 3)."""
    values = colors / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.einsum("kij,nj->nki", _SEEN_BY, linear), 0, 1)
    relative = seen @ _TO_XYZ.T / _TO_XYZ.sum(axis=1)
    # CIE 15:2004, section 8.2.1.
    f = np.where(
        relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29
    )
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _distance(seen: _Floats, color: _Floats) -> _Floats:
    """Returns the distance of (N, 4, 3) colors from one, (4, 3), for the worst eyes, (N,)."""
    worst: _Floats = np.linalg.norm(seen - color, axis=-1).min(axis=-1)
    return worst
