import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli.errors import UsageError
from segcli.file_lists import check_list, list_entries


class Slow(io.BytesIO):
    """A pipe that holds at most ``block`` bytes at a time."""

    def __init__(self, data, block):
        super().__init__(data)
        self.block = block

    def read1(self, size=-1):
        return super().read1(min(size, self.block))


def entries(data, separator=b"\n", block=1 << 16):
    return list(list_entries("-", separator, Slow(data, block)))


@given(
    st.lists(
        st.text(st.characters(blacklist_characters="\0", codec="utf-8"), min_size=1)
        # Another spelling of a path.
        .filter(lambda name: not name.lower().startswith("file://"))
    ),
    st.integers(1, 9),
)
def test_any_names_survive_a_nul_list_in_any_blocks(names, block):
    assert entries(b"\0".join(map(os.fsencode, names)), b"\0", block) == names


@pytest.mark.parametrize("block", [1, 2, 65536])
def test_a_byte_order_mark_is_no_part_of_the_first_name(block):
    text = b"\xef\xbb\xbfa.jpg\r\n\xef\xbb\xbfb.jpg\n"
    assert entries(text, block=block) == ["a.jpg", "\ufeffb.jpg"]
    assert entries(b"\xef\xbb\xbfa.jpg\0", b"\0", block) == ["\ufeffa.jpg"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["a.jpg\nb.jpg\n", "\n\n", "照片\n照片\n"])
def test_a_list_in_utf_16_or_32_is_refused(tmp_path, encoding, text):
    path = tmp_path / "list"
    path.write_bytes(f"\ufeff{text}".encode(encoding))
    for read in (check_list, lambda *args: list(list_entries(*args, None))):
        with pytest.raises(UsageError, match="list' is in UTF-16 or UTF-32, expected UTF-8"):
            read(str(path), b"\n")


def test_a_name_may_start_like_utf_16_and_a_line_may_hold_a_nul():
    assert entries(b"\xff\xfea.jpg\nb\n") == ["\udcff\udcfea.jpg", "b"]
    assert entries(b"a\0b\nc\n") == ["a\0b", "c"]


def test_a_pipe_is_not_read_before_the_run(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # Opening it would wait for a writer.
    check_list(str(pipe), b"\n")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone", "no such list file: 'gone'"),
        ("nul\0", "no such list file"),
        (".", "the list '.' is a folder, expected a file"),
        ("", "no such list file: ''"),
        ("s3://bucket/list", "is a URL, expected a file on this machine"),
        ("file://host/list", "names another host"),
    ],
)
@pytest.mark.parametrize("separator", [b"\n", b"\0"])
def test_a_list_that_is_no_file_here(name, says, separator):
    with pytest.raises(UsageError, match=says):
        check_list(name, separator)


def test_an_empty_line_is_an_entry_and_the_end_of_the_last_is_none():
    assert entries(b"") == entries(b"\xef\xbb\xbf") == []
    assert entries(b"a\n\nb") == entries(b"a\n\nb\n") == entries(b"a\n\nb\n\r") == ["a", "", "b"]
    assert entries(b"a\0\r", b"\0") == ["a", "\r"]


def test_a_list_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot read the list"):
        list(list_entries(str(tmp_path), b"\n", None))
