import io

import numpy as np
import pytest
from PIL import Image

from segcli import __version__
from segcli.image_bytes import (
    encode_gray16_png,
    encode_id_png,
    encode_jpeg,
    encode_palette_png,
    encode_png_rgb,
)
from segcli.image_io import decode_image

RNG = np.random.default_rng(7)
PHOTO = np.stack(np.broadcast_arrays(*np.ogrid[:97, :131], 200), axis=-1).astype(np.uint8)


def test_png_round_trips():
    rgba = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    grey16 = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    for array, data in (
        (rgba[..., :3], encode_png_rgb(rgba[..., :3])),
        (rgba, encode_png_rgb(rgba)),
        (grey16, encode_gray16_png(grey16)),
    ):
        with Image.open(io.BytesIO(data)) as image:
            np.testing.assert_array_equal(np.array(image), array)
            assert image.text == {"Software": f"segcli {__version__}"}


@pytest.mark.parametrize("count", [1, 2, 16, 150, 256])
def test_palette_png_pixel_is_the_class_id(count):
    # Ids beyond the palette too, as the void label 255 is.
    class_map = RNG.integers(0, 256, (40, 50), dtype=np.uint8)
    palette = RNG.integers(0, 256, (count, 3), dtype=np.uint8)
    data = encode_palette_png(class_map, palette, {"model": "segformer-b0 é"})
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image), class_map)
        assert image.text["model"] == "segformer-b0 é"
    padded = np.zeros((256, 3), np.uint8)
    padded[:count] = palette
    np.testing.assert_array_equal(decode_image(data, "a"), padded[class_map])


def test_encoding_is_repeatable_and_leaves_its_input_alone():
    image = PHOTO
    image.flags.writeable = False
    assert encode_png_rgb(image) == encode_png_rgb(image)
    assert encode_jpeg(image, 80) == encode_jpeg(image, 80)


def test_jpeg_quality():
    low, high = encode_jpeg(PHOTO, 30), encode_jpeg(PHOTO, 95)
    assert len(low) < len(high)
    error = np.abs(decode_image(high, "a").astype(int) - PHOTO)
    assert error.mean() < 8


def test_id_png_keeps_ids_in_channels_of_8_bits():
    narrow = np.array([[0, 7, 255]], np.uint8)
    decoded = Image.open(io.BytesIO(encode_id_png(narrow)))
    assert decoded.mode == "L"
    assert np.asarray(decoded).tolist() == [[0, 7, 255]]
    wide = np.array([[0, 255, 256, 65535]], np.uint16)
    decoded = Image.open(io.BytesIO(encode_id_png(wide)))
    assert np.asarray(decoded).tolist() == [[[0, 0, 0], [255, 0, 0], [0, 1, 0], [255, 255, 0]]]
