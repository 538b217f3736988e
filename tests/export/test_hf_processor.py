"""What we make of a preprocessor_config.json does to a picture what transformers makes of it."""

import json
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import (
    MobileNetV2ImageProcessorPil,
)
from transformers.models.segformer.image_processing_pil_segformer import (
    SegformerImageProcessorPil,
)

from segcli.artifact import Preprocessing
from segcli.errors import CheckpointError
from segcli.export.hf_processor import preprocessing
from segcli.preprocess import preprocess

pytestmark = pytest.mark.export

PROCESSORS = {
    "segformer": SegformerImageProcessorPil,
    "mobilenet_v2": MobileNetV2ImageProcessorPil,
}
FAMILIES = pytest.mark.parametrize("family", PROCESSORS)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def pictures():
    rng = np.random.default_rng(0)
    for height, width in ((90, 61), (37, 120), (30, 30)):
        yield rng.integers(0, 256, (height, width, 3), np.uint8)


def check(raw, family):
    """Compares with the reference on pictures wider, taller and smaller than any size asked for."""
    record, _, notes = preprocessing(raw, family, "classification")
    processor = PROCESSORS[family].from_dict(dict(raw or {}))
    for image in pictures():
        expected = np.asarray(processor(Image.fromarray(image))["pixel_values"][0])
        found = preprocess(image, record)[0]
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    return record, notes


# The vintages of SegFormer's files on the hub: the feature extractor's, the image processor's of
# transformers 4 (with both names of the labels flag), and what transformers 5 writes.
SEGFORMER = [
    {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "SegformerFeatureExtractor",
        **IMAGENET,
        "reduce_labels": True,
        "resample": 2,
        "size": 48,
    },
    {
        "do_normalize": True,
        "do_reduce_labels": False,
        "do_rescale": True,
        "do_resize": True,
        **IMAGENET,
        "image_processor_type": "SegformerImageProcessor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 48, "width": 64},
    },
    {
        "crop_size": None,
        "data_format": "channels_first",
        "default_to_square": True,
        "device": None,
        "disable_grouping": None,
        "do_center_crop": None,
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pad": None,
        "do_reduce_labels": True,
        "do_rescale": True,
        "do_resize": True,
        **IMAGENET,
        "image_processor_type": "SegformerImageProcessorFast",
        "input_data_format": None,
        "pad_size": None,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "return_tensors": None,
        "size": {"height": 40, "width": 40},
    },
]
MOBILENET = [
    {
        "crop_size": {"height": 40, "width": 40},
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        **HALF,
        "image_processor_type": "MobileNetV2ImageProcessor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 48},
    },
    {
        "crop_size": 40,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "MobileNetV2FeatureExtractor",
        **HALF,
        "resample": 2,
        "size": 48,
    },
]


@pytest.mark.parametrize(
    ("family", "raw"),
    [("segformer", raw) for raw in SEGFORMER] + [("mobilenet_v2", raw) for raw in MOBILENET],
)
def test_every_vintage_does_what_transformers_does(family, raw):
    _, notes = check(raw, family)
    assert notes == []


@FAMILIES
def test_what_transformers_writes_today_is_read(family, tmp_path):
    PROCESSORS[family]().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "preprocessor_config.json").read_text())
    _, notes = check(raw, family)
    assert notes == []


@FAMILIES
def test_a_missing_file_means_the_processor_s_defaults(family):
    record, notes = check(None, family)
    assert notes == ["no preprocessor_config.json: the processor's defaults are used"]
    assert record == check({}, family)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"size": 48},
        {"size": 48, "default_to_square": False},
        {"size": 48, "default_to_square": True},
        {"size": {"height": 33, "width": 70}},
        {"size": [33, 70]},
        {"size": {"shortest_edge": 45}},
        {"do_resize": False},
        {"do_resize": None},
        {"do_rescale": False},
        {"do_rescale": None},
        {"do_rescale": False, "do_normalize": False},
        {"do_normalize": False},
        {"do_normalize": None},
        {"do_center_crop": False},
        {"do_center_crop": None},
        {"do_center_crop": True, "crop_size": 35},
        {"do_center_crop": True, "crop_size": {"height": 64, "width": 33}},
        {"rescale_factor": 1 / 127.5},
        {"rescale_factor": 2},
        {"image_mean": 0.25},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 0.5, 2]},
        *({"resample": number} for number in range(6)),
    ],
    ids=str,
)
@FAMILIES
def test_each_field_does_what_it_does_in_transformers(family, change):
    base = {"size": {"height": 48, "width": 56}}
    if family == "mobilenet_v2":
        base = {"size": {"shortest_edge": 48}, "crop_size": 40}
    check({**base, **change}, family)


def test_segformer_s_processor_never_crops():
    raw = {"size": 48, "do_center_crop": True, "crop_size": 32}
    record, notes = check(raw, "segformer")
    assert record.crop_hw is None
    assert notes == ["do_center_crop has no effect: SegFormer's processor never crops"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"reduce_labels": True}, True),
        ({"do_reduce_labels": True}, True),
        ({"do_reduce_labels": False, "reduce_labels": True}, False),
        ({"reduce_labels": False}, False),
        ({"do_reduce_labels": None}, False),
        ({}, False),
        (None, False),
    ],
)
@FAMILIES
def test_reduce_labels_under_both_its_names(family, raw, expected):
    record, reduce_labels, _ = preprocessing(raw, family, "segmentation")
    assert reduce_labels is expected
    # It is about ground truth: pictures are prepared as without it.
    assert record == preprocessing({}, family, "segmentation")[0]


def test_a_segmenter_sees_the_whole_picture():
    record, _, notes = preprocessing(
        {"size": {"shortest_edge": 545}, "crop_size": {"height": 513, "width": 513}},
        "mobilenet_v2",
        "segmentation",
    )
    assert record == Preprocessing(
        resize="shortest_edge", shortest_edge=545, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    assert notes == ["the processor's centre crop is left out: a mask covers the whole picture"]


BAD = [
    *(
        (name, value)
        for name in (
            *("do_resize", "do_rescale", "do_normalize"),
            *("do_reduce_labels", "reduce_labels", "default_to_square"),
        )
        for value in (1, "true", [])
    ),
    *(
        ("size", value)
        for value in (
            *(None, 0, -1, True, 3.5, "512", [512], [1, 2, 3], 1 << 20, {}),
            *({"height": 5}, {"height": 5, "width": 0}, {"shortest_edge": 5, "longest_edge": 9}),
            *({"longest_edge": 9}, {"max_height": 5, "max_width": 5}, {"shortest_edge": "5"}),
        )
    ),
    *(("resample", value) for value in (None, -1, 6, 2.0, True, "bilinear")),
    *(("rescale_factor", value) for value in (None, 0, -1.0, True, "1/255", float("nan"))),
    *(
        (name, value)
        for name in ("image_mean", "image_std")
        for value in (
            None,
            "0.5",
            True,
            [0.5],
            [0.5] * 4,
            [0.5, 0.5, "0.5"],
            [0.5, 0.5, None],
            [0.5, 0.5, float("inf")],
        )
    ),
    *(
        ("image_std", value)
        for value in (0, [0.5, 0.5, 0], [0.5, 0.5, -1], [0.5, 0.5, float("nan")])
    ),
    ("do_pad", True),
    ("pad_size", {"height": 5, "width": 5}),
    ("size_divisor", 32),
    ("do_flip_channel_order", True),
    ("crop_pct", 0.875),
]


@FAMILIES
@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_that_cannot_be_honoured_is_named(family, name, value):
    seen = re.escape(f"preprocessor_config.json says {name} {value!r}, expected")
    with pytest.raises(CheckpointError, match=seen):
        preprocessing({name: value}, family, "classification")


@pytest.mark.parametrize("value", [None, 0, -5, "224", 2.5, [1], {"shortest_edge": 5}, {}, True])
def test_a_bad_crop_size_is_named(value):
    with pytest.raises(CheckpointError, match="says crop_size"):
        preprocessing({"crop_size": value}, "mobilenet_v2", "classification")
    with pytest.raises(CheckpointError, match="says do_center_crop 'yes', expected true or false"):
        preprocessing({"do_center_crop": "yes"}, "mobilenet_v2", "classification")


@FAMILIES
def test_an_unknown_field_is_noted(family):
    record, _, notes = preprocessing({"do_dance": True}, family, "classification")
    assert notes == ["preprocessor_config.json says 'do_dance', which is no known field: not used"]
    assert record == preprocessing({}, family, "classification")[0]
