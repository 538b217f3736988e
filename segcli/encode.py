"""A result -> the bytes of one output file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from segcli import image_io, render
from segcli.artifact import ModelCard
from segcli.results import Segmentation
from segcli.writers import Format


@dataclass(frozen=True, kw_only=True)
class Style:
    """What outputs show of a result.

    Attributes:
        opacity: Share of the class colour in an overlay, in [0, 1].
        visible: The class ids to keep, None for all.
        legend: Adds names, colours and shares to ``color`` and ``overlay``.
    """

    opacity: float = 0.5
    visible: frozenset[int] | None = None
    legend: bool = False


def encode_output(
    result: Segmentation, format_: Format, target: str, card: ModelCard, style: Style
) -> bytes:
    """Returns the bytes of one output file.

    Args:
        result: What the model said of the image.
        format_: What to make of it.
        target: The file's name; its suffix chooses how an overlay is encoded.
        card: Of the model, named in the file.
        style: What to show of it.
    """
    text = {"Model": card.name, "Weights": card.weights_sha256}
    if format_ is Format.MASK:
        return _encode_mask(result, style.visible, text)
    if format_ is Format.COLOR:
        picture = render.colorize(result.class_map, result.palette, style.visible)
    else:
        picture = render.overlay(
            result.image, result.class_map, result.palette, style.opacity, style.visible
        )
    if style.legend:
        picture = render.with_legend(picture, _legend(result, style.visible))
    if format_ is Format.COLOR or Path(target).suffix.lower() == ".png":
        return image_io.encode_png_rgb(picture, text)
    return image_io.encode_jpeg(picture)


def _encode_mask(
    result: Segmentation, visible: frozenset[int] | None, text: dict[str, str]
) -> bytes:
    class_map = result.class_map
    if visible is not None:
        # 255 is the field's value for void; above 255 classes the type's own largest.
        fill = 255 if len(result.class_names) <= 255 else int(np.iinfo(np.uint16).max)
        if fill > 255:
            class_map = class_map.astype(np.uint16)
        class_map = render.keep_classes(class_map, visible, fill)
    if class_map.dtype == np.uint8:
        return image_io.encode_palette_png(class_map.astype(np.uint8), result.palette, text)
    return image_io.encode_gray16_png(class_map.astype(np.uint16), text)


def _legend(result: Segmentation, visible: frozenset[int] | None) -> npt.NDArray[np.uint8]:
    entries: Sequence[tuple[str, tuple[int, int, int], float | None]] = [
        (c.name, tuple(result.palette[c.class_id].tolist()), c.fraction)
        for c in result.classes
        if visible is None or c.class_id in visible
    ]
    return render.legend(entries, result.class_map.shape[0])
