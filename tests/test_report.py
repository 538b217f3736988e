"""The page as a parser sees it; what a browser does with it is in test_report_browser."""

import base64
import hashlib
import io
import json
import re
import tracemalloc
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from segcli.artifact import Preprocessing
from segcli.errors import OutputWriteError
from segcli.evaluate import figures
from segcli.protocol import Protocol
from segcli.report import Report

VOID = {"meta", "link", "img", "input", "br"}
BAD_NAME = "a/</script><script>alert(1)</script>\udcff\x1b'\"&<b>.jpg"


class Page(HTMLParser):
    """What stands in a page: tags with their attributes, and the text of each element."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for tag, attrs in self.open:
            self.texts.append((tag, attrs, data))

    def all(self, tag, cls=None):
        return [a for t, a in self.tags if t == tag and (not cls or cls in a.get("class", ""))]

    def text(self, tag, **wanted):
        return "".join(
            data
            for t, attrs, data in self.texts
            if t == tag and all(attrs.get(k.rstrip("_")) == v for k, v in wanted.items())
        )


def record(path, counts=(6, 4, 2), **more):
    total = sum(counts)
    names = ("red", "green", "blue")
    return {
        "schema": 1,
        "path": path,
        "status": "ok",
        "model": "tiny",
        "provider": "CPUExecutionProvider",
        "width": 40,
        "height": 30,
        "outputs": [],
        "classes": [
            {"class_id": i, "name": names[i], "pixels": n, "fraction": n / total}
            for i, n in sorted(enumerate(counts), key=lambda c: -c[1])
            if n
        ],
        **more,
    }


def failure(path, message="truncated JPEG"):
    return {"path": path, "status": "error", "error": {"code": "decode", "message": message}}


THUMBNAIL = np.full((30, 40, 3), 99, np.uint8)
IDS = np.arange(1200, dtype=np.uint8).reshape(30, 40) % 3


@pytest.fixture
def write(tmp_path, make_card):
    """Writes a report with what the caller adds; returns its text and its parsed form."""

    def make(add, kind="segment", summary=None, name="report.html", **changes):
        path = tmp_path / name
        card = make_card(**changes)
        with Report(str(path), kind, card, "CPUExecutionProvider", "segcli segment a/") as report:
            add(report)
            report.close(summary or {})
        text = path.read_text("utf-8")
        return text, Page(text)

    return make


def ids_of(uri):
    kind, _, data = uri.partition(";base64,")
    assert kind == "data:image/png"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_segmentation(write):
    def add(report):
        report.add_segmentation(record("a.jpg", elapsed_ms=12.4), THUMBNAIL, IDS, 0.75)
        report.add_segmentation(record("b.jpg", (0, 12, 0)), THUMBNAIL, IDS)

    text, page = write(add, summary={"seconds": 1.5})
    first, second = (json.loads(a["data-entry"]) for a in page.all("article"))
    assert first == {
        "confidence": 0.75,
        "ms": 12.4,
        "shares": [[0, 0.5], [1, 0.333333], [2, 0.166667]],
    }
    assert second == {"shares": [[1, 1.0]]}
    assert [(ids_of(c["data-ids"]) == IDS).all() for c in page.all("canvas")] == [True, True]
    assert page.text("ul", class_="legend").split("\n") == (
        ["", "green66.7 %", "red25.0 %", "blue8.3 %", ""]
    )
    assert [a["value"] for a in page.all("input", "toggle")] == ["1", "0", "2"]
    data = json.loads(page.text("script", type="application/json"))
    assert data == {"colors": [[1, 0, 200, 0], [0, 200, 0, 0], [2, 0, 0, 200]], "wide": False}
    facts = page.text("p", class_="facts").split("\n")
    assert {"40 \N{MULTIPLICATION SIGN} 30", "confidence 0.750", "12 ms"} <= set(facts)
    assert "#00c800" in text


def test_header_is_the_model_card(write):
    text, page = write(
        lambda report: None,
        license_note="not for <sale>",
        source="hub/someone",
        revision="0123abc",
        preprocessing=Preprocessing(
            resize="shortest_edge",
            shortest_edge=256,
            crop_hw=(224, 224),
            mean=(0.5,) * 3,
            std=(1,) * 3,
        ),
        summary={"seconds": 1.5, "miou": 0.25, "protocol": asdict(Protocol(scales=(0.5, 1.0)))},
    )
    shown = page.text("dd")
    for part in (
        *("hub/someone", "0123abc", "0" * 64, "MIT: not for <sale>", "CPUExecutionProvider"),
        *("segcli segment a/", "shorter side to 256, bilinear", "centre crop (224, 224)"),
        *("mean 0.5 0.5 0.5, std 1 1 1", "red, green, blue", "1.5", "0.25", "resize model"),
    ):
        assert part in shown
    assert "resize model, scales 0.5, 1" in shown
    for absent in ("tile", "overlap", "flip"):
        assert absent not in shown
    assert "not for <sale>" not in text


def test_names_are_text_wherever_they_stand(write):
    def add(report):
        bad = record(BAD_NAME)
        bad["classes"][0]["name"] = "<img src=x onerror=alert(2)>"
        report.add_segmentation(bad, THUMBNAIL, IDS)
        report.add_failure(failure(BAD_NAME, "<script>alert(3)</script>"))

    names = ("</script><b>", "{{ 7*7 }}", "<!--")
    _, page = write(add, class_names=names, name="tïny.html", source="<iframe>")
    assert len(page.all("script")) == 2
    assert not page.all("b")
    assert not page.all("iframe")
    assert [a for a in page.all("img") if "onerror" in a or a["src"] == "x"] == []
    shown = "a/</script><script>alert(1)</script>\N{REPLACEMENT CHARACTER}␛'\"&<b>.jpg"
    assert page.text("h3") == shown
    assert shown in page.text("section", id="failures")
    assert "<script>alert(3)</script>" in page.text("section", id="failures")
    assert "</script><b>" in page.text("ul", class_="legend")
    assert "{{ 7*7 }}" in page.text("ul", class_="legend")
    assert "49" not in page.text("ul", class_="legend")


def test_nothing_is_loaded_and_only_our_script_runs(write):
    text, page = write(
        lambda r: r.add_segmentation(record("http://example.org/x.jpg"), THUMBNAIL, IDS),
        license_note="see https://example.org/licence",
        revision="https://example.org",
    )
    for _, attrs in page.tags:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            assert attrs.get(name, "data:").startswith(("data:", "#"))
        assert not [name for name in attrs if name.startswith("on")]
    style = page.text("style")
    assert "url(" not in style
    assert "@import" not in style
    [policy] = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "http" not in script


def test_failures(write):
    def add(report):
        report.add_failure(failure("x.jpg", "one"))
        report.add_failure(failure("y.jpg", "two"))

    _, page = write(add)
    assert page.text("tbody").split() == ["x.jpgdecodeone", "y.jpgdecodetwo"]
    assert page.text("a", href="#failures") == "2 failed"
    _, page = write(lambda report: None)
    assert not [a for a in page.all("section") if a.get("id") == "failures"]


def test_classification(write):
    labels = [
        {"class_id": 2, "name": "blue", "score": 0.75},
        {"class_id": 0, "name": "red", "score": 0.2},
    ]
    one = {"path": "a.jpg", "width": 4, "height": 3, "labels": labels, "elapsed_ms": 3.0}
    text, page = write(
        lambda r: r.add_classification(one, THUMBNAIL),
        "classify",
        task="classification",
        palette=(),
    )
    [data] = (json.loads(a["data-entry"]) for a in page.all("article"))
    assert data == {"confidence": 0.75, "ms": 3.0, "shares": [[2, 0.75], [0, 0.2]]}
    assert page.text("table", class_="shares").split() == ["blue0.7500", "red0.2000"]
    assert "width:75.00%" in text
    assert not page.all("canvas")
    assert not page.all("input", "toggle")
    assert page.text("ul", class_="legend").split() == ["blue100.0", "%"]


def test_evaluation(write):
    confusion = np.array([[3, 1, 0], [0, 8, 0], [0, 0, 0]], np.int64)
    truth = IDS.copy()
    truth[:3] = 255
    one = {"pixels": 12, "miou": 0.625, "pixel_accuracy": 0.75, "loss": None}
    summary = {"schema": 1, "images": 1, **figures(confusion, ("red", "green", "blue"))}
    _, page = write(
        lambda r: r.add_evaluation("a.jpg", one, THUMBNAIL, truth, IDS),
        "eval",
        summary={**summary, "confusion": confusion.tolist()},
    )
    [data] = (json.loads(a["data-entry"]) for a in page.all("article"))
    assert (data["iou"], data["error"]) == (0.625, 0.25)
    assert "loss" not in data
    predicted, true = (ids_of(c["data-ids"]) for c in page.all("canvas"))
    assert (predicted == IDS).all()
    assert (true == truth).all()
    rows = [row for row in page.text("table", class_="classes").splitlines() if row]
    assert rows[1:] == ["red75.0 %75.0 %4", "green88.9 %100.0 %8", "blue\N{EN DASH}\N{EN DASH}0"]
    cells = page.all("td")
    assert [c["title"] for c in cells if "25.0 %" in c.get("title", "")] == [
        "red taken for green: 25.0 %"
    ]
    assert "red taken for green: 1 pixels, 25.0 % of the class" in page.text("ol")
    assert page.all("option")[4]["value"] == "iou"


def test_evaluation_of_many_classes_is_drawn_without_a_table(write):
    names = tuple(f"class {i}" for i in range(40))
    confusion = np.eye(40, dtype=np.int64) * 5
    confusion[7, 9] = 5
    _, page = write(
        lambda report: None,
        "eval",
        class_names=names,
        palette=((1, 2, 3),) * 40,
        summary={**figures(confusion, names), "confusion": confusion.tolist()},
    )
    assert not page.all("table", "confusion")
    assert len(page.all("rect")) == 41
    assert "class 7 taken for class 9: 50.0 %" in page.text("svg")


def test_evaluation_of_a_classifier(write):
    one = {"class_id": 2, "name": "blue", "rank": 3, "predicted_id": 0, "predicted_name": "red"}
    _, page = write(
        lambda r: r.add_evaluation("a.jpg", one, THUMBNAIL),
        "eval",
        summary={"images": 1, "top1": 0.0, "top5": 1.0},
        task="classification",
        palette=(),
    )
    [data] = (json.loads(a["data-entry"]) for a in page.all("article"))
    assert data == {"rank": 3, "shares": []}
    assert "predicted name red" in page.text("p", class_="facts")
    assert "-rank" in [a["value"] for a in page.all("option")]


def test_ids_above_256_classes(write):
    names = tuple(str(i) for i in range(300))
    ids = np.array([[0, 299, 256, 255]], np.uint16)
    one = record("a.jpg", (1, 1, 1))
    _, page = write(
        lambda r: r.add_segmentation(one, THUMBNAIL[:1, :4], ids),
        class_names=names,
        palette=((9, 9, 9),) * 300,
    )
    [canvas] = page.all("canvas")
    pixels = ids_of(canvas["data-ids"]).astype(int)
    assert (pixels[..., 0] + 256 * pixels[..., 1]).tolist() == ids.tolist()
    assert json.loads(page.text("script", type="application/json"))["wide"] is True


@pytest.mark.parametrize(
    ("num_classes", "stored", "expected"),
    [(300, np.uint8, [3, 200]), (11, np.uint16, [3, 200]), (256, np.uint8, [3, 200])],
)
def test_ids_are_stored_by_the_number_of_classes(write, num_classes, stored, expected):
    ids = np.array([[3, 200]], stored)
    _, page = write(
        lambda r: r.add_evaluation("a.jpg", {}, THUMBNAIL[:1, :2], ids, ids.astype(np.uint16)),
        "eval",
        class_names=tuple(map(str, range(num_classes))),
        palette=((9, 9, 9),) * num_classes,
    )
    wide = json.loads(page.text("script", type="application/json"))["wide"]
    for canvas in page.all("canvas"):
        pixels = ids_of(canvas["data-ids"]).astype(int)
        assert (pixels.ndim == 3) is wide
        values = pixels[..., 0] + 256 * pixels[..., 1] if wide else pixels
        assert values.tolist() == [expected]


def test_void_of_16_bits_is_void_where_ids_have_8(write):
    truth = np.array([[65535, 256 + 1]], np.uint16)
    _, page = write(
        lambda r: r.add_evaluation("a.jpg", {}, THUMBNAIL[:1, :2], truth, truth * 0), "eval"
    )
    assert ids_of(page.all("canvas")[1]["data-ids"]).tolist() == [[255, 255]]


def test_timings_only_where_there_are_times(write):
    slow = record("a.jpg", elapsed_ms=8.0)
    _, page = write(lambda r: r.add_segmentation(slow, THUMBNAIL, IDS))
    assert "median 8 ms" in page.text("figcaption")
    assert [a["height"] for a in page.all("rect", "longest")] == ["100.00"]
    _, page = write(lambda r: r.add_segmentation(record("a.jpg"), THUMBNAIL, IDS))
    assert not page.all("figure")
    assert "-ms" not in [a["value"] for a in page.all("option")]


def test_same_input_same_bytes(write):
    def add(report):
        report.add_segmentation(record("a.jpg", elapsed_ms=8.0), THUMBNAIL, IDS, 0.5)
        report.add_failure(failure("b.jpg"))

    assert write(add, name="a.html")[0] == write(add, name="b.html")[0]


def test_absent_until_it_is_whole(tmp_path, make_card):
    path = tmp_path / "report.html"
    path.write_text("old")
    with Report(str(path), "segment", make_card(), "CPU", "") as report:
        report.add_segmentation(record("a.jpg"), THUMBNAIL, IDS)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.glob("*.html")] == ["report.html"]


def test_place_that_cannot_be_written(tmp_path, make_card):
    (tmp_path / "file").touch()
    target = str(tmp_path / "file" / "report.html")
    with (
        Report(target, "segment", make_card(), "CPU", "") as report,
        pytest.raises(OutputWriteError, match="cannot write"),
    ):
        report.close({})


@pytest.mark.slow
def test_memory_does_not_grow_with_the_run(tmp_path, make_card):
    path = tmp_path / "report.html"
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (30, 40, 3), np.uint8)
    thumbnail = coarse.repeat(8, axis=0).repeat(8, axis=1)
    ids = rng.integers(0, 3, (30, 40), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    tracemalloc.start()
    with Report(str(path), "segment", make_card(), "CPU", "") as report:
        for i in range(2000):
            report.add_segmentation(record(f"{i:05}.jpg", elapsed_ms=i), thumbnail, ids, 0.5)
        report.close({})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 20e6
    assert peak < 5e6
    assert path.read_text().count("<article") == 2000
