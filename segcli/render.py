"""Class maps as pictures: palette colors, overlays, cutouts, and a legend beside them.

Arrays in, arrays out, RGB throughout. This room opens no file and knows no model: names and
palettes are handed in.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from segcli.lettering import draw_text, readable_name, text_width

_Image: TypeAlias = npt.NDArray[np.uint8]
_ClassMap: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

_FIXED_ONE = 1 << 16
_BLEND_ROWS = 32


def colorize(
    class_map: _ClassMap, palette: _Image, visible: Collection[int] | None = None
) -> _Image:
    """Returns the palette color of every pixel.

    Args:
        class_map: (H, W) class ids below K.
        palette: (K, 3) uint8 RGB.
        visible: The classes to color, the others black; None for all.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    _require_known(class_map, palette)
    if visible is not None:
        palette = palette * _is_visible(visible, len(palette))[:, None]
    if class_map.dtype != np.uint8:
        return palette.take(class_map, axis=0)
    table = np.zeros((1, 256, 3), np.uint8)
    table[0, : len(palette)] = palette[:256]
    # Three times as fast as take: cv2 wants as many channels in the source as in the table.
    return np.asarray(cv2.LUT(cv2.merge([class_map] * 3), table), np.uint8)


def overlay(
    image: _Image,
    class_map: _ClassMap,
    palette: _Image,
    opacity: float,
    visible: Collection[int] | None = None,
) -> _Image:
    """Returns the image blended with its class colors.

    The opacity ``a`` counts to the nearest 1/65536; each value is then exactly
    ``floor((1 - a) * image + a * color + 1/2)``: halves go up.

    Args:
        image: (H, W, 3) uint8 RGB.
        class_map: (H, W) class ids below K.
        palette: (K, 3) uint8 RGB.
        opacity: Share of the class color, in [0, 1].
        visible: The classes to blend, the image as it is elsewhere; None for all.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    _require_same_size(image, class_map)
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be in [0, 1], found {opacity}")
    weight = np.uint32(round(opacity * _FIXED_ONE))
    blended = colorize(class_map, palette)
    # In strips that stay in cache: four passes over uint32 copies of a photograph do not.
    for top in range(0, len(image), _BLEND_ROWS):
        strip = slice(top, top + _BLEND_ROWS)
        value = image[strip] * (np.uint32(_FIXED_ONE) - weight)
        value += blended[strip] * weight
        value += np.uint32(_FIXED_ONE // 2)
        value >>= np.uint32(16)
        blended[strip] = value
    if visible is not None:
        hidden = ~_is_visible(visible, len(palette))[class_map]
        cv2.copyTo(image, hidden.view(np.uint8), blended)
    return blended


def cutout(image: _Image, class_map: _ClassMap, visible: Collection[int]) -> _Image:
    """Returns (H, W, 4) uint8 RGBA: the image where a visible class is, elsewhere all zeros.

    Nothing of what was cut away stays in the file.
    """
    _require_same_size(image, class_map)
    num_ids = np.iinfo(class_map.dtype).max + 1
    opaque = _is_visible(visible, num_ids)[class_map]
    cut = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    cut[~opaque] = 0
    return np.asarray(cut, np.uint8)


def color_confidence(
    margin: npt.NDArray[np.float32], colormap: Literal["gray", "viridis"]
) -> _Image:
    """Returns margins as brightness: 0 is black, or viridis' purple, 1 white, or its yellow.

    Args:
        margin: (H, W) float32 in [0, 1], as ``confidence_map`` gives it.
        colormap: Viridis is as even for the eye as gray, and shows smaller differences.

    Returns:
        (H, W) uint8 for gray, ``255 * margin`` to the nearest; (H, W, 3) uint8 RGB for viridis.
    """
    # cv2 rounds to the nearest, in one pass.
    gray = np.asarray(cv2.convertScaleAbs(margin, alpha=255), np.uint8)
    if colormap == "gray":
        return gray
    colored = cv2.applyColorMap(gray, cv2.COLORMAP_VIRIDIS)
    return np.asarray(cv2.cvtColor(colored, cv2.COLOR_BGR2RGB), np.uint8)


def shrink(image: _Image, columns: int) -> _Image:
    """Returns (h, columns, 3): the average of the area below each new pixel, its aspect kept."""
    height, width = image.shape[:2]
    rows = max(1, round(height * columns / width))
    small = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.uint8)


def keep_classes(class_map: _ClassMap, visible: Collection[int], fill: int) -> _ClassMap:
    """Returns the class map, its dtype kept, with ``fill`` where no visible class is."""
    kept = class_map.copy()
    num_ids = np.iinfo(class_map.dtype).max + 1
    kept[~_is_visible(visible, num_ids)[class_map]] = fill
    return kept


def legend(
    entries: Sequence[tuple[str, tuple[int, int, int], float | None]], height: int
) -> _Image:
    """Returns a white panel of color swatches, names and shares.

    Lines grow with the height and never fall below a readable 20 pixels. Entries go on in
    further columns when the height is used up; a panel beside a very small picture is
    taller than asked for.

    Args:
        entries: Name (``lettering.readable_name`` gives one that can be drawn), RGB color, and
            share in [0, 1] or None, from top to bottom.
        height: Height in pixels of the picture that the panel goes with.

    Returns:
        (h, w, 3) uint8 RGB, ``h >= height``; no wider than a margin without entries.
    """
    line = max(20, height // 36)
    margin = line // 2
    rows = max(12, (height - 2 * margin) // line)
    columns = [
        _legend_column(entries[start : start + rows], line)
        for start in range(0, len(entries), rows)
    ]
    panel = np.full(
        (
            max([height, *(len(c) + 2 * margin for c in columns)]),
            margin + sum(c.shape[1] + margin for c in columns),
            3,
        ),
        255,
        np.uint8,
    )
    left = margin
    for column in columns:
        panel[margin : margin + len(column), left : left + column.shape[1]] = column
        left += column.shape[1] + margin
    return panel


def with_legend(picture: _Image, panel: _Image) -> _Image:
    """Returns the picture with a legend panel to its right, the shorter one padded white.

    Args:
        picture: (H, W, 3) uint8 RGB.
        panel: (h, w, 3) uint8 RGB.

    Returns:
        (max(H, h), W + w, 3) uint8 RGB.
    """
    width = picture.shape[1]
    shape = (max(len(picture), len(panel)), width + panel.shape[1], 3)
    joined = np.full(shape, 255, np.uint8)
    joined[: len(picture), :width] = picture
    joined[: len(panel), width:] = panel
    return joined


def _legend_column(
    entries: Sequence[tuple[str, tuple[int, int, int], float | None]], line: int
) -> _Image:
    size = (line * 4) // 5
    names = [readable_name(name) for name, _, _ in entries]
    shares = [_percent(share) for _, _, share in entries]
    swatch, gap = line - line // 4, line // 3
    name_left = swatch + gap
    name_width = max(text_width(text, size) for text in names)
    share_width = max(text_width(text, size) for text in shares)
    width = name_left + name_width + (gap + share_width if share_width else 0) + 1
    column = np.full((line * len(entries), width, 3), 255, np.uint8)
    for i, (name, share) in enumerate(zip(names, shares, strict=True)):
        box = column[i * line + line // 8 : i * line + line // 8 + swatch, :swatch]
        # The frame keeps a white or pale swatch visible on the white panel.
        box[...] = 128
        box[1:-1, 1:-1] = entries[i][1]
        baseline = i * line + (line * 3) // 4
        draw_text(column, name, name_left, baseline, size)
        draw_text(column, share, width - 1 - text_width(share, size), baseline, size)
    return column


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _is_visible(visible: Collection[int], num_ids: int) -> npt.NDArray[np.bool_]:
    table = np.zeros(num_ids, np.bool_)
    table[list(visible)] = True
    return table


def _require_known(class_map: _ClassMap, palette: _Image) -> None:
    largest = int(class_map.max())
    if largest >= len(palette):
        raise ValueError(f"class {largest} has no color among {len(palette)}")


def _require_same_size(image: npt.NDArray[Any], class_map: npt.NDArray[Any]) -> None:
    if image.shape[:2] != class_map.shape:
        raise ValueError(f"the image is {image.shape[:2]}, its class map {class_map.shape}")
