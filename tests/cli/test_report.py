"""``--report``: what the page of a run holds; tests/test_report_browser.py opens one."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NOTES = "<!DOCTYPE html>\n<title>my notes</title>"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tree(picture):
    for i in range(4):
        picture(f"in/{i}.png", (60 + i, 40), 20 + 5 * i)
    Path("in/bad.png").write_bytes(b"damaged")


def page(path="r.html"):
    return html.unescape(Path(path).read_text("utf-8"))


def test_segment(segcli, tiny_model, tree):
    model = tiny_model()
    ran = segcli("segment", "-m", model, "in", "-o", "out", "--report", "r.html", "--jsonl")
    assert ran.code == 1
    shown = page()
    for i in range(4):
        assert f"in/{i}.png" in shown
    assert "in/bad.png" in shown
    assert "not an image" in shown
    assert "CPUExecutionProvider" in shown
    # The pictures are in the page, and nothing is loaded from elsewhere.
    assert shown.count("data:image/jpeg") == 4
    assert not re.search(r'(src|href)="https?:', shown)
    # The records are as without it.
    records = ran.out
    again = segcli("segment", "-m", model, "in", "-o", "out", "--jsonl").out
    strip = [
        {k: v for k, v in json.loads(r).items() if k != "elapsed_ms"} for r in records.splitlines()
    ]
    assert strip == [
        {k: v for k, v in json.loads(r).items() if k != "elapsed_ms"} for r in again.splitlines()
    ]


def test_confidence_needs_no_file_of_it(segcli, tiny_model, picture):
    for i in range(3):
        picture(f"in/{i}.png", (60, 40), 10 + 15 * i)
    model = tiny_model()
    said = []
    for more in ((), ("-f", "mask", "-f", "confidence"), ("--mask-size", "logits")):
        for old in Path("out").glob("*"):
            old.unlink()
        args = ("segment", "-m", model, "in", "-o", "out", "--report", "r.html", *more)
        assert segcli(*args).code == 0
        said.append([float(c) for c in re.findall(r"<span>confidence ([0-9.]+)<", page())])
    on_grid, on_pixels, at_logits = said
    assert len(on_grid) == 3
    # Both are means of the same field, on two grids.
    np.testing.assert_allclose(on_grid, on_pixels, atol=0.05)
    assert at_logits == on_grid


def test_names_are_data(segcli, tiny_model, picture):
    picture("in/<script>alert(1)<&.png", (60, 40), 20)
    model = tiny_model(class_names=("red</script><b>", "green", "blue"))
    assert segcli("segment", "-m", model, "in", "-o", "out", "--report", "r.html").code == 0
    text = Path("r.html").read_text("utf-8")
    assert "<script>alert(1)" not in text
    assert "</script><b>" not in text


def test_classify(segcli, tiny_model, tree):
    model = tiny_model("c.onnx", task="classification", palette=())
    ran = segcli("classify", "-m", model, "in", "--report", "r.html")
    assert ran.code == 1
    shown = page()
    assert shown.count("data:image/jpeg") == 4
    assert "in/3.png" in shown


def test_eval(segcli, tiny_model, tree):
    Path("gt").mkdir()
    for i in range(4):
        truth = np.full((40, 60 + i), 2, np.uint8)
        truth[:, : 20 + 5 * i] = 0
        truth[0] = 255
        Image.fromarray(truth).save(f"gt/{i}.png")
    args = ("eval", "-m", tiny_model(), "in", "--truth", "gt", "--report", "r.html", "--json")
    ran = segcli(*args)
    assert ran.code == 1
    found = json.loads(ran.out)
    assert (found["images"], found["failed"]) == (4, 1)
    shown = page()
    assert shown.count("data:image/jpeg") == 4
    assert "in/bad.png" in shown
    assert segcli(*args, "--state", "s.json").code == 2


def test_a_run_that_is_refused_leaves_the_page_that_was_there(segcli, tiny_model, tree):
    model = tiny_model()
    segcli("segment", "-m", model, "in", "-o", "out", "--report", "r.html")
    before = Path("r.html").read_bytes()
    assert segcli("segment", "-m", model, "none", "-o", "out", "--report", "r.html").code == 2
    assert Path("r.html").read_bytes() == before
    assert segcli("segment", "-m", model, "in", "-o", "out", "--report", "r.html").code == 1


@pytest.mark.parametrize(
    ("path", "code", "says"),
    [
        ("r.txt", 2, "ends in .html"),
        ("in/0.png", 2, "ends in .html"),
        ("in/0.png/r.html", 5, "is not a folder"),
        ("other.html", 2, "is there and is not a report"),
    ],
)
def test_places(segcli, tiny_model, tree, path, code, says):
    Path("other.html").write_text(NOTES)
    ran = segcli("segment", "-m", tiny_model(), "in", "-o", "out", "--report", path)
    assert (ran.code, ran.out) == (code, "")
    assert says in ran.err
    assert Path("other.html").read_text() == NOTES
    assert not Path("out").exists()
