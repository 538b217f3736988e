"""From an image to the graph's input, as the ModelCard's Preprocessing says.

The arithmetic is that of transformers' Pillow-backed image processors, step by step and bit by
bit: ``image_transforms.py`` there is the reference for every rounding below. Rescaling and
normalisation see only 256 values per channel, so they are computed once into a table.
"""

import cv2
import numpy as np
import numpy.typing as npt

from segcli.artifact import Preprocessing
from segcli.errors import ImageTooLarge
from segcli.resize import resize

# A long thin image whose short edge is scaled up can ask for gigabytes; 64 megapixels are
# beyond what any of the models was made for.
MAX_RESIZED_PIXELS = 64_000_000


def preprocess(image: npt.NDArray[np.uint8], spec: Preprocessing) -> npt.NDArray[np.float32]:
    """Resizes, crops, rescales and normalizes one image.

    Args:
        image: (H, W, 3) uint8, RGB.
        spec: The model's own preprocessing.

    Returns:
        (1, 3, h, w) float32, C-contiguous.

    Raises:
        ImageTooLarge: The resized image would exceed ``MAX_RESIZED_PIXELS``.
    """
    image_hw = (image.shape[0], image.shape[1])
    size_hw = resized_hw(image_hw, spec)
    if size_hw != image_hw:
        _check_size(image_hw, size_hw)
        image = resize(image, size_hw, spec.interpolation)
    if spec.crop_hw is not None:
        image = _center_crop(image, spec.crop_hw)
    table = _value_table(spec)
    batch = np.empty((1, 3, *image.shape[:2]), np.float32)
    for channel, plane in enumerate(cv2.split(image)):
        cv2.LUT(plane, table[channel], dst=batch[0, channel])
    return batch


def resized_hw(image_hw: tuple[int, int], spec: Preprocessing) -> tuple[int, int]:
    """Returns height and width after the resize, before the crop.

    Args:
        image_hw: The image's height and width.
        spec: The model's own preprocessing.
    """
    if spec.size_hw is not None:
        return spec.size_hw
    if spec.shortest_edge is None:
        return image_hw
    height, width = image_hw
    # get_resize_output_image_size: the long edge is truncated, not rounded.
    long_edge = int(spec.shortest_edge * max(image_hw) / min(image_hw))
    if width <= height:
        return long_edge, spec.shortest_edge
    return spec.shortest_edge, long_edge


def _check_size(image_hw: tuple[int, int], size_hw: tuple[int, int]) -> None:
    if size_hw[0] * size_hw[1] > MAX_RESIZED_PIXELS:
        raise ImageTooLarge(
            f"a {image_hw[1]}x{image_hw[0]} image becomes {size_hw[1]}x{size_hw[0]} for this "
            f"model, more than {MAX_RESIZED_PIXELS} pixels",
            hint="crop the image to a less extreme shape, or choose a size with --resize",
        )


def _center_crop(image: npt.NDArray[np.uint8], crop_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Returns (crop_h, crop_w, 3); zeros where the image is smaller."""
    rows, rows_to = _crop_slices(image.shape[0], crop_hw[0])
    columns, columns_to = _crop_slices(image.shape[1], crop_hw[1])
    part = image[rows, columns]
    if part.shape[:2] == crop_hw:
        return part
    padded = np.zeros((*crop_hw, 3), np.uint8)
    padded[rows_to, columns_to] = part
    return padded


def _crop_slices(length: int, crop: int) -> tuple[slice, slice]:
    """Returns where to read and where to write; an odd pixel of padding goes first."""
    if length >= crop:
        start = (length - crop) // 2
        return slice(start, start + crop), slice(0, crop)
    start = (crop - length + 1) // 2
    return slice(0, length), slice(start, start + length)


def _value_table(spec: Preprocessing) -> npt.NDArray[np.float32]:
    """Returns (3, 256) float32: what each uint8 value becomes in each channel."""
    values = np.arange(256, dtype=np.float64)
    if spec.rescale is not None:
        values *= spec.rescale
    # The product is rounded to float32 once; the rest happens in float32.
    table = np.tile(values.astype(np.float32), (3, 1))
    if spec.mean is not None and spec.std is not None:
        table -= np.array(spec.mean, np.float32)[:, None]
        table /= np.array(spec.std, np.float32)[:, None]
    return table
