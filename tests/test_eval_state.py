import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli.errors import OutputError, TruthError, UsageError
from segcli.eval_state import EvalState, csv_header, csv_row

IDENTITY = {"model_sha256": "ab" * 32, "truth": "gt/", "split": None, "ignore_index": 255}


def matrix(seed, num_classes):
    return np.random.default_rng(seed).integers(0, 2**40, (num_classes, num_classes))


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 6), st.integers(0, 6))
def test_an_interrupted_run_counts_as_one_run(tmp_path_factory, seed, num_classes, images, cut):
    path = str(tmp_path_factory.mktemp("state") / "state.json")
    whole = EvalState(IDENTITY, num_classes)
    parts = EvalState.load(path, IDENTITY, num_classes)
    for i in range(images):
        counted = {"confusion": matrix(seed + i, num_classes), "rank": i, "loss_sum": 0.1 * i}
        whole.add(f"{i}.jpg", {"pixels": i, "miou": None}, **counted)
        parts.add(f"{i}.jpg", {"pixels": i, "miou": None}, **counted)
        if i == cut:
            parts.save(path)
            parts = EvalState.load(path, IDENTITY, num_classes)
    np.testing.assert_array_equal(parts.confusion, whole.confusion)
    assert parts.confusion.dtype == np.int64
    assert (parts.hits, parts.loss_sum) == (whole.hits, whole.loss_sum)
    assert list(parts.images.items()) == list(whole.images.items())


def test_names_that_are_not_utf8_come_back(tmp_path):
    path, name = str(tmp_path / "s.json"), "caf\udce9.jpg"
    state = EvalState(IDENTITY, 2)
    state.add(name, {"pixels": 1})
    state.save(path)
    assert list(EvalState.load(path, IDENTITY, 2).images) == [name]


def test_a_state_of_another_run_is_refused(tmp_path):
    path = str(tmp_path / "s.json")
    EvalState(IDENTITY, 3).save(path)
    before = Path(path).read_bytes()
    others = {
        "model_sha256": {**IDENTITY, "model_sha256": "cd" * 32},
        "truth": {**IDENTITY, "truth": "other/"},
        "ignore_index": {**IDENTITY, "ignore_index": None},
        "resize": {**IDENTITY, "resize": None},
        "split": {k: v for k, v in IDENTITY.items() if k != "split"},
    }
    for key, identity in others.items():
        with pytest.raises(UsageError, match=rf"s\.json' is of another run: its {key} is "):
            EvalState.load(path, identity, 3)
    with pytest.raises(UsageError, match="its num_classes is 3, this run's 4"):
        EvalState.load(path, IDENTITY, 4)
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: b"[1, 2]",
        lambda raw: b"\xff\xfe",
        lambda raw: json.dumps({**raw, "confusion": [[9, 0, 1]]}).encode(),
        lambda raw: json.dumps({**raw, "confusion": [[-1, 0, 1]]}).encode(),
        lambda raw: json.dumps({**raw, "hits": [1, 2, 3, 4]}).encode(),
        lambda raw: json.dumps({k: v for k, v in raw.items() if k != "images"}).encode(),
    ],
)
def test_what_is_no_state_is_refused(tmp_path, damage):
    path = tmp_path / "s.json"
    EvalState(IDENTITY, 2).save(str(path))
    path.write_bytes(damage(json.loads(path.read_bytes())))
    with pytest.raises(UsageError, match=r"s\.json' is no state of an evaluation") as caught:
        EvalState.load(str(path), IDENTITY, 2)
    assert "remove this one" in caught.value.hint


def test_an_image_counts_once():
    state = EvalState(IDENTITY, 2)
    state.add("a.jpg", {}, confusion=np.eye(2, dtype=np.int64))
    with pytest.raises(ValueError, match=r"'a\.jpg' is counted already"):
        state.add("a.jpg", {}, confusion=np.eye(2, dtype=np.int64))
    assert state.confusion.sum() == 2


def test_a_state_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        EvalState(IDENTITY, 2).save(str(tmp_path / "file/s.json"))
    with pytest.raises(UsageError, match="cannot read the state"):
        EvalState.load(str(tmp_path), IDENTITY, 2)


@pytest.mark.parametrize(
    ("task", "figures", "expected"),
    [
        (
            "segmentation",
            {"pixels": 12, "miou": 0.123456789, "pixel_accuracy": 1.0, "loss": None},
            {"pixels": "12", "miou": "0.123457", "pixel_accuracy": "1", "loss": ""},
        ),
        (
            "classification",
            {"class_id": 7, "name": 'cock, "rooster"', "rank": 0},
            {"class_id": "7", "name": 'cock, "rooster"', "rank": "0", "predicted_id": ""},
        ),
    ],
)
def test_the_table_of_images_is_csv(task, figures, expected):
    error = TruthError("no truth for 'b.jpg'")
    text = csv_header(task) + csv_row(task, "a,b.jpg", figures) + csv_row(task, "b.jpg", error)
    good, bad = csv.DictReader(io.StringIO(text))
    assert {**good, **expected} == good
    assert (good["path"], good["status"], good["error"]) == ("a,b.jpg", "ok", "")
    assert (bad["path"], bad["status"], bad["error"]) == ("b.jpg", "error", str(error))
    assert None not in good
    assert None not in bad
