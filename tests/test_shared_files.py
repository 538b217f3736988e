import threading
import time
from pathlib import Path

import pytest

from segcli import shared_files
from segcli.errors import ImageDecodeError, ImageMissing, OutputError
from segcli.results import Outcome
from segcli.shared_files import SharedFiles


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared_files, "_CACHE_S", 0.3)


@pytest.fixture
def files():
    return SharedFiles("here", threading.Event())


def ok(path, *outputs):
    return Outcome(path, "ok", "m", "p", outputs=outputs)


def failed(path, error=None):
    error = error or ImageMissing(f"cannot read {path!r}: no such file")
    return Outcome(path, "error", "m", "p", error=error)


def test_an_output_that_is_not_here(files):
    files.check("here", [ok("a.jpg", "gone.png")])
    with pytest.raises(OutputError, match=r"'gone.png' was written on m7 and is not here"):
        files.check("m7", [ok("a.jpg", "gone.png")])


def test_an_output_that_is_seen_late(files):
    late = threading.Timer(0.1, Path("late.png").touch)
    late.start()
    files.check("m7", [ok("a.jpg", "late.png")])
    late.join()
    # Once is enough: whoever reads the records may remove what they name.
    files.check("m7", [ok("a.jpg", "gone.png")])
    with pytest.raises(OutputError):
        files.check("m8", [ok("a.jpg", "gone.png")])


def test_an_image_that_is_only_here(files):
    Path("a.jpg").touch()
    files.check("here", [failed("a.jpg")])
    files.check("m7", [failed("nowhere.jpg"), failed("a.jpg", ImageDecodeError("damaged"))])
    said = r"cannot read 'a.jpg': no such file on m7, and here it is"
    with pytest.raises(OutputError, match=said) as found:
        files.check("m7", [failed("a.jpg")])
    assert found.value.hint == "the machines of a cluster need shared folders, or URLs"


def test_an_image_that_comes_to_be_while_its_machine_looks_for_it(files):
    files.check("m7", [ok("a.jpg")])
    Path("b.jpg").touch()
    files.check("m7", [failed("b.jpg")])


def test_objects_are_everywhere(files):
    files.check("m7", [ok("s3://bucket/a.jpg", "s3://bucket/gone.png")])
    files.check("m7", [failed("s3://bucket/b.jpg")])
    # They say nothing of files.
    with pytest.raises(OutputError):
        files.check("m7", [ok("s3://bucket/a.jpg", "gone.png")])


def test_nobody_waits_any_more(monkeypatch):
    monkeypatch.setattr(shared_files, "_CACHE_S", 60)
    stopping = threading.Event()
    threading.Timer(0.1, stopping.set).start()
    start = time.monotonic()
    SharedFiles("here", stopping).check("m7", [ok("a.jpg", "gone.png")])
    assert time.monotonic() - start < 10
