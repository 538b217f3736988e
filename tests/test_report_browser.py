"""The page in a real browser, headless and without a network: what people see and do there."""

import json
import os
import select
import shutil
import subprocess
import sys

import numpy as np
import pytest

from segcli.report import Report

fcntl = pytest.importorskip("fcntl")

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BAD_NAME = "</script><script>document.title='broken'</script>.jpg"

# The red left half is class 0, the right one class 1.
IDS = np.repeat(np.array([[0, 1]], np.uint8), 20, axis=1).repeat(30, axis=0)
TRUTH = np.where(np.arange(30)[:, None] < 15, IDS, 255).astype(np.uint8)
THUMBNAIL = np.full((30, 40, 3), 128, np.uint8)

STEPS = """
const until = async (condition) => {
  for (let i = 0; i < 1200 && !condition(); i++) await new Promise((done) => setTimeout(done, 25));
};
const pixel = (canvas, x, y) => [...canvas.getContext("2d").getImageData(x, y, 1, 1).data];
const set = (id, value, kind) => {
  const input = document.getElementById(id);
  input.value = value;
  input.dispatchEvent(new Event(kind, { bubbles: true }));
};
const paths = () => [...document.querySelectorAll(".entry")]
  .filter((e) => e.checkVisibility()).map((e) => e.querySelector(".path").textContent);
const found = {};
await until(() => document.querySelector("canvas").width > 1);
"""


class Browser:
    """A headless Chromium that is spoken to in the DevTools protocol, over a pair of pipes.

    Args:
        program: Of the browser.
        profile: An empty folder.
    """

    def __init__(self, program, profile):
        its_input, self.to = os.pipe()
        self.of, its_output = os.pipe()
        # It wants 3 and 4; only from above them can neither be overwritten before it is moved.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_input, its_output)]
        for end in (its_input, its_output):
            os.close(end)
        start = (
            "import os, sys\n"
            f"os.dup2({ends[0]}, 3), os.dup2({ends[1]}, 4)\n"
            "os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", start, program, "--remote-debugging-pipe"),
                *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--window-size=1200,1000", "--host-resolver-rules=MAP * ~NOTFOUND"),
                f"--user-data-dir={profile}",
            ],
            pass_fds=ends,
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        self.buffer, self.events, self.count, self.session = b"", [], 0, None

    def open(self):
        """Opens an empty tab, which the calls from now on are for."""
        self.events, self.session = [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        os.close(self.to)
        os.close(self.of)
        self.process.terminate()
        self.process.wait(30)

    def receive(self):
        while b"\0" not in self.buffer:
            assert select.select([self.of], [], [], 60)[0], "the browser says nothing"
            data = os.read(self.of, 1 << 20)
            assert data, "the browser is gone"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def hear(self, event):
        if event.get("sessionId") == self.session:
            self.events.append(event)

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.hear(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def load(self, page):
        self.call("Page.navigate", url=page.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.hear(self.receive())

    def evaluate(self, code):
        done = self.call(
            "Runtime.evaluate",
            expression=f"(async () => {{ {STEPS} {code}; return found; }})()",
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in done, done
        return done["result"]["value"]

    def complaints(self):
        """What a person would find in the console."""
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(e["params"]) for e in self.events if e.get("method") in names]

    def requests(self):
        """What was asked for, without what is in the page itself."""
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        urls = [e["params"]["request"]["url"] for e in sent]
        return [url for url in urls if not url.startswith("data:")]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A browser, the same for all tests here: it takes seconds to start and to end."""
    program = next((p for p in map(shutil.which, BROWSERS) if p), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def browser(started):
    """A browser with an empty tab."""
    started.open()
    return started


@pytest.fixture
def steps(browser):
    """Takes steps in a page, which runs under its own policy; returns what they found."""

    def run(page, code):
        browser.load(page)
        found = browser.evaluate(code)
        assert browser.complaints() == []
        assert browser.requests() == [page.as_uri()]
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


def test_loads_under_its_own_policy_without_a_word(steps, page):
    found = steps(
        page,
        """
    found.title = document.title;
    found.scripts = document.scripts.length;
    const canvases = [...document.querySelectorAll("canvas")];
    // Each entry's pixels are decoded on their own: that one is painted says nothing of the next.
    await until(() => canvases.every((c) => c.width > 1));
    found.painted = canvases.map((c) => [c.width, c.height]);
    """,
    )
    assert found == {
        "title": "segcli segment: tiny",
        "scripts": 2,
        "painted": [[40, 30]] * 3,
    }


def test_the_policy_stops_any_other_script(browser, page):
    text = page.read_text("utf-8")
    other = "<script>document.title = 'other'</script><img src='https://example.org/x.png'>"
    page.write_text(text.replace("</body>", f"{other}</body>"), "utf-8")
    browser.load(page)
    found = browser.evaluate("found.title = document.title")
    assert found == {"title": "segcli segment: tiny"}
    # They come from a process of their own, maybe after the answer above.
    while len(stopped := [c for c in browser.complaints() if "Content Security Policy" in c]) < 2:
        browser.hear(browser.receive())
    assert len(stopped) == 2


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
    set("surest", "0.7", "input");
    found.unsure = paths();
    set("surest", "", "input");
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
        # Without a confidence it stays.
        "unsure": [a, bad],
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
    set("error", "50", "input");
    found.worst = paths();
    """,
    )
    clear = [0, 0, 0, 0]
    assert found == {
        "paths": ["bad", "good", "none"],
        "void": clear,
        "truth": [200, 0, 0, 255],
        "wrong": [[0, 200, 0, 255], clear, clear],
        "worst": ["bad", "none"],
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
