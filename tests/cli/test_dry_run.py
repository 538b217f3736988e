"""What a run would do, the ends of lines, and images that are cut short."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def seg(segcli, tiny_model):
    model = tiny_model()
    return lambda *args, **more: segcli("segment", "-m", model, *args, **more)


@pytest.fixture
def tree(picture):
    for name in ("in/a.png", "in/b/a.png", "in/b/c d.png"):
        picture(name)


def test_pairs_of_a_tree(seg, tree):
    ran = seg("in", "-r", "-o", "out", "-f", "mask", "-f", "overlay", "-n")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "in/a.png -> out/a.png",
        "in/a.png -> out/a.overlay.jpg",
        "in/b/a.png -> out/b/a.png",
        "in/b/a.png -> out/b/a.overlay.jpg",
        "in/b/c d.png -> out/b/c d.png",
        "in/b/c d.png -> out/b/c d.overlay.jpg",
    ]
    assert not Path("out").exists()


def test_a_dry_run_names_what_the_run_writes(seg, tree):
    planned = seg("in", "-r", "-o", "out", "--dry-run").out.splitlines()
    written = seg("in", "-r", "-o", "out").out.splitlines()
    assert [line.split(" -> ")[1] for line in planned] == written


def test_what_is_there_is_left_or_refused(seg, tree):
    seg("in", "-o", "out")
    ran = seg("in", "-r", "-o", "out", "-n", "--skip-existing")
    assert (ran.code, ran.out.count("->")) == (0, 2)
    ran = seg("in", "-r", "-o", "out", "-n", "--no-clobber")
    assert (ran.code, ran.out.count("->")) == (1, 2)
    assert "'out/a.png' exists" in ran.err


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["in/a.png", "in/b/a.png", "-o", "out/"], 2),
        (["none.png", "-o", "out/"], 2),
        (["in/a.png", "none.png", "-o", "out/"], 1),
        (["in/a.png", "-o", "x.png", "-m", "no-such-model"], 3),
        (["in/a.png", "-o", "x.png", "--jsonl"], 2),
        (["in/a.png", "-o", "x.png", "--device", "tpu"], 0),
    ],
)
def test_the_code_is_what_planning_gives(seg, tree, args, code):
    assert seg(*args, "--dry-run").code == code
    assert not Path("out").exists()


def test_pairs_ended_by_nul(seg, tree):
    ran = seg("in/b/c d.png", "-o", "out/", "-n", "-0")
    assert ran.out == "in/b/c d.png\0out/c d.png\0"


def test_paths_ended_by_nul(seg, tree):
    assert seg("in", "-r", "-o", "out", "-0").out == "out/a.png\0out/b/a.png\0out/b/c d.png\0"
    assert seg("in/a.png", "-o", "x.png", "-0", "--jsonl").code == 2


def test_classify(segcli, tiny_model, tree):
    model = tiny_model("c.onnx", task="classification", palette=())
    ran = segcli("classify", "-m", model, "in", "-r", "-n")
    assert (ran.code, ran.out) == (0, "in/a.png\nin/b/a.png\nin/b/c d.png\n")
    ran = segcli("classify", "-m", model, "in/a.png", "none.png", "-n", "-0")
    assert (ran.code, ran.out) == (1, "in/a.png\0")
    ran = segcli("classify", "-m", model, "in/a.png", "-k", "1", "-0")
    assert ran.out.startswith("in/a.png\t")
    assert ran.out.endswith("\0")


def test_a_folder_that_cannot_be_made(seg, picture):
    # Files may be written below it by root, folders may not be made by anyone.
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc")
    ran = seg(picture(), "-o", "/proc/none/")
    assert ran.code == 5
    assert "cannot" in ran.err


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_that_is_cut_short(seg, kind):
    path = Path(f"a.{kind.lower()}")
    Image.effect_noise((64, 48), 50).convert("RGB").save(path, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    ran = seg(path, "-o", "out.png")
    assert ran.code == 1
    assert "hint: --allow-truncated" in ran.err
    ran = seg(path, "-o", "out.png", "--allow-truncated", "--jsonl")
    assert ran.code == 0
    record = json.loads(ran.out)
    assert (record["status"], record["width"], record["height"]) == ("ok", 64, 48)
    # For this run alone.
    assert seg(path, "-o", "out2.png").code == 1


@pytest.mark.parametrize(("workers", "batch"), [(1, 1), (1, 3), (2, 2), (3, 16)])
def test_workers_and_batches_change_nothing(seg, picture, workers, batch):
    for i in range(9):
        picture(f"in/{i}.png", (8 + i % 3, 6), i % 8)
    Path("in/4.png").write_bytes(b"damaged")
    args = ("in", "-o", "out", "--jsonl", "--no-timing", "-f", "mask", "-f", "overlay")
    expected = seg(*args)
    files = {p: p.read_bytes() for p in Path("out").iterdir()}
    found = seg(*args, "--workers", workers, "--batch-size", batch)
    assert (found.code, found.out) == (1, expected.out)
    assert {p: p.read_bytes() for p in Path("out").iterdir()} == files


def test_model_names_are_completed(command):
    env = {
        **os.environ,
        "_SEGCLI_COMPLETE": "complete_bash",
        "COMP_WORDS": "segcli segment -m segformer-b5",
        "COMP_CWORD": "3",
    }
    done = subprocess.run(command, env=env, capture_output=True, timeout=60, check=False)
    assert done.stdout.decode().split() == ["segformer-b5", "segformer-b5-cityscapes"]
