"""Every format of ``segment``, read back by others than wrote it."""

import json
import os
import pty
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RED, GREEN, BLUE = range(3)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(tiny_model):
    return tiny_model()


@pytest.fixture
def seg(segcli, tiny):
    return lambda *args, **more: segcli("segment", "-m", tiny, *args, **more)


@pytest.fixture
def photo():
    """A picture whose class at each pixel is its largest channel."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    Image.fromarray(pixels).save("a.png")
    return pixels


def test_one_name_for_each_format(seg, photo):
    formats = ("mask", "color", "overlay", "cutout", "npy", "json", "confidence")
    flags = [flag for name in formats for flag in ("-f", name)]
    ran = seg("a.png", "-o", "out/", *flags, "--classes", "red")
    assert ran.out.splitlines() == [
        "out/a.png",
        "out/a.color.png",
        "out/a.overlay.jpg",
        "out/a.cutout.png",
        "out/a.npy",
        "out/a.json",
        "out/a.confidence.png",
    ]
    # What segcli wrote is not an input.
    ran = seg("out", "-o", "again")
    assert ran.out.splitlines() == ["again/a.overlay.png"]


def test_npy_is_what_the_mask_holds(seg, photo):
    seg("a.png", "-o", "out/", "-f", "npy", "-f", "mask")
    found = np.load("out/a.npy")
    assert found.dtype == np.uint8
    assert (found == photo.argmax(axis=2)).all()
    assert (found == np.asarray(Image.open("out/a.png"))).all()
    seg("a.png", "-o", "kept.npy", "-f", "npy", "--classes", "green")
    kept = np.load("kept.npy")
    assert (kept == np.where(found == GREEN, GREEN, 255)).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_json_decodes_to_the_mask(seg, photo):
    from jsonschema import Draft202012Validator
    from pycocotools import mask as coco

    seg("a.png", "-o", "a.json", "-f", "json", "--polygons")
    found = json.loads(Path("a.json").read_text())
    schema = json.loads((files("segcli.data") / "segmentation.schema.json").read_text("utf-8"))
    Draft202012Validator(schema).validate(found)
    expected = photo.argmax(axis=2)
    assert {c["class_id"] for c in found["classes"]} == set(np.unique(expected).tolist())
    for entry in found["classes"]:
        assert (coco.decode(entry["rle"]) == (expected == entry["class_id"])).all()
        assert entry["polygons"]
    seg("a.png", "-o", "b.json", "-f", "json", "--classes", "blue")
    [only] = json.loads(Path("b.json").read_text())["classes"]
    assert (only["name"], "polygons" in only) == ("blue", False)


def test_cutout_is_the_image_where_the_class_is(seg, photo):
    seg("a.png", "-o", "c.png", "-f", "cutout", "--classes", "red,blue")
    found = np.asarray(Image.open("c.png"))
    assert found.shape == (40, 56, 4)
    kept = photo.argmax(axis=2) != GREEN
    assert (found[..., 3] == np.where(kept, 255, 0)).all()
    assert (found[kept, :3] == photo[kept]).all()


def test_confidence_is_the_margin_of_the_softmax(seg, photo):
    # The tiny model's logits are the pixels over 255.
    logits = photo.astype(np.float64) / 255
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    second, best = np.sort(probabilities, axis=2)[:, :, 1:].transpose(2, 0, 1)
    seg("a.png", "-o", "c.png", "-f", "confidence")
    with Image.open("c.png") as image:
        assert image.mode == "L"
        found = np.asarray(image).astype(int)
    assert np.abs(found - 255 * (best - second)).max() <= 0.51
    assert found.max() - found.min() > 50
    seg("a.png", "-o", "v.png", "-f", "confidence", "--viridis")
    with Image.open("v.png") as image:
        assert image.mode == "RGB"


def test_a_mask_beside_confidence_is_the_same_mask(seg, photo):
    seg("a.png", "-o", "one/")
    seg("a.png", "-o", "two/", "-f", "mask", "-f", "confidence")
    assert Path("one/a.png").read_bytes() == Path("two/a.png").read_bytes()


def test_an_overlay_is_the_blend(seg, photo):
    palette = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]])
    seg("a.png", "-o", "o.png", "-f", "overlay", "--opacity", "0.3")
    expected = 0.7 * photo + 0.3 * palette[photo.argmax(axis=2)]
    assert np.abs(np.asarray(Image.open("o.png")) - expected).max() <= 0.6


def test_contours_and_names_are_drawn_on_it(seg, picture):
    picture("b.png", (300, 200), 150)
    plain, marked = Path("plain.png"), Path("marked.png")
    args = ("-f", "overlay", "--opacity", "0")
    seg("b.png", "-o", plain, *args)
    seg("b.png", "-o", marked, *args, "--contours", "--names")
    before, after = (np.asarray(Image.open(path)).astype(int) for path in (plain, marked))
    changed = np.abs(before - after).sum(axis=2) > 30
    # Along the border of the halves, and a name within each of them.
    assert changed[:, 149:151].mean() > 0.9
    assert changed[:, 20:140].any()
    assert changed[:, 160:280].any()
    assert changed.mean() < 0.2


def test_safe_colors(seg, photo):
    seg("a.png", "-o", "m.png", "--safe-colors")
    seg("a.png", "-o", "n.png")
    with Image.open("m.png") as safe, Image.open("n.png") as own:
        assert (np.asarray(safe) == np.asarray(own)).all()
        assert safe.getpalette()[:9] != own.getpalette()[:9]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-f", "cutout", "-o", "c.png"], "needs --classes"),
        (["-f", "npy", "-o", "x.png"], "expected the suffix .npy"),
        (["-o", "x.npy"], "hint: -f npy writes .npy"),
        (["-f", "overlay", "-o", "x.png", "--mask-size", "9x9"], "shows the image"),
        (["-f", "confidence", "-o", "x.png", "--mask-size", "logits"], "-f confidence"),
    ],
)
def test_usage(seg, photo, args, says):
    ran = seg("a.png", *args)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err


def on_a_terminal(command, *args, **env):
    """What a terminal of 100 columns is shown."""
    primary, secondary = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **env}
    with subprocess.Popen(
        [*command, *map(str, args)], stdout=secondary, stderr=subprocess.PIPE, env=environment
    ) as process:
        os.close(secondary)
        shown = b""
        try:
            while block := os.read(primary, 65536):
                shown += block
        except OSError:
            pass
        os.close(primary)
        process.communicate(timeout=60)
    assert process.returncode == 0
    return shown.decode()


def test_classes_and_a_picture_on_a_terminal(command, tiny, photo):
    args = ("segment", "a.png", "-m", tiny, "-o", "m.png")
    shown = on_a_terminal(command, *args)
    assert "a.png -> m.png" in shown
    lines = [line for line in shown.splitlines() if "%" in line]
    assert len(lines) == 3
    # A swatch in the class's color.
    assert any("\x1b[" in line and "green" in line for line in lines)
    assert "▀" not in shown
    shown = on_a_terminal(command, *args, "--show")
    assert shown.count("▀") > 500


def test_no_color_and_pipes_have_no_escapes(command, tiny, photo, segcli_process):
    args = ("segment", "a.png", "-m", str(tiny), "-o", "m.png", "--show")
    shown = on_a_terminal(command, *args, NO_COLOR="1")
    assert "\x1b[3" not in shown
    assert "\x1b[4" not in shown
    done = segcli_process(*args, FORCE_COLOR="")
    assert done.stdout == b"m.png\n"


def test_the_gallery_is_made_by_one_command(tmp_path):
    examples = Path(__file__).resolve().parents[2] / "examples"
    scripts = Path(sys.executable).parent
    if not (scripts / "segcli").exists():
        pytest.skip("the command is not installed beside this Python")
    env = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", examples / "gallery.sh", tmp_path / "out"],
        env=env,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    made = {path.name for path in Path("out").iterdir()}
    assert made == {"china.overlay.jpg", "china.cutout.png", "china.confidence.png"}
    # The README shows these, and they are in the repository.
    assert made < {path.name for path in examples.iterdir()}
