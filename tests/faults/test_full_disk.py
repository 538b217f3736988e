"""Places that cannot take what a run writes, and inputs that change under it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def records(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MB in a namespace of its own: what runs commands in it, and its path.

    It goes with the process that holds the namespace, whatever becomes of the test.
    """
    place = tmp_path / "disk"
    place.mkdir()
    # A new user namespace permits mounts to those who are not root.
    holder = subprocess.Popen(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            'mount -t tmpfs -o size=1m tmpfs "$0" && echo && cat',
            place,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with holder:
        if not holder.stdout.readline():
            pytest.skip(f"no file system can be mounted here: {holder.stderr.read().decode()}")

        def inside(*args, **options):
            # It enters the folder by name: the one from before is that below the mount.
            enter = ["nsenter", "-t", str(holder.pid), "-U", "-m", "--preserve-credentials"]
            change = ["sh", "-c", 'cd "$0" && exec "$@"', tmp_path]
            options = {"capture_output": True, "timeout": 120, "check": False, **options}
            return subprocess.run([*enter, *change, *map(str, args)], **options)

        yield inside, Path(f"/proc/{holder.pid}/root") / place.relative_to("/")
        holder.stdin.close()
        holder.wait(timeout=30)


def test_full_disk_leaves_whole_files_and_a_way_on(
    disk, command, tree, tiny_model, contents, parts, check_record
):
    inside, place = disk
    # Masks of noise take 20 kB each.
    run = (
        *command,
        "segment",
        tree(60, (320, 240), suffix=".bmp"),
        "-r",
        "-m",
        tiny_model(),
        "--jsonl",
    )
    calm = inside(*run, "-o", "calm")
    assert calm.returncode == 0
    whole = contents("calm")
    assert sum(map(len, whole.values())) > 1 << 20

    full = inside(*run, "-o", "disk/out")
    assert full.returncode == 1
    assert b"Traceback" not in full.stderr
    assert full.stderr.count(b"No space left on device") == 5
    assert b"--skip-existing" in full.stderr
    found = records(full.stdout)
    for record in found:
        check_record(record)
    assert [r["path"] for r in found] == [r["path"] for r in records(calm.stdout)]
    failed = [r for r in found if r["status"] == "error"]
    assert 0 < len(failed) < 60
    assert {r["error"]["code"] for r in failed} == {"write"}
    assert all("No space left" in r["error"]["message"] for r in failed)
    published = contents(place / "out")
    assert len(published) == 60 - len(failed)
    assert published.items() <= whole.items()
    assert not parts(place)

    assert inside("mount", "-o", "remount,size=8m", place.name).returncode == 0
    resumed = inside(*run, "-o", "disk/out", "--skip-existing")
    assert resumed.returncode == 0
    assert contents(place / "out") == whole
    assert not parts(place)


def test_disk_without_a_free_byte(disk, command, picture, tiny_model, contents):
    inside, place = disk
    inside("dd", "if=/dev/zero", "of=disk/filler", "bs=4096")
    run = (*command, "segment", picture("a.png"), "-m", tiny_model())
    done = inside(*run, "-o", "disk/out.png")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"No space left" in done.stderr
    assert list(contents(place)) == ["filler"]


def test_read_only_output(disk, command, picture, tiny_model):
    inside, _ = disk
    assert inside("mount", "-o", "remount,ro", "disk").returncode == 0
    run = (*command, "segment", picture("a.png"), "-m", tiny_model(), "-o")
    for output in ("disk/out/", "disk/a.png"):
        done = inside(*run, output)
        assert (done.returncode, done.stdout) == (5, b""), output
        assert done.stderr.count(b"\n") <= 2
        assert b"Traceback" not in done.stderr


def test_outputs_that_turn_read_only(disk, command, tree, tiny_model, contents, finish):
    """The run has begun; what is there stays whole, the rest are records, none is a bug."""
    inside, place = disk
    names = [str(p) for p in sorted(tree(40).rglob("*.png"))]
    os.mkfifo("list")
    runner = (*command, "segment", "--files0-from", "list", "-m", tiny_model(), "--jsonl")
    outer = ["nsenter", "-t", place.parts[2], "-U", "-m", "--preserve-credentials"]
    with subprocess.Popen(
        [
            *outer,
            *("sh", "-c", 'cd "$0" && exec "$@"', Path.cwd()),
            *map(str, (*runner, "-o", "disk/out")),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        with Path("list").open("wb", buffering=0) as feed:
            feed.write(b"".join(n.encode() + b"\0" for n in names[:20]))
            first = process.stdout.readline()
            assert json.loads(first)["status"] == "ok"
            remounted = 1
            # Refused while a file is open for writing there, and few are at any time.
            for _ in range(200):
                remounted = inside("mount", "-o", "remount,ro", "disk").returncode
                if not remounted:
                    break
            assert remounted == 0
            feed.write(b"".join(n.encode() + b"\0" for n in names[20:]))
        out, err = finish(process)
    assert process.returncode == 1
    assert b"Traceback" not in err
    found = records(first + out)
    assert [r["path"] for r in found] == names
    assert {r["error"]["code"] for r in found if r["status"] == "error"} == {"write"}
    assert len(contents(place / "out")) == sum(r["status"] == "ok" for r in found) < 40


@pytest.fixture
def fed(start, tiny_model):
    """A run over a list on stdin that has done its first pictures: the process and its record."""

    def begin(names, *more):
        process = start(
            *("segment", "-m", tiny_model(), "--files0-from", "-", "-o", "out", "--jsonl", *more)
        )
        process.stdin.write(b"".join(os.fsencode(n) + b"\0" for n in names))
        process.stdin.flush()
        return process, process.stdout.readline()

    return begin


def test_output_folder_that_vanishes_is_made_again(fed, tree, contents, finish):
    names = sorted(tree(40).rglob("*.png"))
    process, first = fed(names[:20])
    # Not rmtree: a mask may come in while it goes through the folder.
    Path("out").rename("gone")
    process.stdin.write(b"".join(os.fsencode(n) + b"\0" for n in names[20:]))
    out, err = finish(process)
    assert b"Traceback" not in err
    found = records(first + out)
    assert len(found) == 40
    # What was being written at that moment may fail, and says so.
    failed = [r for r in found if r["status"] == "error"]
    assert process.returncode == (1 if failed else 0)
    assert {r["error"]["code"] for r in failed} <= {"write"}
    written = contents("out").keys() | contents("gone").keys()
    assert {Path(r["outputs"][0]).name for r in found if r["status"] == "ok"} <= written
    assert contents("out").keys() >= {p.name for p in names[30:]}


def test_output_folder_that_becomes_a_file(fed, tree, finish):
    names = sorted(tree(40).rglob("*.png"))
    process, first = fed(names[:20])
    Path("out").rename("gone")
    for number in range(1000):
        # A worker may have made the folder anew.
        try:
            Path("out").touch(exist_ok=False)
            break
        except FileExistsError:
            Path("out").rename(f"gone{number}")
    process.stdin.write(b"".join(os.fsencode(n) + b"\0" for n in names[20:]))
    out, err = finish(process)
    assert process.returncode == 1
    assert b"Traceback" not in err
    found = records(first + out)
    assert [r["status"] for r in found[30:]] == ["error"] * 10
    assert {r["error"]["code"] for r in found[30:]} == {"write"}


def test_inputs_that_change_under_the_run(fed, tree, contents, check_record, finish):
    names = sorted(tree(40).rglob("*.png"))
    process, first = fed(names[:10])
    names[20].unlink()
    names[21].write_bytes(b"no picture any more")
    names[22].unlink()
    names[22].mkdir()
    shutil.copy(names[39], names[23])
    # Cut in place, as by someone who copies over it.
    os.truncate(names[24], 50)
    process.stdin.write(b"".join(os.fsencode(n) + b"\0" for n in names[10:]))
    out, err = finish(process)
    assert process.returncode == 1
    assert b"Traceback" not in err
    found = records(first + out)
    for record in found:
        check_record(record)
    codes = {i: r["error"]["code"] for i, r in enumerate(found) if r["status"] == "error"}
    assert codes == {20: "missing", 21: "decode", 22: "missing", 24: "decode"}
    masks = contents("out")
    assert len(masks) == 36
    assert masks[names[23].name] == masks[names[39].name]


def test_folder_whose_files_go_while_it_is_walked(start, tree, tiny_model, finish):
    """All of them are known before the first is read; those that are gone are records."""
    root = tree(200)
    process = start("segment", root, "-r", "-m", tiny_model(), "-o", "out", "--jsonl")
    first = process.stdout.readline()
    shutil.rmtree(root / "4")
    out, err = finish(process)
    assert process.returncode == 1
    assert b"Traceback" not in err
    found = records(first + out)
    errors = [r for r in found if r["status"] == "error"]
    assert errors
    assert {r["error"]["code"] for r in errors} == {"missing"}
    # A folder that goes before it is looked into leaves nothing to be named.
    assert 160 < len(found) <= 200


def test_output_that_is_a_file(segcli_process, tree, tiny_model):
    Path("out").write_text("in the way")
    done = segcli_process("segment", tree(3), "-r", "-m", tiny_model(), "-o", "out/")
    assert (done.returncode, done.stdout) == (5, b"")
    done = segcli_process("segment", "in", "-r", "-m", tiny_model(), "-o", "out")
    assert (done.returncode, done.stdout) == (2, b"")
    assert Path("out").read_text() == "in the way"


def limited(command, limits, *args):
    """Runs segcli below the limits of ``prlimit``."""
    return subprocess.run(
        ["prlimit", *limits, *map(str, (*command, *args))],
        capture_output=True,
        timeout=120,
        check=False,
    )


def test_files_that_may_not_grow(command, tree, picture, tiny_model, contents, parts):
    tree(4, (240, 180), suffix=".bmp")
    small = picture("in/small.png")
    run = ("segment", "in", "-r", "-m", tiny_model(), "--jsonl", "-o")
    assert limited(command, (), *run, "calm").returncode == 0
    whole = contents("calm")
    done = limited(command, ("--fsize=4096",), *run, "out")
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    found = records(done.stdout)
    assert [r.get("error", {}).get("code") for r in found] == [*["write"] * 4, None]
    assert contents("out") == {small.name: whole[small.name]}
    assert not parts(".")


@pytest.mark.parametrize("more_mb", [0, 20, 60, 130])
def test_one_picture_that_memory_does_not_hold(
    command, picture, tiny_model, contents, parts, fed, finish, check_record, more_mb
):
    """12 megapixels, of which a float32 tensor takes 144 MB: as an image, a tensor, or logits."""
    idle, _ = fed(picture(f"small/{i}.png") for i in range(12))
    status = Path(f"/proc/{idle.pid}/status").read_text()
    finish(idle)
    picture("in/a.png"), picture("in/c.png")
    Image.new("P", (4000, 3000)).save("in/b.png")
    [peak] = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmPeak:")]
    limit = f"--as={peak * 1024 + more_mb * 1_000_000}"
    run = ("segment", "in", "-m", tiny_model(), "--workers", "1", "--jsonl", "-o", "masks")
    done = limited(command, (limit,), *run)
    assert b"Traceback" not in done.stderr
    assert done.returncode in (0, 1), done.stderr.decode()
    found = records(done.stdout)
    for record in found:
        check_record(record)
    assert [found[0]["status"], found[2]["status"]] == ["ok", "ok"]
    assert found[1].get("error", {}).get("code") in (None, "too_large", "inference", "write")
    assert len(contents("masks")) == sum(r["status"] == "ok" for r in found)
    assert not parts(".")


@pytest.mark.parametrize("files", [24, 16, 12])
def test_few_descriptors(command, tree, tiny_model, contents, parts, files):
    """A list of inputs, nested folders, five workers: few files are open at any time."""
    root = tree(30)
    run = ("segment", root, "-r", "-m", tiny_model(), "--workers", "5", "--jsonl", "-o", "out")
    done = limited(command, (f"--nofile={files}",), *run)
    assert b"Traceback" not in done.stderr
    assert done.returncode in (0, 1), done.stderr.decode()
    found = records(done.stdout)
    assert len(found) == 30
    assert len(contents("out")) == sum(r["status"] == "ok" for r in found)
    assert not parts(".")


def test_masks_of_noise_are_what_they_should_be(tree, tiny_model, segcli_process, contents):
    """The other tests compare runs with each other; this one with the pictures themselves."""
    assert segcli_process("segment", tree(3), "-r", "-m", tiny_model(), "-o", "out").returncode == 0
    for name, data in contents("out").items():
        with Image.open(f"in/{name}") as image, Image.open(f"out/{name}") as mask:
            assert np.array_equal(np.asarray(mask), np.asarray(image).argmax(2))
        assert data.startswith(b"\x89PNG")
