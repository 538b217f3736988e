"""Pictures made from numbers alone, for whoever has no photos at hand to measure with."""

import cv2
import numpy as np
import numpy.typing as npt

from segcli.atomic import write_atomic
from segcli.image_bytes import encode_jpeg

# Together they make a JPEG as large, and class borders about as long, as a photo's.
_OCTAVES = 7
_COARSEST_PX = 512
_STRONGEST = 96
_DECAY = 0.75
_GRAIN = 5


def write_images(folder: str, count: int, size_wh: tuple[int, int]) -> list[str]:
    """Writes JPEG files with about a photo's detail, and returns their paths.

    Args:
        folder: Where to.
        count: How many; each is another one, and the same in every run.
        size_wh: Their width and height in pixels.

    Raises:
        OutputWriteError: One of them cannot be written.
    """
    paths = [f"{folder}/{seed}.jpg" for seed in range(count)]
    for seed, path in enumerate(paths):
        write_atomic(path, encode_jpeg(_photo(seed, size_wh)))
    return paths


def _photo(seed: int, size_wh: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Returns (H, W, 3) uint8: octaves of noise, each finer and weaker than the one before."""
    width, height = size_wh
    random = np.random.default_rng(seed)
    image: npt.NDArray[np.uint8] = np.full((height, width, 3), 128, np.uint8)
    for octave in range(_OCTAVES):
        cells = [max(2, (side << octave) // _COARSEST_PX) for side in (height, width)]
        strength = round(_STRONGEST * _DECAY**octave)
        field = random.integers(-strength, strength + 1, (*cells, 3), np.int16)
        field = cv2.resize(field, size_wh, interpolation=cv2.INTER_CUBIC)
        image = np.asarray(cv2.add(image, field, dtype=cv2.CV_8U), np.uint8)
    grain = random.integers(-_GRAIN, _GRAIN + 1, image.shape, np.int16)
    return np.asarray(cv2.add(image, grain, dtype=cv2.CV_8U), np.uint8)
