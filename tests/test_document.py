import json
from importlib.resources import files

import numpy as np
import pytest
from jsonschema import Draft202012Validator, ValidationError
from pycocotools import mask as pycocotools_mask

from segcli.document import segmentation_document
from segcli.results import Segmentation

# pycocotools 2.0.11 decodes into an array of NumPy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = ("sky", "lake", "café", "road")


@pytest.fixture(scope="module")
def check_document():
    text = (files("segcli.data") / "segmentation.schema.json").read_text("utf-8")
    schema = json.loads(text)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema).validate


@pytest.fixture
def segmentation():
    class_map = np.zeros((6, 9), np.uint8)
    class_map[2:, 3:] = 2
    class_map[4, 5] = 1
    image = np.zeros((6, 9, 3), np.uint8)
    return Segmentation(class_map, NAMES, np.zeros((4, 3), np.uint8), image, "CPU")


def masks(document):
    return {
        entry["class_id"]: pycocotools_mask.decode(entry["rle"]) for entry in document["classes"]
    }


@pytest.mark.parametrize("polygons", [False, True])
def test_the_document_is_what_its_schema_says(segmentation, check_document, polygons):
    class_map = segmentation.class_map
    made = segmentation_document(class_map, segmentation.classes, "tiny", polygons=polygons)
    document = json.loads(json.dumps(made, allow_nan=False))
    check_document(document)
    assert document == made
    assert (document["schema"], document["size"], document["model"]) == (1, [6, 9], "tiny")
    assert [
        (c["class_id"], c["name"], c["pixels"], c["fraction"]) for c in document["classes"]
    ] == [
        (0, "sky", 30, 0.555556),
        (2, "café", 23, 0.425926),
        (1, "lake", 1, 0.0185185),
    ]
    for class_id, mask in masks(document).items():
        np.testing.assert_array_equal(mask, class_map == class_id)
    assert all(("polygons" in entry) == polygons for entry in document["classes"])
    if polygons:
        assert document["classes"][2]["polygons"] == [[[5, 4], [6, 4], [6, 5], [5, 5]]]


def test_classes_left_out_are_left_out(segmentation, check_document):
    classes = [share for share in segmentation.classes if share.name == "lake"]
    document = segmentation_document(segmentation.class_map, classes, "tiny", polygons=True)
    check_document(document)
    assert [entry["name"] for entry in document["classes"]] == ["lake"]
    assert masks(document)[1].sum() == 1
    assert segmentation_document(segmentation.class_map, [], "tiny")["classes"] == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("size",), [6]),
        (("schema",), 2),
        (("classes", 0, "pixels"), 0),
        (("classes", 0, "rle", "counts"), "0 1"),
        (("classes", 0, "polygons"), [[[0, 0], [1, 0], [1, 1]]]),
        (("classes", 0, "polygons", 0, 0), [0, 0.5]),
    ],
)
def test_the_schema_refuses_other_documents(segmentation, check_document, place, value):
    document = segmentation_document(
        segmentation.class_map, segmentation.classes, "tiny", polygons=True
    )
    check_document(document)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ValidationError):
        check_document(document)
