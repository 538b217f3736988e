"""The same files and records, however the work is divided."""

from pathlib import Path

import pytest
from PIL import Image

# What any of them may change is the order of work, never a pixel.
DIVISIONS = [(1, 2), (2, 1), (2, 2), (5, 1), (5, 2)]


@pytest.fixture
def photos(shared):
    """Five photos of different sizes, small ones so that the network is what takes the time."""
    Path("in/sub").mkdir(parents=True)
    names = ("china", "cat", "grace_hopper", "parrot", "bird")
    for i, name in enumerate(names):
        with Image.open(shared / "data" / "photos" / f"{name}.jpg") as image:
            image.thumbnail((200 + 40 * i, 200 + 40 * i))
            image.convert("RGB").save(Path("in", "sub" if i % 2 else "", f"{name}.jpg"))
    return Path("in")


def test_workers_and_threads_change_nothing(segcli_process, photos, contents):
    """With the model of the package: float32 sums in another order would show in its borders."""
    run = ("segment", photos, "-r", "--device", "cpu", "--jsonl", "--no-timing", "-q")
    formats = ("-f", "mask", "-f", "overlay")

    def one(workers, threads):
        out = Path(f"out-{workers}-{threads}")
        done = segcli_process(
            *(*run, *formats, "-o", out, "--workers", str(workers), "--threads", str(threads))
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return contents(out), done.stdout.replace(str(out).encode(), b"out")

    files, records = one(1, 1)
    assert len(files) == 10
    assert len(records.splitlines()) == 5
    for division in DIVISIONS:
        assert one(*division) == (files, records), division


def test_a_list_a_folder_and_arguments_give_the_same(segcli_process, photos, contents):
    names = sorted(str(p) for p in photos.rglob("*.jpg"))
    run = ("segment", "--device", "cpu", "--jsonl", "--no-timing", "-q", "-o", "out")
    listing = "\0".join(names).encode()
    first = segcli_process(*run, "in", "-r")
    files = contents("out")
    assert first.returncode == 0
    assert len(files) == 5
    again = segcli_process(*run, "--files0-from", "-", "--root", "in", stdin=listing)
    assert sorted(again.stdout.splitlines()) == sorted(first.stdout.splitlines())
    assert contents("out") == files
