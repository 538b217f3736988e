"""A card survives the round trip; one that says nonsense is refused with one error."""

import contextlib
import copy
import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli.artifact import METADATA_KEY, SCHEMA, ModelCard, Preprocessing
from segcli.errors import ArtifactError


def parse(raw):
    return ModelCard.parse({METADATA_KEY: json.dumps(raw)}, "model.onnx")


@pytest.fixture
def raw(make_card):
    return json.loads(make_card().to_metadata()[METADATA_KEY])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task": "classification", "palette": (), "activation": "sigmoid"},
        {"task": "features", "class_names": (), "palette": (), "output_names": ("a", "b")},
        {
            "preprocessing": Preprocessing(
                resize="squash",
                size_hw=(512, 1024),
                interpolation="bicubic",
                rescale=None,
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
            )
        },
        {"preprocessing": Preprocessing(resize="shortest_edge", shortest_edge=256, crop_hw=(7, 9))},
        {"class_names": ("Straße", "Mañana, “x”", "日本\u2028"), "license_note": "a\nb"},
        {
            "align_corners": True,
            "ignore_index": -100,
            "reduce_labels": True,
            "storage": "fp16",
            "precision": "int8",
            "folds": ("batch_norm",),
            "verification": {"max_rel_diff": 1e-06, "sizes_hw": [[64, 96]]},
        },
    ],
    ids=lambda changes: "-".join(changes) or "none",
)
def test_a_card_survives_the_round_trip(make_card, changes):
    card = make_card(**changes)
    metadata = card.to_metadata()
    assert list(metadata) == [METADATA_KEY]
    assert ModelCard.parse(metadata, "model.onnx") == card
    assert ModelCard.parse({**metadata, "other": "x"}, "model.onnx") == card


def test_the_same_card_gives_the_same_text(make_card):
    assert make_card().to_metadata() == make_card().to_metadata()
    assert next(iter(make_card().to_dict())) == "schema"
    assert make_card().to_dict()["schema"] == SCHEMA


def test_fields_of_a_later_version_are_skipped(make_card, raw):
    raw["flavour"] = {"any": "thing"}
    raw["preprocessing"]["sharpen"] = True
    assert parse(raw) == make_card()


def test_fields_with_a_default_may_be_missing(make_card, raw):
    for name in (
        "activation",
        "align_corners",
        "ignore_index",
        "reduce_labels",
        "folds",
        "storage",
        "precision",
    ):
        del raw[name]
    assert parse(raw) == make_card()


def test_a_file_without_a_card():
    with pytest.raises(ArtifactError, match=r"'model\.onnx' carries no ModelCard") as caught:
        ModelCard.parse({"other": "x"}, "model.onnx")
    assert caught.value.hint == "write the file with 'segcli export'"


@pytest.mark.parametrize(
    "text",
    ["", "{", "nonsense", "[1]", "null", "5", '"text"', "{}", "[" * 100_000, '{"schema": 1', "{]"],
    ids=lambda text: text[:12],
)
def test_text_that_is_no_card(text):
    with pytest.raises(ArtifactError, match="not readable JSON"):
        ModelCard.parse({METADATA_KEY: text}, "model.onnx")


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "1", None, [1], 1.5])
def test_another_schema_says_so(raw, schema):
    raw["schema"] = schema
    seen = re.escape(f"has schema {schema!r}, this segcli reads {SCHEMA}")
    with pytest.raises(ArtifactError, match=seen) as caught:
        parse(raw)
    assert "update segcli" in caught.value.hint


REQUIRED = [
    *("name", "task", "family", "variant", "class_names", "palette", "preprocessing", "source"),
    *("weights_sha256", "license", "opset", "versions", "verification"),
]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_refused(raw, name):
    del raw[name]
    with pytest.raises(ArtifactError, match=r"the ModelCard of 'model\.onnx' is not valid"):
        parse(raw)


NONSENSE = [None, 5, 5.5, True, "text", "", [], [1, 2], {}, {"a": 1}, [None], [[1, 2]], [["a"] * 3]]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelCard)])
@pytest.mark.parametrize("value", NONSENSE, ids=str)
def test_a_field_of_any_type_is_read_or_refused(raw, field, value):
    """Whatever stands in a field: a card whose fields have their types, or an ArtifactError."""
    raw[field] = value
    try:
        card = parse(raw)
    except ArtifactError:
        return
    default = {f.name: f.type for f in dataclasses.fields(ModelCard)}[field]
    found = getattr(card, field)
    assert type(found) in {
        "task": (str,),
        "activation": (str,),
        "storage": (str,),
        "precision": (str,),
        "opset": (int,),
        "ignore_index": (int,),
        "align_corners": (bool,),
        "reduce_labels": (bool,),
        "versions": (dict,),
        "verification": (dict,),
        "preprocessing": (Preprocessing,),
        **dict.fromkeys(("class_names", "output_names", "folds", "palette"), (tuple,)),
    }.get(field, (str,)), default
    assert card.to_dict()  # and can be written again


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Preprocessing)])
@pytest.mark.parametrize(
    "value",
    [*NONSENSE, [0, 5], [-1, 5], [5, 1 << 17], [1, 2, 3], 0, -1, 1 << 17, float("nan"), [0.5] * 4],
    ids=str,
)
def test_preprocessing_of_any_type_is_read_or_refused(raw, field, value):
    raw["preprocessing"] = {
        "resize": "squash",
        "size_hw": [4, 4],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        field: value,
    }
    try:
        record = parse(raw).preprocessing
    except ArtifactError:
        return
    for numbers in (record.size_hw, record.crop_hw):
        assert numbers is None or (len(numbers) == 2 and all(1 <= n <= 1 << 16 for n in numbers))
    for triple in (record.mean, record.std):
        assert triple is None or (len(triple) == 3 and all(v == v for v in triple))
    assert record.rescale is None or record.rescale == record.rescale


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": "detection"}, "unknown task 'detection'"),
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
        ({"class_names": []}, "segmentation model without class names"),
        ({"class_names": ["a"]}, "3 palette colours for 1 classes"),
        ({"palette": []}, "0 palette colours for 3 classes"),
        ({"palette": [[0, 0, 256]] * 3}, r"three values in 0\.\.255"),
        ({"palette": [[0, 0, -1]] * 3}, r"three values in 0\.\.255"),
        ({"palette": [[0, 0]] * 3}, "not valid"),
        ({"palette": [[0, 0, float("inf")]] * 3}, "not valid"),
    ],
    ids=str,
)
def test_fields_that_contradict_each_other(raw, changes, expected):
    with pytest.raises(ArtifactError, match=expected):
        parse({**raw, **changes})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"resize": "stretch"}, "unknown resize mode 'stretch'"),
        ({"resize": "none", "interpolation": "cubic"}, "unknown interpolation 'cubic'"),
        ({"resize": "squash"}, "size_hw and the resize mode 'squash' go together"),
        ({"resize": "none", "size_hw": (4, 4)}, "go together"),
        ({"resize": "shortest_edge"}, "shortest_edge and its resize mode go together"),
        ({"resize": "none", "shortest_edge": 4}, "go together"),
        ({"resize": "none", "mean": (0.5,) * 3}, "mean and std go together"),
        ({"resize": "none", "std": (0.5,) * 3}, "mean and std go together"),
        ({"resize": "none", "mean": (0.5,) * 4, "std": (0.5,) * 4}, "each of R, G and B"),
        ({"resize": "none", "mean": (0.5,) * 3, "std": (0.5, 0.5, 0)}, "std must be positive"),
        ({"resize": "squash", "size_hw": (0, 4)}, "absurd preprocessing size"),
        ({"resize": "squash", "size_hw": (4, (1 << 16) + 1)}, "absurd preprocessing size"),
        ({"resize": "squash", "size_hw": (4.5, 4)}, "absurd preprocessing size"),
        ({"resize": "none", "crop_hw": (4, -4)}, "absurd preprocessing size"),
        ({"resize": "shortest_edge", "shortest_edge": 1 << 20}, "absurd preprocessing size"),
        ({"resize": "shortest_edge", "shortest_edge": 0}, "absurd preprocessing size"),
    ],
    ids=str,
)
def test_preprocessing_that_cannot_be(values, expected):
    with pytest.raises(ArtifactError, match=expected):
        Preprocessing(**values)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = [f.name for f in dataclasses.fields(ModelCard)]
PREPROCESSING = [f.name for f in dataclasses.fields(Preprocessing)]
VALID = {
    "schema": SCHEMA,
    "name": "x",
    "task": "segmentation",
    "family": "segformer",
    "variant": "b0",
    "class_names": ["a"],
    "palette": [[1, 2, 3]],
    "preprocessing": {"resize": "none"},
    "source": "x",
    "weights_sha256": "x",
    "license": "x",
    "opset": 20,
    "versions": {},
    "verification": {},
}


@given(
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3),
    st.dictionaries(st.sampled_from(PREPROCESSING), json_values, max_size=3),
)
def test_nothing_but_an_artifact_error_comes_out(changes, pre):
    raw = copy.deepcopy(VALID)
    raw["preprocessing"].update(pre)
    raw.update(changes)
    with contextlib.suppress(ArtifactError):
        parse(raw)


@given(st.text())
def test_no_text_leads_to_another_error(text):
    with pytest.raises(ArtifactError):
        ModelCard.parse({METADATA_KEY: text}, "model.onnx")
