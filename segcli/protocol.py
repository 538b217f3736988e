"""How an image is shown to a segmentation model: its size, windows, flips and scales.

The published figures of a model hold under its authors' protocol only. ``model`` is what the
checkpoint's own processor does; ``short-side`` with a multiple of 32 is that of mmsegmentation and
the original code on ADE20K, windows of 1024 every 768 pixels that on Cityscapes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli.artifact import MIN_IMAGE_SIZE, ModelCard, Preprocessing
from segcli.errors import ImageTooLarge, InferenceError, UsageError
from segcli.fields import Field, Flipped, MeanProbability, Resized, Tiled, Upsampled
from segcli.preprocess import MAX_RESIZED_PIXELS, preprocess, resized_hw

_Floats: TypeAlias = npt.NDArray[np.float32]

# AlignedResize of the original code: the network's stride.
_MULTIPLE = 32
# MultiScaleFlipAug of mmsegmentation's configs.
_PUBLISHED_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
_LONGEST_SIDE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How an image is shown to a model.

    Attributes:
        resize: ``model``: the checkpoint's own preprocessing; ``short-side``: aspect kept, each
            side rounded up to a multiple of 32; ``native``: none; ``size``: to ``size_hw``.
        short_side: Pixels of ``short-side``; None takes the shorter side of the model's own.
        size_hw: Height and width of ``size``.
        tile: Height and width of windows, None for the whole image at once.
        overlap: Pixels that neighboring windows share.
        scales: Factors of the size; the softmax at each is averaged.
        flip: Averages with the mirrored image, too.
    """

    resize: Literal["model", "short-side", "native", "size"] = "model"
    short_side: int | None = None
    size_hw: tuple[int, int] | None = None
    tile: int | None = None
    overlap: int = 0
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    @property
    def one_look(self) -> bool:
        """Whether the network sees the image once, whole."""
        return self.tile is None and self.scales == (1.0,) and not self.flip

    def preprocessing(
        self, image_hw: tuple[int, int], own: Preprocessing, scale: float = 1.0
    ) -> Preprocessing:
        """Returns what to do to an image of a height and width.

        Args:
            image_hw: The image's height and width.
            own: The model's own preprocessing.
            scale: Factor of the size.

        Raises:
            InferenceError: It would be smaller than a model takes.
            ImageTooLarge: It would be larger than any was made for.
        """
        if self.resize == "model" and scale == 1.0:
            return own
        size_hw = self._size_hw(image_hw, own, scale)
        if max(size_hw) > _LONGEST_SIDE or size_hw[0] * size_hw[1] > MAX_RESIZED_PIXELS:
            raise ImageTooLarge(
                f"a {image_hw[1]}x{image_hw[0]} image becomes {size_hw[1]}x{size_hw[0]} for this "
                f"--resize, more than {MAX_RESIZED_PIXELS} pixels or {_LONGEST_SIDE} a side",
                hint="crop the image to a less extreme shape, or choose another size",
            )
        if min(size_hw) < MIN_IMAGE_SIZE:
            raise InferenceError(
                f"the model would see {size_hw[1]}x{size_hw[0]} pixels, expected at least "
                f"{MIN_IMAGE_SIZE} a side",
                hint="--resize model shows it the image at the model's own size",
            )
        if size_hw == image_hw:
            return replace(own, resize="none", size_hw=None, shortest_edge=None, crop_hw=None)
        return replace(own, resize="squash", size_hw=size_hw, shortest_edge=None, crop_hw=None)

    def _size_hw(
        self, image_hw: tuple[int, int], own: Preprocessing, scale: float
    ) -> tuple[int, int]:
        if self.resize == "short-side":
            side = self.short_side or own.shortest_edge or min(own.size_hw or image_hw)
            factor = side * scale / min(image_hw)
            # mmcv rounds half up, then AlignedResize rounds up.
            height, width = (-(-int(n * factor + 0.5) // _MULTIPLE) * _MULTIPLE for n in image_hw)
        else:
            base_hw = image_hw if self.resize == "native" else self.size_hw
            base_hw = resized_hw(image_hw, own) if base_hw is None else base_hw
            height, width = (int(n * scale + 0.5) for n in base_hw)
        return max(height, 1), max(width, 1)


def logits_field(
    image: npt.NDArray[np.uint8],
    card: ModelCard,
    protocol: Protocol,
    infer: Callable[[_Floats], _Floats],
    size_hw: tuple[int, int],
) -> Field:
    """Returns what a model says of every pixel of an image under a protocol.

    Args:
        image: (H, W, 3) uint8 RGB.
        card: Of a segmentation model.
        protocol: How to show it the image.
        infer: Returns the logits (K, h, w) of a (1, 3, h, w) input; called while rows are read.
        size_hw: Height and width of the field.

    Raises:
        ImageError: The image does not fit the protocol, or the model failed on it.
    """
    num_classes = len(card.class_names)

    def look(scale: float, flip: bool) -> Field:
        spec = protocol.preprocessing(image.shape[:2], card.preprocessing, scale)
        pixel_values = preprocess(image, spec)
        if flip:
            pixel_values = pixel_values[..., ::-1]
        seen_hw = pixel_values.shape[2:]
        field: Field
        if protocol.tile is None:
            logits = infer(np.ascontiguousarray(pixel_values))
            field = Upsampled(logits, size_hw, align_corners=card.align_corners)
        else:
            field = Tiled(
                (seen_hw[0], seen_hw[1]),
                protocol.tile,
                protocol.overlap,
                lambda rows, cols: infer(np.ascontiguousarray(pixel_values[:, :, rows, cols])),
                num_classes,
                align_corners=card.align_corners,
            )
            if seen_hw != size_hw:
                field = Resized(field, size_hw, align_corners=card.align_corners)
        return Flipped(field) if flip else field

    flips = (False, True) if protocol.flip else (False,)
    looks = [look(scale, flip) for scale in protocol.scales for flip in flips]
    return looks[0] if len(looks) == 1 else MeanProbability(looks)


def parse_protocol(
    resize: str, tile: int | None, overlap: int | None, augment: str | None
) -> Protocol:
    """Returns the protocol of ``--resize``, ``--tile``, ``--overlap`` and ``--augment``.

    Raises:
        UsageError: One has another form, or they contradict each other.
    """
    values = _parse_resize(resize)
    if overlap is not None and tile is None:
        raise UsageError("--overlap goes with --tile")
    if tile is not None:
        overlap = tile // 4 if overlap is None else overlap
        if not MIN_IMAGE_SIZE <= tile <= _LONGEST_SIDE or not 0 <= overlap < tile:
            raise UsageError(
                f"--tile {tile} with --overlap {overlap}: expected a tile of at least "
                f"{MIN_IMAGE_SIZE} pixels, and less overlap than that"
            )
    scales, flip = _parse_augment(augment)
    return replace(values, tile=tile, overlap=overlap or 0, scales=scales, flip=flip)


def _parse_resize(text: str) -> Protocol:
    if text in ("model", "native", "short-side"):
        return Protocol(resize=text)  # type: ignore[arg-type]
    if match := re.fullmatch(r"short-side=([1-9][0-9]*)", text):
        side = int(match[1])
        if MIN_IMAGE_SIZE <= side <= _LONGEST_SIDE:
            return Protocol(resize="short-side", short_side=side)
    elif match := re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text):
        width, height = int(match[1]), int(match[2])
        if min(width, height) >= MIN_IMAGE_SIZE and max(width, height) <= _LONGEST_SIDE:
            return Protocol(resize="size", size_hw=(height, width))
    raise UsageError(
        f"--resize {text!r} is not model, short-side, short-side=N, native or WxH, with "
        f"{MIN_IMAGE_SIZE} to {_LONGEST_SIDE} pixels a side"
    )


def _parse_augment(text: str | None) -> tuple[tuple[float, ...], bool]:
    if text is None:
        return (1.0,), False
    scales: list[float] = []
    flip = False
    for item in text.split(","):
        if item == "flip":
            flip = True
        elif item == "scales":
            scales += _PUBLISHED_SCALES
        elif re.fullmatch(r"[0-9]*\.?[0-9]+", item) and 0.1 <= float(item) <= 4:
            scales.append(float(item))
        else:
            raise UsageError(
                f"--augment {text!r}: {item!r} is not flip, scales, or a factor from 0.1 to 4",
                hint=f"'flip,scales' is flip with {', '.join(map(str, _PUBLISHED_SCALES))}",
            )
    return tuple(dict.fromkeys(scales)) or (1.0,), flip
