"""A confusion matrix to look at: rows are true classes, and each row's shares are colors.

Arrays in, an array out, as in ``segcli.render``, whose lettering it uses.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from segcli.evaluate import Confusion
from segcli.lettering import draw_text, readable_name, text_width

_Image: TypeAlias = npt.NDArray[np.uint8]

# Shares 0, 1/2 and 1: white, blue, dark blue, so that a few percent already show.
_STOPS = np.array([[255, 255, 255], [74, 152, 201], [8, 48, 107]], np.float64)
_NO_TRUTH, _GRID, _INK = 222, 236, (0, 0, 0)
# Pixels of a cell: with its number in it where there are few classes, else as high as a name.
_ROOMY, _CLOSE = 40, 18
_MOST_NUMBERS = 32
_LINE = 20
_TEXT = _LINE * 4 // 5


def draw_confusion(confusion: Confusion, class_names: Sequence[str]) -> _Image:
    """Returns a picture of what the pixels of each true class were taken for.

    Each row is divided by its sum; a class that the truth does not have is a grey row. Up to 32
    classes each share of 1/2 % or more stands in its cell, in whole percents.

    Args:
        confusion: (K, K), rows truth, columns prediction.
        class_names: K names.

    Returns:
        (H, W, 3) uint8 RGB, 40 pixels a class, above 32 classes 18, beside the names.
    """
    if confusion.shape != (len(class_names), len(class_names)):
        raise ValueError(f"a matrix {confusion.shape} for {len(class_names)} class names")
    numbered = len(class_names) <= _MOST_NUMBERS
    cell = _ROOMY if numbered else _CLOSE
    grid, key = _grid(confusion, cell, numbers=numbered), _key()
    row_names, column_names = _names(class_names, right=True), _names(class_names, right=False)
    left, top = _LINE + row_names.shape[1], 2 * _LINE + column_names.shape[1]
    width = max(left + len(grid), _LINE + key.shape[1])
    picture = np.full((top + len(grid) + _LINE, width + _LINE, 3), 255, np.uint8)
    picture[top : top + len(grid), left : left + len(grid)] = grid
    for i in range(len(class_names)):
        line = slice(i * _LINE, (i + 1) * _LINE)
        middle = i * cell + (cell - _LINE) // 2
        _ink(picture, row_names[line], top + middle, _LINE)
        # Read upwards, from the column on.
        _ink(picture, np.rot90(column_names[line]), 2 * _LINE, left + middle)
    _ink(picture, key, _LINE // 2, _LINE)
    return picture


def _ink(picture: _Image, part: _Image, top: int, left: int) -> None:
    # Darker of the two: lines of names overlap a little where cells are lower than they.
    place = picture[top : top + part.shape[0], left : left + part.shape[1]]
    np.minimum(place, part, out=place)


def _grid(confusion: Confusion, cell: int, *, numbers: bool) -> _Image:
    """Returns the matrix alone, ``cell`` pixels a class, the last one of each being a line."""
    totals = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    colors = _colors(shares)
    colors[totals[:, 0] == 0] = _NO_TRUTH
    grid = colors.repeat(cell, axis=0).repeat(cell, axis=1)
    grid[cell - 1 :: cell] = _GRID
    grid[:, cell - 1 :: cell] = _GRID
    if numbers:
        for row, column in np.argwhere(shares >= 0.005):
            text = f"{100 * shares[row, column]:.0f}"
            ink = (255, 255, 255) if shares[row, column] > 0.4 else _INK
            left = int(column) * cell + (cell - text_width(text, _TEXT)) // 2
            draw_text(grid, text, left, int(row) * cell + cell // 2 + _LINE // 4, _TEXT, ink)
    return grid


def _colors(shares: npt.NDArray[np.float64]) -> _Image:
    stops = np.linspace(0, 1, len(_STOPS))
    planes = [np.interp(shares, stops, channel) for channel in _STOPS.T]
    return np.stack(planes, axis=-1).round().astype(np.uint8)


def _names(class_names: Sequence[str], *, right: bool) -> _Image:
    """Returns the names, a line each, flush with a gap at the right or at the left."""
    texts = [readable_name(name, i) for i, name in enumerate(class_names)]
    widths = [text_width(text, _TEXT) + 1 for text in texts]
    gap = _LINE // 3
    column = np.full((_LINE * len(texts), max(widths) + gap, 3), 255, np.uint8)
    for i, (text, width) in enumerate(zip(texts, widths, strict=True)):
        left = max(widths) - width if right else gap
        draw_text(column, text, left, i * _LINE + _LINE * 3 // 4, _TEXT, _INK)
    return column


def _key() -> _Image:
    """Returns the line that says what is drawn, and the scale of its colors."""
    text = "rows: true class; columns: predicted; 0 to 100 % of the row"
    width = text_width(text, _TEXT) + 1
    key = np.full((_LINE, width + 6 * _LINE, 3), 255, np.uint8)
    draw_text(key, text, 0, _LINE * 3 // 4, _TEXT, _INK)
    scale = _colors(np.linspace(0, 1, 5 * _LINE))
    key[_LINE // 8 : -_LINE // 8, width + _LINE // 2 : width + _LINE // 2 + 5 * _LINE] = scale
    return key
