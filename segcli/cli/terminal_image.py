"""A picture on a terminal: two pixels a character cell, the upper half block over its background.

Rich turns the colors into what the terminal knows, 24 bits or 256. Where there are none, by
NO_COLOR or in a pipe, shades of one character a cell are left. Sixel and the protocol of Kitty show
more, but the libraries that speak them ask the terminal by writing to it and reading stdin, which
here may be an image.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style

from segcli.render import shrink

_UPPER_HALF = "▀"
_SHADES = " ░▒▓█"
_ASCII_SHADES = " .:-=+*#%@"

_Pixels = npt.NDArray[np.uint8]


class TerminalImage:
    """What ``Console.print`` draws as a picture.

    Args:
        image: (H, W, 3) uint8 RGB.
        columns: The most cells of a line; a picture of fewer pixels is not enlarged, and none is
            wider than the console.
    """

    def __init__(self, image: _Pixels, columns: int) -> None:
        if columns < 1:
            raise ValueError(f"a picture needs at least one column, not {columns}")
        self._image = image
        self._columns = min(columns, image.shape[1])

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Tells Rich the width."""
        width = min(self._columns, options.max_width)
        return Measurement(width, width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Gives Rich one line of cells after the other."""
        pixels = shrink(self._image, min(self._columns, options.max_width))
        if console.color_system is None or console.no_color:
            yield from _shaded(pixels, _ASCII_SHADES if options.ascii_only else _SHADES)
        elif options.ascii_only:
            yield from _colored(pixels[::2], " ")
        else:
            yield from _colored(pixels, _UPPER_HALF)


def _colored(pixels: _Pixels, character: str) -> Iterator[Segment]:
    """Yields a cell for two pixels, or for one where the character is a space."""
    rows: list[list[list[int]]] = pixels.tolist()
    step = 1 if character == " " else 2
    for top in range(0, len(rows), step):
        upper = [tuple(color) for color in rows[top]]
        lower: list[tuple[int, ...] | None] = [None] * len(upper)
        if step == 1:
            lower = [*upper]
        elif top + 1 < len(rows):
            lower = [tuple(color) for color in rows[top + 1]]
        cells = list(zip(upper, lower, strict=True))
        # Cells alike in a row are one segment: fewer escapes, and a third of the time on a mask.
        ends = [i for i, (a, b) in enumerate(pairwise(cells), 1) if a != b]
        for start, end in pairwise([0, *ends, len(cells)]):
            yield Segment(character * (end - start), _style(*cells[start]))
        yield Segment.line()


def _shaded(pixels: _Pixels, shades: str) -> Iterator[Segment]:
    """Yields a shade of gray for two pixels, as light as they are on a dark terminal."""
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    for top in range(0, len(gray), 2):
        lightness = gray[top : top + 2].mean(axis=0) / 256
        line = (shades[int(value * len(shades))] for value in lightness)
        yield Segment("".join(line))
        yield Segment.line()


@lru_cache(maxsize=1 << 16)
def _style(upper: tuple[int, int, int], lower: tuple[int, int, int] | None) -> Style:
    return Style(
        color=Color.from_rgb(*upper), bgcolor=None if lower is None else Color.from_rgb(*lower)
    )
