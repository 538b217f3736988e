from pathlib import Path

import pytest

from segcli.errors import ImageMissing, OutputExists, UsageError
from segcli.storage import exists, read_bytes, write_whole


def test_read_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert read_bytes(str(tmp_path / "a")) == b"abc"
    with pytest.raises(ImageMissing, match="no such file"):
        read_bytes(str(tmp_path / "b"))
    with pytest.raises(ImageMissing, match="it is a folder"):
        read_bytes(str(tmp_path))
    with pytest.raises(ImageMissing, match="not a directory"):
        read_bytes(str(tmp_path / "a" / "b"))
    with pytest.raises(ImageMissing, match="null"):
        read_bytes("a\0b")


@pytest.mark.parametrize("place", ["memory://storage/x", "new/x"])
def test_a_place_is_a_place(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    target = f"{place}/a b%20#.png"
    assert not exists(target)
    write_whole(target, b"one")
    with pytest.raises(OutputExists, match="exists"):
        write_whole(target, b"two", replace=False)
    assert read_bytes(target) == b"one"
    write_whole(target, b"two")
    assert (read_bytes(target), exists(target), exists(place)) == (b"two", True, False)
    write_whole(target + "2", b"three", replace=False)
    assert read_bytes(target + "2") == b"three"
    with pytest.raises(ImageMissing, match="no such"):
        read_bytes(f"{place}/none")
    # Nothing of it went to this machine's files.
    assert [p.name for p in Path().rglob("s3*")] == []


@pytest.mark.parametrize("url", ["memory://storage", "memory://storage/", "memory://storage/x/"])
def test_folders_of_stores_are_not_read(url):
    with pytest.raises(ImageMissing, match=f"cannot read '{url}': it is a folder"):
        read_bytes(url)


def test_web_addresses_are_read_only(http_server):
    server = http_server(lambda method, path: (200, b"data"))
    assert read_bytes(f"{server.url}/a?b") == b"data"
    with pytest.raises(UsageError, match="only read"):
        write_whole(f"{server.url}/a", b"")
