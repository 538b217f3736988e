from pathlib import Path

import pytest

from segcli.atomic import hold_mark
from segcli.errors import DeviceError, ImageMissing, ImageNotFound
from segcli.inputs import Source
from segcli.pipeline import Item
from segcli.results import Outcome
from segcli.shared_files import check_images, check_mark, check_paths


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
    with hold_mark(tmp_path) as mark:
        check_mark(mark)
    with pytest.raises(DeviceError, match="is another folder on") as failed:
        check_mark(mark)
    assert repr(str(tmp_path)) in str(failed.value)
    assert failed.value.hint == "the machines of a cluster need shared folders, or URLs"


def test_an_image_that_another_machine_does_not_find(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.jpg").touch()

    def outcome(path, kind):
        return Outcome(path, "error", "m", "p", error=kind(f"cannot read {path!r}: no such file"))

    check_images(
        "m7",
        [
            Outcome("here.jpg", "ok", "m", "p"),
            outcome("nowhere.jpg", ImageNotFound),
            # It may not be read there: one image's fault.
            outcome("here.jpg", ImageMissing),
        ],
    )
    said = r"cannot read 'here.jpg': no such file on 'm7', and here it is"
    with pytest.raises(DeviceError, match=said) as failed:
        check_images("m7", [outcome("here.jpg", ImageNotFound)])
    assert failed.value.hint == "the machines of a cluster need shared folders, or URLs"
