import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from segcli import atomic
from segcli.atomic import hold_mark, open_atomic, sweep_parts, write_atomic
from segcli.errors import OutputError, OutputExists, OutputWriteError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Path(name).write_text(name)


def parts(folder="."):
    return [p.name for p in Path(folder).iterdir() if p.name.endswith(".segcli-part")]


def test_write_creates_folders_and_replaces():
    write_atomic("x/y/a.png", b"one")
    write_atomic("x/y/a.png", b"two")
    assert Path("x/y/a.png").read_bytes() == b"two"
    assert [p.name for p in Path("x/y").iterdir()] == ["a.png"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_is_what_the_umask_leaves(umask, mode):
    before = os.umask(umask)
    try:
        write_atomic("a.png", b"")
    finally:
        os.umask(before)
    assert Path("a.png").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    "name", [b"caf\xe9.png", b"x" * 251 + b".png", "é".encode() * 125 + b"1.png", b"[a] \n.png"]
)
def test_any_name_of_the_file_system(name):
    write_atomic(os.fsdecode(name), b"data")
    assert Path(os.fsdecode(name)).read_bytes() == b"data"
    assert not parts()


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("call", ["write", "replace", "link"])
def test_failure_leaves_the_target_and_no_part(monkeypatch, call, replace):
    Path("old.png").write_bytes(b"old")
    name = "old.png" if replace else "new.png"

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    if call == "link":
        monkeypatch.setattr(os, "replace", fail)
    if call == "replace" and not replace:
        write_atomic(name, b"new", replace=False)
        return
    with pytest.raises(OutputWriteError, match=f"cannot write '{name}': No space left") as caught:
        write_atomic(name, b"new", replace=replace)
    assert "--skip-existing" in caught.value.hint
    assert Path("old.png").read_bytes() == b"old"
    assert not Path("new.png").exists()
    assert not parts()


def test_interrupt_leaves_no_part(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic("a.png", b"x")
    assert not parts()
    assert not Path("a.png").exists()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("in", "Is a directory"),
        ("a.jpg/x.png", "Not a directory|File exists"),
        ("x" * 256, "File name too long"),
        ("a\0b", "null"),
        ("", ""),
    ],
)
def test_what_cannot_be_written_says_why(path, reason):
    with pytest.raises(OutputWriteError, match=f"cannot write .*: .*({reason})"):
        write_atomic(path, b"x")
    assert not parts()


def test_no_clobber(monkeypatch):
    write_atomic("new.png", b"one", replace=False)
    with pytest.raises(OutputExists, match=r"'new\.png' exists"):
        write_atomic("new.png", b"two", replace=False)
    # Another process was quicker: the check comes too early, the link does not.
    monkeypatch.setattr(atomic, "_status", lambda path: None)
    with pytest.raises(OutputExists):
        write_atomic("new.png", b"two", replace=False)

    def no_links(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OutputExists):
        write_atomic("new.png", b"two", replace=False)
    write_atomic("other.png", b"three", replace=False)
    assert Path("new.png").read_bytes() == b"one"
    assert Path("other.png").read_bytes() == b"three"
    assert not parts()


def test_a_mark_outlasts_sweeps_and_nothing_else():
    with hold_mark(Path("new/out")) as mark:
        sweep_parts("new/out")
        # Another run's, and what one left that was killed.
        old = Path("new/out/.run.0123456789ab.segcli-mark")
        old.touch()
        with hold_mark(Path("new/out")) as other:
            assert Path(other).is_file()
        assert not old.exists()
        assert Path(mark).is_file()
        assert Path(mark).parent == Path("new/out").absolute()
    assert not Path("new").exists()
    with pytest.raises(OutputError, match=r"cannot write into 'a.jpg/out': Not a directory"):
        hold_mark(Path("a.jpg/out")).__enter__()


def test_parts_of_some_names_are_swept_alone():
    left = []
    for name in ("a.png", "b.png", "ü" * 127):
        with open_atomic(f"in/{name}"):
            left += parts("in")
    for part in left:
        Path("in", part).touch()
    sweep_parts("in", {"a.png", "ü" * 127})
    assert parts("in") == [left[1]]
    assert left[1].startswith(".b.png.")


def test_what_cannot_be_tidied_up_is_written_all_the_same(monkeypatch):
    """As on a file system that turns read-only right after."""

    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    write_atomic("a.png", b"one")
    assert Path("a.png").read_bytes() == b"one"


def test_a_link_is_replaced_and_what_it_points_to_stays():
    Path("in/real.png").write_bytes(b"old")
    Path("link.png").symlink_to("in/real.png")
    write_atomic("link.png", b"new")
    assert not Path("link.png").is_symlink()
    assert Path("link.png").read_bytes() == b"new"
    assert Path("in/real.png").read_bytes() == b"old"
    # A folder that is a link stays one.
    Path("folder").symlink_to("in")
    write_atomic("folder/real.png", b"newer")
    assert Path("in/real.png").read_bytes() == b"newer"
    assert not parts() + parts("in")


def test_pipes_and_devices_are_written_directly():
    os.mkfifo("pipe")
    data = os.urandom(1 << 20)
    received = []
    reader = threading.Thread(target=lambda: received.append(Path("pipe").read_bytes()))
    reader.start()
    write_atomic("pipe", data, replace=False)
    reader.join()
    assert received == [data]
    assert Path("pipe").is_fifo()
    write_atomic("/dev/null", b"x")
    with pytest.raises(OutputWriteError, match="No space left"):
        write_atomic("/dev/full", b"x")


def test_sweep_takes_stale_parts_only():
    stale, held, other = ".a.png.12ab.segcli-part", ".b.png.34cd.segcli-part", "x.segcli-part"
    for name in (stale, held, other):
        Path(name).write_bytes(b"half")
    Path(".dir.segcli-part").mkdir()
    Path(".link.segcli-part").symlink_to("a.jpg")
    with Path(held).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep_parts("")
        assert sorted(parts()) == sorted([held, other, ".dir.segcli-part", ".link.segcli-part"])
    sweep_parts(".")
    assert held not in parts()
    assert Path("a.jpg").exists()
    sweep_parts("no/such/folder")


def test_part_is_locked_until_the_rename(monkeypatch):
    replace = os.replace

    def sweep_first(part, target):
        sweep_parts(".")
        replace(part, target)

    monkeypatch.setattr(os, "replace", sweep_first)
    write_atomic("a.png", b"whole")
    assert Path("a.png").read_bytes() == b"whole"


def test_part_swept_before_its_lock_is_written_again(monkeypatch):
    flock = fcntl.flock
    swept = []

    def sweep_once(file, operation):
        if not swept:
            swept.extend(parts())
            Path(swept[0]).unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_once)
    write_atomic("a.png", b"whole")
    assert Path("a.png").read_bytes() == b"whole"
    assert swept
    assert not parts()


def test_many_writers_and_sweeps_leave_one_whole_file():
    contents = [bytes([i]) * 50_000 for i in range(8)]
    errors = []

    def work(data):
        try:
            for _ in range(20):
                write_atomic("same.png", data)
                sweep_parts(".")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(c,)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert Path("same.png").read_bytes() in contents
    assert not parts()
