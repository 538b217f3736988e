from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segcli.artifact import Preprocessing
from segcli.errors import ImageTooLarge
from segcli.image_io import decode_image
from segcli.preprocess import preprocess, resized_hw
from segcli.resize import resize

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

SEGFORMER = Preprocessing(resize="squash", size_hw=(128, 160), **IMAGENET)
MOBILENET = Preprocessing(resize="shortest_edge", shortest_edge=256, crop_hw=(224, 224), **HALF)
DEEPLAB = Preprocessing(resize="shortest_edge", shortest_edge=545, crop_hw=(513, 513), **HALF)
# A crop larger than the resized short edge: zero padding, odd both ways.
PADDED = Preprocessing(resize="shortest_edge", shortest_edge=32, crop_hw=(45, 50), **IMAGENET)
UNSIZED = Preprocessing(resize="none", crop_hw=(31, 37), **IMAGENET)
RAW = Preprocessing(resize="none", rescale=None)
UNNORMALIZED = Preprocessing(
    resize="squash", size_hw=(20, 30), interpolation="bicubic", rescale=1 / 127.5
)
UNSCALED = Preprocessing(
    resize="none", rescale=None, mean=(103.53, 116.28, 123.675), std=(57.4, 57.1, 58.4)
)
SPECS = {
    "segformer": SEGFORMER,
    "mobilenet": MOBILENET,
    "deeplab": DEEPLAB,
    "padded": PADDED,
    "unsized": UNSIZED,
    "raw": RAW,
    "unnormalized": UNNORMALIZED,
    "unscaled": UNSCALED,
}
SIZES = [
    (427, 640),
    (341, 257),
    (100, 90),
    (33, 32),
    (224, 224),
    (9, 1),
    (1, 7),
    (1, 1),
]


def noise(height, width):
    return np.random.default_rng(height * 1000 + width).integers(
        0, 256, (height, width, 3), np.uint8
    )


def slow_preprocess(image, spec):
    """The same in plain steps, float32 from the rescaling on."""
    image = resize(image, resized_hw(image.shape[:2], spec), spec.interpolation)
    if spec.crop_hw is not None:
        cropped = np.zeros((*spec.crop_hw, 3), np.uint8)
        offset = [
            (n - c) // 2 if n >= c else -((c - n + 1) // 2)
            for n, c in zip(image.shape, spec.crop_hw, strict=False)
        ]
        for y in range(spec.crop_hw[0]):
            for x in range(spec.crop_hw[1]):
                from_y, from_x = y + offset[0], x + offset[1]
                if 0 <= from_y < image.shape[0] and 0 <= from_x < image.shape[1]:
                    cropped[y, x] = image[from_y, from_x]
        image = cropped
    values = image.astype(np.float32)
    if spec.rescale is not None:
        values = (image.astype(np.float64) * spec.rescale).astype(np.float32)
    if spec.mean is not None:
        values = (values - np.float32(spec.mean)) / np.float32(spec.std)
    return values.transpose(2, 0, 1)[None]


@pytest.mark.parametrize("name", ["segformer", "padded", "unsized", "raw", "unnormalized"])
@pytest.mark.parametrize("image_hw", SIZES)
def test_equals_the_slow_way(name, image_hw):
    image = noise(*image_hw)
    before = image.copy()
    image.flags.writeable = False
    batch = preprocess(image, SPECS[name])
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    np.testing.assert_array_equal(batch, slow_preprocess(image, SPECS[name]))
    np.testing.assert_array_equal(image, before)


def test_views_are_taken():
    image = noise(300, 400)[::-1, 20:300, ::-1]
    for spec in (SEGFORMER, UNSIZED, RAW):
        np.testing.assert_array_equal(preprocess(image, spec), preprocess(image.copy(), spec))


@pytest.mark.parametrize(
    ("image_hw", "expected"),
    [
        ((480, 640), (256, 341)),
        ((640, 480), (341, 256)),
        ((256, 256), (256, 256)),
        ((1, 3), (256, 768)),
        # 256 * 500 / 333 = 384.38: truncated.
        ((500, 333), (384, 256)),
        # 256 * 599 / 400 = 383.36, 256 * 799 / 600 = 340.9: truncated too.
        ((600, 799), (256, 340)),
    ],
)
def test_shortest_edge_truncates(image_hw, expected):
    assert resized_hw(image_hw, MOBILENET) == expected


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1024))
def test_shortest_edge_keeps_the_aspect(height, width, edge):
    spec = Preprocessing(resize="shortest_edge", shortest_edge=edge)
    resized = resized_hw((height, width), spec)
    assert min(resized) == edge
    assert abs(max(resized) - edge * max(height, width) / min(height, width)) <= 1
    assert (resized[0] >= resized[1]) == (height >= width) or resized[0] == resized[1]


@pytest.mark.parametrize("image_hw", [(10, 10000), (10000, 10), (1, 300000)])
def test_extreme_shapes_do_not_take_the_memory(image_hw):
    image = np.zeros((*image_hw, 3), np.uint8)
    with pytest.raises(ImageTooLarge, match="for this model") as caught:
        preprocess(image, MOBILENET)
    assert "--resize" in caught.value.hint


def processor_of(spec):
    """transformers' own processor for the same settings."""
    from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import (
        MobileNetV2ImageProcessorPil,
    )
    from transformers.models.segformer.image_processing_pil_segformer import (
        SegformerImageProcessorPil,
    )

    resample = {"bilinear": 2, "bicubic": 3}[spec.interpolation]
    size = {"height": 1, "width": 1}
    if spec.size_hw is not None:
        size = dict(zip(("height", "width"), spec.size_hw, strict=True))
    elif spec.shortest_edge is not None:
        size = {"shortest_edge": spec.shortest_edge}
    kind = SegformerImageProcessorPil if spec.resize == "squash" else MobileNetV2ImageProcessorPil
    crop_hw = spec.crop_hw or (1, 1)
    return kind(
        do_resize=spec.resize != "none",
        size=size,
        resample=resample,
        do_center_crop=spec.crop_hw is not None,
        crop_size={"height": crop_hw[0], "width": crop_hw[1]},
        do_rescale=spec.rescale is not None,
        rescale_factor=spec.rescale or 1.0,
        do_normalize=spec.mean is not None,
        image_mean=list(spec.mean or (0.0, 0.0, 0.0)),
        image_std=list(spec.std or (1.0, 1.0, 1.0)),
    )


def reference(image, spec):
    return processor_of(spec)(images=image, input_data_format="channels_last", return_tensors="np")[
        "pixel_values"
    ]


@pytest.mark.export
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("image_hw", SIZES)
def test_bit_equal_to_transformers(name, image_hw):
    image = noise(*image_hw)
    expected = reference(image, SPECS[name])
    batch = preprocess(image, SPECS[name])
    assert batch.shape == expected.shape
    np.testing.assert_array_equal(batch, expected.astype(np.float32))


@pytest.mark.export
@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 60),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
def test_crop_geometry_equals_transformers(height, width, edge, crop_hw):
    spec = Preprocessing(resize="shortest_edge", shortest_edge=edge, crop_hw=crop_hw, **IMAGENET)
    image = noise(height, width)
    np.testing.assert_array_equal(preprocess(image, spec), reference(image, spec))


@pytest.mark.export
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="../shared is not there")
@pytest.mark.parametrize("name", ["china.jpg", "cat_1080p.jpg", "parrot.jpg"])
def test_photos_bit_equal_to_transformers(name):
    image = decode_image((PHOTOS / name).read_bytes(), name)
    segformer = Preprocessing(resize="squash", size_hw=(512, 512), **IMAGENET)
    for spec in (segformer, MOBILENET, DEEPLAB):
        np.testing.assert_array_equal(preprocess(image, spec), reference(image, spec))
