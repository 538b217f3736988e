import json
import os
from dataclasses import replace

import numpy as np
import pytest

from segcli.errors import ImageDecodeError, ImageError, ImageMissing, OutputExists
from segcli.results import ClassShare, Label, Outcome, Segmentation

OK = Outcome(
    "a.png",
    "ok",
    "tiny",
    "CPUExecutionProvider",
    outputs=("out/a.png",),
    size_hw=(6, 9),
    classes=[ClassShare(0, "red", 36, 2 / 3), ClassShare(2, "blue", 18, 1 / 3)],
    elapsed_ms=1.23456789,
)
LABELS = Outcome(
    "a.png", "ok", "tiny", "CPU", size_hw=(6, 9), labels=[Label(0, "x", 1 / 3)], elapsed_ms=2.0
)
ERROR = Outcome("a.png", "error", "tiny", "CPU", error=ImageMissing("cannot read 'a.png'"))
SKIPPED = Outcome("a.png", "skipped", "tiny", "CPU", outputs=("out/a.png",))


def make(class_map, names=("a", "b", "c", "d")):
    class_map = np.array(class_map)
    return Segmentation(
        class_map.astype(np.uint8),
        names,
        np.zeros((len(names), 3), np.uint8),
        np.zeros((*class_map.shape, 3), np.uint8),
        "CPU",
    )


@pytest.mark.parametrize("outcome", [OK, LABELS, ERROR, SKIPPED])
@pytest.mark.parametrize("timing", [True, False])
def test_records_fit_the_schema(outcome, timing, check_record):
    check_record(json.loads(outcome.to_json(timing=timing)))


def test_schema_refuses(check_record):
    from jsonschema import ValidationError

    good = OK.to_dict()
    for bad in (
        {**good, "schema": 2},
        {**good, "status": "fine"},
        {k: v for k, v in good.items() if k != "classes"},
        {k: v for k, v in good.items() if k != "height"},
        {**good, "error": {"code": "missing", "message": "x"}},
        {**good, "labels": []},
        {**ERROR.to_dict(), "error": {"code": "other", "message": "x"}},
        {**ERROR.to_dict(), "status": "ok"},
    ):
        with pytest.raises(ValidationError):
            check_record(bad)


def test_schema_knows_every_error_code(check_record):
    codes = [kind.code for kind in ImageError.__subclasses__()]
    assert len(set(codes)) == len(codes) == 8
    for kind in ImageError.__subclasses__():
        check_record(replace(ERROR, error=kind("x")).to_dict())


def test_figures_have_six_digits():
    record = OK.to_dict()
    assert [c["fraction"] for c in record["classes"]] == [0.666667, 0.333333]
    assert record["elapsed_ms"] == 1.235
    small = replace(LABELS, labels=[Label(0, "x", 1.23456789e-9)]).to_dict()
    assert small["labels"][0]["score"] == 1.23457e-9


def test_no_timing():
    assert "elapsed_ms" not in OK.to_dict(timing=False)
    assert OK.to_json(timing=False) == replace(OK, elapsed_ms=7.0).to_json(timing=False)


def test_width_before_height():
    record = OK.to_dict()
    assert (record["width"], record["height"]) == (9, 6)


def test_keys_of_each_kind():
    always = ["schema", "path", "status", "model", "provider"]
    assert list(OK.to_dict(timing=False)) == [*always, "width", "height", "outputs", "classes"]
    assert list(LABELS.to_dict(timing=False)) == [*always, "width", "height", "labels"]
    assert list(ERROR.to_dict()) == [*always, "error"]
    assert list(SKIPPED.to_dict()) == [*always, "outputs"]


def test_error_record():
    error = OutputExists("'x' exists", hint="a hint is for people")
    assert replace(ERROR, error=error).to_dict()["error"] == {
        "code": "exists",
        "message": "'x' exists",
    }
    assert ImageDecodeError("x").code == "decode"


def test_one_line_of_ascii():
    text = replace(OK, path="b\u00f6se\n\u2028name", model="\U0001f600").to_json()
    assert text.isascii()
    assert "\n" not in text
    assert json.loads(text)["path"] == "b\u00f6se\n\u2028name"


def test_undecodable_names_keep_their_bytes():
    path = os.fsdecode(b"caf\xe9.png")
    text = replace(OK, path=path).to_json()
    assert r'"caf\udce9.png"' in text
    assert os.fsencode(json.loads(text)["path"]) == b"caf\xe9.png"


def test_not_a_number_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        replace(LABELS, labels=[Label(0, "x", float("nan"))]).to_json()


def test_classes_largest_first_ties_by_id():
    result = make([[3, 3, 1, 1], [0, 3, 1, 3]])
    assert [(c.class_id, c.pixels) for c in result.classes] == [(3, 4), (1, 3), (0, 1)]
    result = make([[3, 1], [1, 3]])
    assert [c.class_id for c in result.classes] == [1, 3]
    assert sum(c.fraction for c in result.classes) == 1
    for share in result.classes:
        assert [type(v) for v in share] == [int, str, int, float]


def test_frozen():
    with pytest.raises(AttributeError):
        OK.path = "b"
