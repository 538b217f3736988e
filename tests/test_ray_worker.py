from pathlib import Path

import pytest

from segcli.errors import ImageMissing, OutputError
from segcli.inputs import Source
from segcli.pipeline import Item
from segcli.ray_worker import check_paths


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
    with pytest.raises(OutputError, match=r"'a.*' is in '/not/here', which .* does not have"):
        check_paths([given], "/not/here")
