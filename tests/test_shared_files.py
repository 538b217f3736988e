from pathlib import Path

import pytest

from segcli.atomic import hold_mark
from segcli.errors import DeviceError, ImageDecodeError, ImageMissing
from segcli.inputs import Source
from segcli.pipeline import Item
from segcli.results import Outcome
from segcli.shared_files import check_mark, check_paths, has_read


def item(path, *targets, data=None):
    return Item(Source(path, path, "file"), targets, data=data)


@pytest.mark.parametrize(
    "given",
    [
        item("/photos/a.jpg", "/masks/a.png"),
        item("s3://bucket/a.jpg", "s3://bucket/a.png"),
        item("https://example.org/a.jpg"),
        item("-", "/masks/a.png", data=b"bytes that came along"),
        Item(Source("", "", "list"), error=ImageMissing("an entry of the list is no file name")),
    ],
)
def test_paths_that_mean_the_same_everywhere(given):
    check_paths([given], "/a/folder/of/another/machine")


@pytest.mark.parametrize("given", [item("a.jpg", "/a.png"), item("/a.jpg", "a.png")])
def test_relative_paths_need_the_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_paths([given], str(Path.cwd()))
    with pytest.raises(DeviceError, match=r"'a.*' is in '/not/here', which .* does not have"):
        check_paths([given], "/not/here")


def test_a_mark_that_only_another_machine_sees(tmp_path):
    with hold_mark(str(tmp_path)) as mark:
        check_mark(mark)
    with pytest.raises(DeviceError, match="is another folder on") as failed:
        check_mark(mark)
    assert repr(str(tmp_path)) in str(failed.value)
    assert failed.value.hint == "the machines of a cluster need shared folders, or URLs"


def ok(path):
    return Outcome(path, "ok", "m", "p")


def failed(path, kind=ImageMissing):
    return Outcome(path, "error", "m", "p", error=kind(f"cannot read {path!r}: no such file"))


def test_an_image_that_only_this_machine_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jpg").touch()
    assert not has_read("m7", [failed("nowhere.jpg"), failed("a.jpg", ImageDecodeError)])
    with pytest.raises(DeviceError, match=r"'a.jpg': no such file on 'm7', and here it is"):
        has_read("m7", [failed("nowhere.jpg"), failed("a.jpg"), ok("b.jpg")])
    # One that comes to be while its machine looks for it.
    assert has_read("m7", [ok("b.jpg"), failed("a.jpg")])


def test_what_says_nothing_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("-").touch()
    said = [ok("s3://bucket/a.jpg"), failed("https://example.org/a.jpg"), ok("-"), failed("-")]
    assert not has_read("m7", said)
