import csv
import io
import json
import math
import os
import pty
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def classifier(tiny_model):
    """Makes a classifier whose logits are the mean red, green and blue."""
    return lambda name="c.onnx", **more: tiny_model(name, task="classification", palette=(), **more)


@pytest.fixture
def classify(segcli, classifier):
    model = classifier()
    return lambda *args, **more: segcli("classify", "-m", model, *args, **more)


def lines(ran):
    return [line.split("\t") for line in ran.out.splitlines()]


def test_lines_best_first(classify, picture):
    ran = classify(picture(size_wh=(8, 4), split=6).name)
    assert (ran.code, ran.err) == (0, "")
    assert [line[:2] for line in lines(ran)] == [
        ["a.png", "red"],
        ["a.png", "blue"],
        ["a.png", "green"],
    ]
    scores = [float(line[2]) for line in lines(ran)]
    powers = [math.exp(v) for v in (0.75, 0.25, 0.0)]
    assert scores == pytest.approx([p / sum(powers) for p in powers], rel=1e-5)


def test_ties_by_class_id(classify, picture):
    found = lines(classify(picture(size_wh=(8, 4), split=0)))  # all blue
    assert [line[1] for line in found] == ["blue", "red", "green"]


@pytest.mark.parametrize(("k", "count"), [(1, 1), (2, 2), (3, 3), (50, 3)])
def test_top_k(classify, picture, k, count):
    assert len(lines(classify(picture(), "-k", k))) == count


@pytest.mark.parametrize("k", ["0", "-1", "x"])
def test_bad_k(classify, picture, k):
    assert classify(picture(), f"--top-k={k}").code == 2


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("identity", [0.75, 0.25, 0.0]),
        ("sigmoid", [1 / (1 + math.exp(-v)) for v in (0.75, 0.25, 0)]),
    ],
)
def test_activations(segcli, classifier, picture, activation, expected):
    ran = segcli(
        "classify", "-m", classifier(activation=activation), picture(size_wh=(8, 4), split=6)
    )
    assert [float(line[2]) for line in lines(ran)] == pytest.approx(expected, rel=1e-5)


def test_csv(classify, picture):
    ran = classify(picture('odd,"name.png').name, "--csv", "-k", "2")
    rows = list(csv.reader(io.StringIO(ran.out)))
    assert rows[0] == ["path", "rank", "class_id", "label", "score"]
    assert [row[:4] for row in rows[1:]] == [
        ['odd,"name.png', "1", "0", "red"],
        ['odd,"name.png', "2", "2", "blue"],
    ]


@pytest.mark.parametrize("flag", ["--json", "--jsonl"])
def test_csv_and_records(classify, picture, flag):
    assert classify(picture(), "--csv", flag).code == 2


def test_records(classify, picture, check_record):
    args = (picture().name, "none.png", "-k", "2", "--no-timing")
    ran = classify(*args, "--jsonl")
    assert ran.code == 1
    first, second = (json.loads(line) for line in ran.out.splitlines())
    check_record(first)
    check_record(second)
    assert [label["name"] for label in first["labels"]] == ["red", "blue"]
    assert set(first) == {
        "schema",
        "path",
        "status",
        "model",
        "provider",
        "width",
        "height",
        "labels",
    }
    assert second["error"]["code"] == "missing"
    assert json.loads(classify(*args, "--json").out) == [first, second]


def test_folder_and_workers(classify, picture):
    for i in range(9):
        picture(f"in/{i}.png", (8, 6), i % 8)
    runs = {classify("in", "--jsonl", "--no-timing", "--workers", n).out for n in (1, 4)}
    assert len(runs) == 1
    assert len(runs.pop().splitlines()) == 9


def test_stdin(classify, picture):
    ran = classify("-", "-k", "1", stdin=picture().read_bytes())
    assert lines(ran)[0][:2] == ["-", "red"]


def test_no_classifier_here(segcli, picture):
    ran = segcli("classify", picture())
    assert ran.code == 3
    assert "no classifier is on this machine" in ran.err
    assert "classify -m mobilenet-v2" in ran.err


def test_first_classifier_here_is_the_default(segcli, classifier, picture, cached_model):
    cached_model("own-classifier", classifier(), task="classification")
    ran = segcli("classify", picture(), "--registry", "own.yaml", "--jsonl")
    assert ran.code == 0
    assert json.loads(ran.out)["labels"][0]["name"] == "red"


def test_segmentation_model_names_the_right_command(segcli, tiny_model, picture):
    for model in (tiny_model(), "segformer-b0-camvid"):
        ran = segcli("classify", "-m", model, picture())
        assert (ran.code, ran.out) == (2, "")
        assert "segcli segment" in ran.err


def test_nothing_exists(classify):
    assert classify("none.png").code == 2


def test_table_on_a_terminal(command, picture, classifier):
    main, other = pty.openpty()
    try:
        subprocess.run(
            [*command, "classify", "-m", str(classifier()), picture().name, "-k", "1"],
            stdout=other,
            stderr=subprocess.PIPE,
            timeout=60,
            check=True,
            env={**os.environ, "NO_COLOR": "1"},
        )
        shown = os.read(main, 4096).decode()
    finally:
        os.close(other)
        os.close(main)
    assert "a.png" in shown
    assert "%  red" in shown
    assert "\t" not in shown


def test_names_that_are_not_utf8(segcli_process, classifier, picture):
    name = b"caf\xe9.png"
    try:
        Path(os.fsdecode(name)).write_bytes(picture().read_bytes())
    except OSError:
        pytest.skip("the file system refuses such names")
    for flags in ([], ["--csv"]):
        done = segcli_process("classify", "-m", classifier(), name, "-k", "1", *flags)
        assert done.returncode == 0
        assert name in done.stdout
