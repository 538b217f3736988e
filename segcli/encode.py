"""A result -> the bytes of one output file."""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from segcli import image_bytes, render
from segcli.annotate import draw_contours, draw_names
from segcli.artifact import ModelCard
from segcli.document import segmentation_document
from segcli.formats import Format
from segcli.lettering import readable_name
from segcli.results import ClassMap, ClassShare, Segmentation


@dataclass(frozen=True, kw_only=True)
class Style:
    """What outputs show of a result.

    Attributes:
        opacity: Share of the class colour in an overlay, in [0, 1].
        visible: The class ids to keep, None for all.
        legend: Adds names, colours and shares to ``color`` and ``overlay``.
        contours: Draws the borders between classes into an overlay.
        names: Draws each class's name into its largest region of an overlay.
        polygons: Adds outlines to ``json``.
        viridis: Colours ``confidence``, which is grey otherwise.
        palette: (K, 3) uint8 RGB in place of the model's own, None for that.
    """

    opacity: float = 0.5
    visible: frozenset[int] | None = None
    legend: bool = False
    contours: bool = False
    names: bool = False
    polygons: bool = False
    viridis: bool = False
    palette: npt.NDArray[np.uint8] | None = None


def encode_output(
    result: Segmentation, format_: Format, target: str, card: ModelCard, style: Style
) -> bytes:
    """Returns the bytes of one output file.

    Args:
        result: What the model said of the image.
        format_: What to make of it; ``confidence`` needs a result that has it.
        target: The file's name; its suffix chooses how an overlay is encoded.
        card: Of the model, named in the file.
        style: What to show of it.
    """
    text = {"Model": card.name, "Weights": card.weights_sha256}
    if style.palette is not None:
        result = replace(result, palette=style.palette)
    match format_:
        case Format.MASK:
            return _encode_mask(result, style.visible, text)
        case Format.NPY:
            buffer = io.BytesIO()
            np.save(buffer, _kept(result, style.visible), allow_pickle=False)
            return buffer.getvalue()
        case Format.JSON:
            shares = _shares(result, style.visible)
            found = segmentation_document(
                result.class_map, shares, card.name, polygons=style.polygons
            )
            return json.dumps(found, allow_nan=False).encode("ascii") + b"\n"
        case Format.CONFIDENCE:
            assert result.confidence is not None
            if style.viridis:
                colored = render.color_confidence(result.confidence, "viridis")
                return image_bytes.encode_png_rgb(colored, text)
            gray = render.color_confidence(result.confidence, "gray")
            return image_bytes.encode_gray_png(gray, text)
        case Format.CUTOUT:
            assert style.visible is not None
            cut = render.cutout(result.image, result.class_map, style.visible)
            return image_bytes.encode_png_rgb(cut, text)
        case Format.COLOR:
            picture = render.colorize(result.class_map, result.palette, style.visible)
        case Format.OVERLAY:
            picture = draw_overlay(result, style)
    if style.legend:
        picture = render.with_legend(picture, _legend(result, style.visible))
    if format_ is Format.COLOR or Path(target).suffix.lower() == ".png":
        return image_bytes.encode_png_rgb(picture, text)
    return image_bytes.encode_jpeg(picture)


def draw_overlay(result: Segmentation, style: Style) -> npt.NDArray[np.uint8]:
    """Returns (H, W, 3) uint8 RGB: the image blended with its classes, borders and names on it."""
    palette = result.palette if style.palette is None else style.palette
    picture = render.overlay(result.image, result.class_map, palette, style.opacity, style.visible)
    if style.contours:
        picture = draw_contours(picture, result.class_map, palette, style.visible)
    if style.names:
        picture = draw_names(picture, result.class_map, result.class_names, style.visible)
    return picture


def _kept(result: Segmentation, visible: frozenset[int] | None) -> ClassMap:
    """Returns the class map, void where the class is not to be kept."""
    if visible is None:
        return result.class_map
    # 255 is the field's value for void; above 255 classes the type's own largest.
    fill = 255 if len(result.class_names) <= 255 else int(np.iinfo(np.uint16).max)
    class_map = result.class_map.astype(np.uint16) if fill > 255 else result.class_map
    return render.keep_classes(class_map, visible, fill)


def _encode_mask(
    result: Segmentation, visible: frozenset[int] | None, text: dict[str, str]
) -> bytes:
    class_map = _kept(result, visible)
    if class_map.dtype == np.uint8:
        return image_bytes.encode_palette_png(class_map.astype(np.uint8), result.palette, text)
    return image_bytes.encode_gray16_png(class_map.astype(np.uint16), text)


def _shares(result: Segmentation, visible: frozenset[int] | None) -> list[ClassShare]:
    return [c for c in result.classes if visible is None or c.class_id in visible]


def _legend(result: Segmentation, visible: frozenset[int] | None) -> npt.NDArray[np.uint8]:
    entries = [
        (readable_name(c.name, c.class_id), rgb(result.palette[c.class_id]), c.fraction)
        for c in _shares(result, visible)
    ]
    return render.legend(entries, result.class_map.shape[0])


def rgb(color: npt.NDArray[np.uint8]) -> tuple[int, int, int]:
    """Returns a palette's entry as integers."""
    red, green, blue = color.tolist()
    return red, green, blue
