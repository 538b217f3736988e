"""The page in a real browser, headless and without a network: what people see and do there."""

import html
import json
import re
import shutil
import subprocess
from itertools import count

import numpy as np
import pytest

from segcli.report import Report

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BAD_NAME = "</script><script>document.title='broken'</script>.jpg"

# The red left half is class 0, the right one class 1.
IDS = np.repeat(np.array([[0, 1]], np.uint8), 20, axis=1).repeat(30, axis=0)
TRUTH = np.where(np.arange(30)[:, None] < 15, IDS, 255).astype(np.uint8)
THUMBNAIL = np.full((30, 40, 3), 128, np.uint8)

STEPS = """
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const until = async (condition) => {
  for (let i = 0; i < 200 && !condition(); i++) await sleep(50);
};
const pixel = (canvas, x, y) => {
  const copy = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  copy.getContext("2d").drawImage(canvas, -x, -y);
  return [...copy.getContext("2d").getImageData(0, 0, 1, 1).data];
};
const set = (id, value, kind) => {
  const input = document.getElementById(id);
  input.value = value;
  input.dispatchEvent(new Event(kind, { bubbles: true }));
};
const paths = () => [...document.querySelectorAll(".entry")]
  .filter((e) => e.checkVisibility()).map((e) => e.querySelector(".path").textContent);
const found = { refused: [] };
document.addEventListener("securitypolicyviolation", (e) => found.refused.push(e.blockedURI));
addEventListener("load", async () => {
  try {
    await until(() => document.querySelector("canvas").width > 1);
    %s
  } catch (error) { found.error = String(error.stack); }
  found.loaded = performance.getEntriesByType("resource").map((e) => e.name)
    .filter((name) => !name.startsWith("data:"));
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


@pytest.fixture
def browse(tmp_path):
    """Loads a page in a browser; returns what it is afterwards and what the console had to say."""
    program = next((p for p in map(shutil.which, BROWSERS) if p), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    profiles = count()

    def load(page):
        done = subprocess.run(
            [
                *(program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={tmp_path / f'profile-{next(profiles)}'}",
                *("--enable-logging=stderr", "--window-size=1200,1000"),
                *("--virtual-time-budget=20000", "--dump-dom", page.as_uri()),
            ],
            capture_output=True,
            timeout=120,
            check=True,
        )
        errors = [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]
        return done.stdout.decode(), errors

    return load


@pytest.fixture
def steps(browse):
    """Runs steps in a page, whose own policy would refuse them; returns what they found."""

    def run(page, code):
        text = page.read_text("utf-8")
        text, changed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        assert changed == 1
        text = text.replace("</body>", f"<script>{STEPS % code}</script></body>")
        copy = page.with_name("steps.html")
        copy.write_text(text, "utf-8")
        dom, errors = browse(copy)
        [found] = re.findall(r'<pre id="found">(.*)</pre>', dom, re.DOTALL)
        found = json.loads(html.unescape(found))
        assert "error" not in found, found["error"]
        assert errors == []
        assert found.pop("loaded") == []
        assert found.pop("refused") == []
        return found

    return run


def record(path, red, elapsed_ms):
    names = ("red", "green")
    return {
        "path": path,
        "classes": [
            {"class_id": i, "name": names[i], "pixels": int(1200 * f), "fraction": f}
            for i, f in enumerate((red, 1 - red))
        ],
        "elapsed_ms": elapsed_ms,
    }


@pytest.fixture
def page(tmp_path, make_card):
    path = tmp_path / "report.html"
    with Report(str(path), "segment", make_card(), "CPU", "segcli segment a/") as report:
        report.add_segmentation(record("b.jpg", 0.5, 3.0), THUMBNAIL, IDS, 0.9)
        report.add_segmentation(record("a.jpg", 0.25, 9.0), THUMBNAIL, IDS, 0.6)
        report.add_segmentation(record(BAD_NAME, 0.75, 6.0), THUMBNAIL, IDS)
        report.add_failure({"path": BAD_NAME, "error": {"code": "decode", "message": "<b>"}})
        report.close({"seconds": 1})
    return path


def test_loads_under_its_own_policy_without_a_word(browse, page):
    dom, errors = browse(page)
    assert errors == []
    assert "<title>segcli segment: tiny</title>" in dom
    # The script has run: it alone gives the canvases a size.
    assert dom.count('width="40" height="30" data-ids') == 3


def test_a_policy_that_knows_another_script_stops_ours(browse, page):
    page.write_text(page.read_text("utf-8").replace('"use strict";', '"use  strict";'), "utf-8")
    dom, errors = browse(page)
    assert any("Content Security Policy" in line for line in errors)
    assert 'width="40" height="30" data-ids' not in dom


def test_classes_are_painted_and_taken_away(steps, page):
    found = steps(
        page,
        """
    const canvas = document.querySelector("canvas");
    found.before = [pixel(canvas, 5, 5), pixel(canvas, 35, 5)];
    document.querySelector(".toggle[value='0']").click();
    found.after = [pixel(canvas, 5, 5), pixel(canvas, 35, 5)];
    document.getElementById("none").click();
    found.none = [pixel(canvas, 5, 5), pixel(canvas, 35, 5)];
    document.getElementById("all").click();
    found.all = [pixel(canvas, 5, 5), pixel(canvas, 35, 5)];
    set("opacity", 20, "input");
    found.opacity = getComputedStyle(canvas).opacity;
    const divider = document.querySelector(".divider");
    divider.value = 30;
    divider.dispatchEvent(new Event("input", { bubbles: true }));
    found.clip = getComputedStyle(canvas).clipPath;
    found.title = document.title;
    """,
    )
    red, green, clear = [200, 0, 0, 255], [0, 200, 0, 255], [0, 0, 0, 0]
    assert found["before"] == found["all"] == [red, green]
    assert found["after"] == [clear, green]
    assert found["none"] == [clear, clear]
    assert found["opacity"] == "0.2"
    assert "70%" in found["clip"]
    assert found["title"] == "segcli segment: tiny"


def test_filters_and_sorts(steps, page):
    found = steps(
        page,
        """
    found.all = paths();
    set("text", "A.JP", "input");
    found.text = paths();
    found.count = document.getElementById("count").textContent;
    set("text", "", "input");
    set("class", "0", "change");
    set("least", "50", "input");
    found.least = paths();
    set("sort", "-share", "change");
    found.share = paths();
    set("class", "", "change");
    set("least", "0", "input");
    for (const by of ["path", "confidence", "-confidence", "-ms", "order"]) {
      set("sort", by, "change");
      found[by] = paths();
    }
    """,
    )
    a, b, bad = "a.jpg", "b.jpg", BAD_NAME
    assert found == {
        "all": [b, a, bad],
        "text": [a],
        "count": "1 of 3 images",
        "least": [b, bad],
        "share": [bad, b],
        "path": [bad, a, b],
        # Without a confidence it comes last either way.
        "confidence": [a, b, bad],
        "-confidence": [b, a, bad],
        "-ms": [a, bad, b],
        "order": [b, a, bad],
    }


def test_evaluation_starts_with_the_worst_and_shows_what_is_wrong(steps, tmp_path, make_card):
    path = tmp_path / "report.html"
    other = IDS.copy()
    other[0, 0] = 1
    with Report(str(path), "eval", make_card(), "CPU", "") as report:
        for name, iou in (("good", 0.9), ("none", None), ("bad", 0.1)):
            figures = {"miou": iou, "pixel_accuracy": iou}
            report.add_evaluation(name, figures, THUMBNAIL, TRUTH, other)
        classes = [
            {"class_id": i, "name": n, "iou": 0.5, "accuracy": 0.5, "pixels": 1}
            for i, n in enumerate(("red", "green", "blue"))
        ]
        report.close({"classes": classes, "confusion": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]})
    found = steps(
        path,
        """
    found.paths = paths();
    const [predicted, truth] = document.querySelectorAll("canvas");
    found.void = pixel(truth, 5, 20);
    found.truth = pixel(truth, 5, 5);
    document.getElementById("wrong").click();
    found.wrong = [pixel(predicted, 0, 0), pixel(predicted, 5, 5), pixel(predicted, 5, 20)];
    """,
    )
    clear = [0, 0, 0, 0]
    assert found == {
        "paths": ["bad", "good", "none"],
        "void": clear,
        "truth": [200, 0, 0, 255],
        "wrong": [[0, 200, 0, 255], clear, clear],
    }


def test_ids_above_256_and_pixels_only_for_what_is_in_view(steps, tmp_path, make_card):
    path = tmp_path / "report.html"
    names = tuple(f"class {i}" for i in range(300))
    palette = tuple((i % 256, i // 256, 7) for i in range(300))
    ids = np.full((30, 40), 299, np.uint16)
    card = make_card(class_names=names, palette=palette)
    one = {"class_id": 299, "name": "class 299", "pixels": 1200, "fraction": 1.0}
    with Report(str(path), "segment", card, "CPU", "") as report:
        for i in range(300):
            report.add_segmentation({"path": f"{i}.jpg", "classes": [one]}, THUMBNAIL, ids)
        report.close({})
    found = steps(
        path,
        """
    const canvases = [...document.querySelectorAll("canvas")];
    found.color = pixel(canvases[0], 3, 3);
    found.first = canvases.filter((c) => c.width > 1).length;
    canvases[299].scrollIntoView();
    await until(() => canvases[299].width > 1 && canvases[0].width === 1);
    found.last = [canvases[0].width, canvases[299].width];
    """,
    )
    assert found["color"] == [43, 1, 7, 255]
    assert 0 < found["first"] < 100
    assert found["last"] == [1, 40]
