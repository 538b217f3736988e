import pytest

from segcli.errors import ImageMissing
from segcli.storage import read_bytes


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
