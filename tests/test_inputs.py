import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segcli.errors import UsageError
from segcli.inputs import (
    Source,
    check_arguments,
    open_sources,
)

NO_STDIN = io.BytesIO()


def sources(*args, stdin=NO_STDIN, **options):
    return list(open_sources([str(a) for a in args], stdin=stdin, **options))


def relatives(*args, **options):
    return [source.relative for source in sources(*args, **options)]


def png(*texts):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *(chunk(b"tEXt", t) for t in texts)]
    return b"".join([b"\x89PNG\r\n\x1a\n", *chunks, chunk(b"IDAT", b""), chunk(b"IEND", b"")])


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Makes files below in/ of the current folder, their content their own name."""
    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            path = Path("in", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode(errors="surrogateescape"))

    return make


def test_files_keep_their_order_and_spelling(tree):
    tree("b.jpg", "a.jpg", "notes.txt")
    assert sources("./in/b.jpg", "in/a.jpg", "in/notes.txt") == [
        Source("./in/b.jpg", "b.jpg", "file"),
        Source("in/a.jpg", "a.jpg", "file"),
        Source("in/notes.txt", "notes.txt", "file"),
    ]


def test_folder_takes_images_directly_inside(tree):
    tree("b.JPG", "a.tiff", "sub/c.jpg", ".hidden.jpg", "notes.txt", "d.jpg.bak")
    assert sources("./in/") == [
        Source("./in/a.tiff", "a.tiff", "folder"),
        Source("./in/b.JPG", "b.JPG", "folder"),
    ]


def test_recursive_order_is_the_byte_order_of_relative_paths(tree):
    names = ["a/z.jpg", "a.jpg", "a-b/x.jpg", "a0.jpg", "B.jpg", "é.jpg", "a/b/c.jpg"]
    tree(*names, ".git/x.jpg", "a/.x/y.jpg")
    assert relatives("in", recursive=True) == sorted(names, key=os.fsencode)


NAMES = st.text(st.sampled_from("ab-.0/é\udcff"), min_size=1, max_size=6)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(names=st.sets(NAMES, min_size=1, max_size=8))
def test_any_tree_comes_in_byte_order(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("tree")
    wanted = []
    for name in names:
        parts = [p for p in name.split("/") if p and not p.startswith(".")]
        if not parts:
            continue
        # Folders and files never share a name.
        relative = "/".join([*(p + "_" for p in parts[:-1]), parts[-1] + ".jpg"])
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        (root / relative).touch()
        wanted.append(relative)
    if wanted:
        assert relatives(root, recursive=True) == sorted(set(wanted), key=os.fsencode)


def test_deep_tree_does_not_reach_the_recursion_limit(tree):
    tree("x.jpg")
    here = Path.cwd()
    os.chdir("in")
    for _ in range(1200):
        Path("d").mkdir()
        os.chdir("d")
    Path("y.jpg").touch()
    os.chdir(here)
    found = relatives("in", recursive=True)
    # Neither could rmtree remove it.
    Path("in", "d/" * 1200, "y.jpg").unlink()
    for depth in range(1200, 0, -1):
        Path("in", "d/" * depth).rmdir()
    assert found == ["d/" * 1200 + "y.jpg", "x.jpg"]


def test_extensions_are_widened(tree):
    tree("a.gif", "b.jpg")
    assert relatives("in", extensions=[".jpg", "GIF"]) == ["a.gif", "b.jpg"]


def test_non_utf8_names_keep_their_bytes(tree):
    name = os.fsdecode(b"caf\xe9.jpg")
    tree(name)
    (source,) = sources("in")
    assert os.fsencode(source.path) == b"in/caf\xe9.jpg"
    assert Path(source.path).exists()


def test_links_to_files_are_followed_and_links_to_folders_are_not(tree):
    tree("real/a.jpg", "x/b.jpg")
    Path("in/link.jpg").symlink_to("real/a.jpg")
    Path("in/loop").symlink_to(".")
    Path("in/folder.jpg").symlink_to("x")
    assert relatives("in") == ["link.jpg"]
    assert relatives("in", recursive=True) == ["link.jpg", "x/b.jpg"]


def test_dangling_and_circular_links_are_inputs_that_fail_later(tree):
    tree("a.jpg")
    Path("in/b.jpg").symlink_to("nowhere")
    Path("in/c.jpg").symlink_to("c.jpg")
    assert relatives("in") == ["a.jpg", "b.jpg", "c.jpg"]


def test_same_file_is_processed_once(tree):
    tree("a.jpg", "b.jpg")
    Path("in/c.jpg").symlink_to("a.jpg")
    found = sources("in/b.jpg", "./in/b.jpg", "in", "gone.jpg", "gone.jpg")
    assert [s.path for s in found] == ["in/b.jpg", "in/a.jpg", "gone.jpg"]


def test_missing_path_is_yielded(tree):
    tree("a.jpg")
    assert sources("no/such.jpg", "in/a.jpg", "")[0] == Source("no/such.jpg", "such.jpg", "file")


@pytest.mark.parametrize("output", ["in/out", "./in/../in/out/", "link"])
def test_output_folder_is_left_out_even_when_it_appears_late(tree, output):
    tree("a.jpg", "outside/b.jpg")
    Path("link").symlink_to("in/out")
    stream = open_sources(["in"], recursive=True, exclude_dir=output, stdin=NO_STDIN)
    first = next(stream)
    tree("out/a.jpg")
    assert [first.relative, *(s.relative for s in stream)] == ["a.jpg", "outside/b.jpg"]
    assert relatives("in", recursive=True, exclude_dir=output) == ["a.jpg", "outside/b.jpg"]


def test_own_files_are_not_taken_from_a_folder(tree):
    tree("a.jpg")
    Path("in/a.mask.PNG").write_bytes(png(b"Comment\0x" * 40, b"Software\0segcli 0.1.0"))
    Path("in/b.png").write_bytes(png(b"Software\0gimp"))
    Path("in/c.png").write_bytes(png(b"Comment\0Software segcli 0.1.0"))
    Path("in/d.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    assert relatives("in") == ["a.jpg", "b.png", "c.png", "d.png"]
    assert relatives("in/a.mask.PNG") == ["a.mask.PNG"]


def test_folder_that_cannot_be_read_is_an_input_that_fails_later(tree, monkeypatch):
    tree("a.jpg", "shut/b.jpg")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [s.path for s in sources("in", recursive=True)] == ["in/a.jpg", "in/shut"]


def test_lines_are_split_at_newlines_only(tree):
    text = b"a b\t.jpg\r\n'q'.jpg\nx\r\r\n-\ncaf\xe9.jpg\n"
    found = sources(files_from="-", stdin=io.BytesIO(text))
    assert [s.path for s in found] == ["a b\t.jpg", "'q'.jpg", "x\r", "-", "caf\udce9.jpg"]
    assert {s.origin for s in found} == {"list"}


def test_lists_name_urls(tmp_path):
    text = b"s3://b/x/a%20b.jpg\nhttps://h/x/a%20b.jpg?s=1\nfile:///x/a%20b.jpg\nfile://h/a.jpg\n"
    found = sources(files_from="-", stdin=io.BytesIO(text))
    assert [(s.path, s.relative) for s in found] == [
        ("s3://b/x/a%20b.jpg", "a%20b.jpg"),
        ("https://h/x/a%20b.jpg?s=1", "a b.jpg"),
        ("/x/a b.jpg", "a b.jpg"),
        ("file://h/a.jpg", "a.jpg"),
    ]
    found = sources(files_from="-", root="s3://b/", stdin=io.BytesIO(text))
    assert [s.relative for s in found][:2] == ["x/a%20b.jpg", ".."]


def test_nul_list_keeps_newlines(tree):
    Path("list").write_bytes(b"a\n.jpg\0b\r\0c.jpg")
    assert [s.path for s in sources(files0_from="list")] == ["a\n.jpg", "b\r", "c.jpg"]


def test_list_is_read_while_it_is_written():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stdin, os.fdopen(writing, "wb", buffering=0) as out:
        stream = open_sources([], files_from="-", stdin=stdin)
        out.write(b"/no/a.jpg\n/no/b.jpg\n/no/c")
        assert [next(stream).path, next(stream).path] == ["/no/a.jpg", "/no/b.jpg"]
        out.write(b".jpg\n")
        assert next(stream).path == "/no/c.jpg"


@pytest.mark.parametrize(
    ("entry", "relative"),
    [
        ("in/x/a.jpg", "x/a.jpg"),
        ("./in//x/../a.jpg", "a.jpg"),
        ("link/a.jpg", "a.jpg"),
        ("in/../a.jpg", "../a.jpg"),
        ("/elsewhere/a.jpg", None),
        ("", ""),
    ],
)
def test_list_entries_keep_their_place_below_the_root(tree, entry, relative):
    tree("x/b.jpg")
    Path("link").symlink_to("in")
    Path("list").write_text(f"{entry}\nlast.jpg\n")
    source = sources(files_from="list", root="in")[0]
    assert source.path == entry
    if relative is None:
        assert source.relative.startswith("..")
    else:
        assert source.relative == relative


def test_list_entries_without_root_are_named_by_their_last_component(tree):
    Path("list").write_text("x/a.jpg\n../b.jpg\n")
    assert relatives(files_from="list") == ["a.jpg", "b.jpg"]


def test_arguments_come_before_lists(tree):
    tree("a.jpg")
    Path("list").write_text("b.jpg\nin/a.jpg\n")
    found = sources("in", "-", files_from="list")
    assert [s.origin for s in found] == ["folder", "stdin", "list"]
    assert found[1] == Source("-", "stdin", "stdin")


def test_empty_list_is_a_usage_error():
    with pytest.raises(UsageError, match="names no file"):
        sources(files_from="-")


def test_list_that_cannot_be_read_is_a_usage_error(tree):
    tree("a.jpg")
    for name, says in (("gone", "no such list"), ("in", "is a folder"), ("nul\0", "no such list")):
        with pytest.raises(UsageError, match=says):
            check_arguments([], files_from=name)
    with pytest.raises(UsageError, match="cannot read the list 'gone'"):
        sources(files0_from="gone")


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ([], {}, "no input given"),
        (["in"], {"root": "in"}, "--root goes with"),
        (["-", "-"], {}, "only once"),
        (["-"], {"files_from": "-"}, "only once"),
        ([], {"files_from": "-", "files0_from": "-"}, "only once"),
        (["-", "in"], {"recursive": True}, "does not go with -r"),
        (["gone"], {}, "no such file or folder: 'gone'$"),
        (["gone", "", "a\0b"], {}, "nor any of the 2 other inputs"),
        (["in/empty"], {}, "'in/empty' holds no image$"),
        (["in/a.jpg", "in/empty"], {"recursive": True}, "'in/empty' holds no image$"),
        (["in/deep"], {}, "'in/deep' holds no image, its subfolders do"),
        (["in/deep"], {"recursive": True, "exclude_dir": "in/deep/x"}, "holds no image$"),
    ],
)
def test_arguments_that_cannot_become_a_run(tree, args, options, message):
    tree("a.jpg", "empty/notes.txt", "deep/x/a.jpg")
    with pytest.raises(UsageError, match=message):
        check_arguments(args, **options)


def test_arguments_that_can(tree):
    tree("a.jpg", "deep/x/a.jpg")
    Path("list").touch()
    check_arguments(["gone", "in/a.jpg", "in"])
    check_arguments(["in/deep"], recursive=True)
    check_arguments(["-"])
    check_arguments(["gone"], files_from="list", root="in")
    check_arguments([], files_from="-", files0_from="list")
