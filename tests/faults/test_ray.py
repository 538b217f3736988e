"""``--engine ray``: the files and records of the local engine, whatever becomes of its workers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")

pytestmark = pytest.mark.slow

# To tell this test's workers from those of any other run on the machine.
MARK = "SEGCLI_TEST_MARK"


@pytest.fixture
def tree(picture):
    """Images in folders, one that is damaged, one that is no file, names that need care."""
    for i in range(24):
        picture(f"in/{'deep/er/' * (i % 3)}{i:02} ü%.png", (90 + i, 60), 20 + i)
    Path("in/deep/bad.png").write_bytes(b"damaged")
    Path("in/gone.png").symlink_to("nowhere")
    return Path("in")


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """Lists the process ids of this test's workers."""
    monkeypatch.setenv(MARK, str(tmp_path))
    mark = f"{MARK}={tmp_path}".encode()

    def find():
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_worker = (folder / "cmdline").read_bytes().startswith(b"ray::Worker")
                if is_worker and mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    return find


def none_is_left(workers):
    deadline = time.monotonic() + 20
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers() == []


def records(stdout, out):
    return [json.loads(line) for line in stdout.decode().replace(f'"{out}/', '"out/').splitlines()]


def test_same_files_and_records_as_here(segcli_process, tiny_model, tree, contents, parts):
    run = ("segment", "in", "-r", "-m", tiny_model(), "--jsonl", "--no-timing", "-f", "mask")
    run += ("-f", "overlay", "--device", "cpu")
    here = segcli_process(*run, "-o", "here")
    assert here.returncode == 1
    for count in ("1", "2"):
        there = segcli_process(*run, "-o", count, "--engine", "ray", "--workers", count)
        assert there.returncode == 1, there.stderr
        assert records(there.stdout, count) == records(here.stdout, "here")
        assert contents(count) == contents("here")
        assert parts(count) == []
    assert len(contents("here")) == 48
    assert b"ray" not in there.stderr.lower()
    again = segcli_process(*run, "-o", "1", "--engine", "ray", "--workers", "1", "--skip-existing")
    statuses = [record["status"] for record in records(again.stdout, "1")]
    assert (statuses.count("skipped"), statuses.count("error")) == (24, 2)


def test_labels(segcli_process, tiny_model, tree):
    model = tiny_model("c.onnx", task="classification", palette=())
    run = ("classify", "in", "-r", "-m", model, "--jsonl", "--no-timing")
    there = segcli_process(*run, "--engine", "ray", "--workers", "1")
    assert there.stdout == segcli_process(*run).stdout
    assert len(there.stdout.splitlines()) == 26


def test_from_a_bucket_into_a_bucket(segcli_process, tiny_model, tree, bucket, contents):
    for path in sorted(tree.rglob("*.png")):
        if path.is_file():
            bucket.put(path.as_posix(), path.read_bytes())
    run = ("-r", "-m", tiny_model(), "--jsonl", "--no-timing")
    Path("in/gone.png").unlink()
    here = segcli_process("segment", "in", *run, "-o", "here")
    there = segcli_process(
        *("segment", f"{bucket.url}/in/", *run, "-o", f"{bucket.url}/out/"),
        *("--engine", "ray", "--workers", "2"),
    )
    assert (here.returncode, there.returncode) == (1, 1), there.stderr
    local = there.stdout.decode().replace(f"{bucket.url}/", "")
    assert records(local.encode(), "out") == records(here.stdout, "here")
    found = {key.removeprefix("out/"): bucket.get(key) for key in bucket.list() if key[:2] == "ou"}
    assert found == contents("here")
    assert len(found) == 24


@pytest.fixture
def photos(shared):
    """Enough work to be interrupted in."""
    data = (shared / "data" / "photos" / "china.jpg").read_bytes()
    Path("photos").mkdir()
    for i in range(60):
        Path(f"photos/{i:02}.jpg").write_bytes(data)
    return Path("photos")


@pytest.fixture
def begin(start, photos):
    """Starts a run and returns it once some of its files are there."""

    def call(*args):
        process = start("segment", photos, "-o", "out", "--engine", "ray", *args, seconds=120)
        while process.poll() is None and len(list(Path("out").glob("*.png"))) < 5:
            time.sleep(0.05)
        assert process.poll() is None
        return process

    return call


def test_a_worker_that_is_killed_loses_nothing(begin, finish, workers, contents, parts):
    process = begin("--workers", "2", "--jsonl")
    before = workers()
    while len(before) < 2:
        # The second joins when it is ready.
        assert process.poll() is None
        time.sleep(0.05)
        before = workers()
    os.kill(before[0], signal.SIGKILL)
    out, err = finish(process)
    assert process.returncode == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [r["path"] for r in found] == [f"photos/{i:02}.jpg" for i in range(60)]
    assert {r["status"] for r in found} == {"ok"}
    assert len(contents("out")) == 60
    assert len(set(contents("out").values())) == 1
    assert b"\x1b" not in err
    none_is_left(workers)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_ends_clean_and_is_resumed(
    begin, finish, workers, number, code, segcli_process, contents, parts
):
    process = begin("--workers", "1")
    process.send_signal(number)
    _, err = finish(process)
    assert process.returncode == code, err
    assert b"Traceback" not in err
    assert parts("out") == []
    none_is_left(workers)
    done = contents("out")
    assert 5 <= len(done) < 60
    again = segcli_process("segment", "photos", "-o", "out", "--skip-existing")
    assert again.returncode == 0
    assert len(contents("out")) == 60
    assert len(set(contents("out").values())) == 1


def test_records_leave_while_the_list_goes_on(start, tiny_model, picture):
    picture("a.png")
    process = start(
        *("segment", "--files-from", "-", "-o", "out", "-m", tiny_model(), "--jsonl"),
        *("--engine", "ray", "--workers", "1"),
    )
    process.stdin.write(b"a.png\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["status"] == "ok"
    process.stdin.close()
    assert process.wait() == 0


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--ray-address", "auto"), 2, "--ray-address goes with --engine ray"),
        (("--gpus-per-worker", "1"), 2, "--gpus-per-worker goes with --engine ray"),
        (("--engine", "ray", "--gpus-per-worker", "-1"), 2, "is not a number from 0 up"),
        (("--engine", "ray", "--gpus-per-worker", "1.5"), 2, "above 1 there are only whole GPUs"),
        (("--engine", "ray", "--gpus-per-worker", "9"), 2, "that Ray finds on this machine: "),
        (("--engine", "ray", "--workers", "999"), 2, "takes 999 cores"),
        (("--engine", "ray", "--ray-address", "127.0.0.1:1"), 4, "cannot be reached"),
    ],
)
def test_refusals(segcli_process, tiny_model, picture, args, code, says):
    picture("a.png")
    ran = segcli_process("segment", "a.png", "-m", tiny_model(), "-o", "x.png", *args)
    assert (ran.returncode, ran.stdout) == (code, b"")
    assert says in ran.stderr.decode()
    assert len(ran.stderr.splitlines()) <= 2
    assert not Path("x.png").exists()


def test_memory_is_not_shared(segcli_process, tiny_model, picture):
    picture("a.png")
    run = ("segment", "a.png", "-m", tiny_model(), "--engine", "ray", "--workers", "1")
    ran = segcli_process(*run, "-o", "memory://b/x.png")
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert b"in the memory of one process, and Ray has several" in ran.stderr
    Path("list").write_text("memory://b/b.png\na.png\n")
    ran = segcli_process("segment", "--files-from", "list", *run[2:], "-o", "out/", "--jsonl")
    codes = [record.get("error", {}).get("code") for record in records(ran.stdout, "out")]
    assert (ran.returncode, codes) == (1, ["missing", None])


@pytest.fixture
def begin_start(start, tiny_model, picture):
    """Starts a run and returns it once it hears signals: while Ray starts."""
    picture("a.png")
    run = ("segment", "--files-from", "-", "-m", tiny_model(), "-o", "out/", "--engine", "ray")
    process = start(*run, start_new_session=True)
    # The list goes on for as long as the run does.
    process.stdin.write(b"a.png\n")
    process.stdin.flush()
    status = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> 14 & 1:
        assert process.poll() is None
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("after_s", [0.5, 1.5, 2.5, 4.0])
def test_a_signal_while_ray_starts(begin_start, finish, number, code, after_s):
    time.sleep(after_s)
    begin_start.send_signal(number)
    _, err = finish(begin_start)
    assert begin_start.returncode == code, err
    assert b"Traceback" not in err


@pytest.mark.parametrize("after_s", [0.7, 1.5])
def test_a_signal_for_all_while_ray_starts(begin_start, finish, after_s):
    """As ``timeout`` and schedulers send it: what Ray has started so far ends, too."""
    time.sleep(after_s)
    sent = time.monotonic()
    os.killpg(begin_start.pid, signal.SIGTERM)
    _, err = finish(begin_start)
    assert begin_start.returncode == 143, err
    assert time.monotonic() - sent < 20


@pytest.fixture
def ray_start(monkeypatch):
    """Starts a machine of a cluster, in another view of the file system if need be."""
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_USAGE_STATS_ENABLED", "0")):
        monkeypatch.setenv(name, value)
    started = []

    def call(*options, view=()):
        command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start"]
        process = subprocess.Popen(
            [*view, *command, "--block", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        started.append(process)
        while b"Ray runtime started" not in (line := process.stdout.readline()):
            assert line, options
        # What it has to say afterwards is not much.
        return process

    yield call
    for process in reversed(started):
        process.terminate()
        process.wait(30)
        process.stdout.close()


@pytest.fixture
def head(ray_start):
    """Starts the first machine of a cluster with so many cores; returns its address."""

    def call(cores):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ray_start("--head", f"--port={port}", f"--num-cpus={cores}", "--include-dashboard=false")
        return f"127.0.0.1:{port}"

    return call


def test_a_cluster_that_is_there(segcli_process, start, finish, tiny_model, tree, head):
    cluster = head(1)
    run = ("segment", "in", "-r", "-m", tiny_model(), "--jsonl", "--no-timing", "--device", "cpu")
    there = (*run, "-o", "there", "--engine", "ray", "--ray-address", cluster)
    here = segcli_process(*run, "-o", "here")
    for _ in range(2):
        # It outlives a run.
        ran = segcli_process(*there)
        assert ran.returncode == 1, ran.stderr
        assert records(ran.stdout, "there") == records(here.stdout, "here")
    # More than it has: it might grow.
    process = start(*there, "--threads", "4", seconds=60)
    time.sleep(8)
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = finish(process)
    assert (process.returncode, err) == (130, b"segcli: interrupted\n")
    assert time.monotonic() - sent < 10


# Where "own" is a folder of its own.
ELSEWHERE = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none own && exec "$@"', "sh")


def test_a_machine_with_other_files(
    segcli_process, tiny_model, tree, picture, contents, parts, head, ray_start
):
    Path("own").mkdir()
    try:
        subprocess.run([*ELSEWHERE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no leave to mount anything")
    cluster = head(0)
    ray_start(f"--address={cluster}", "--num-cpus=1", view=ELSEWHERE)
    picture("own/a.png")
    run = ("-m", tiny_model(), "--device", "cpu", "--jsonl", "--no-timing")
    there = (*run, "--engine", "ray", "--ray-address", cluster, "--workers", "1")

    # Files of an earlier run do not vouch for it.
    assert segcli_process("segment", "in/00 ü%.png", "-o", "own/out/", *run).returncode == 0
    before = contents("own")
    ran = segcli_process("segment", "in/00 ü%.png", "-o", "own/out/", *there)
    assert (ran.returncode, ran.stdout) == (4, b"")
    assert ran.stderr.decode().startswith(f"segcli: error: '{Path('own/out').absolute()}' is ano")
    assert contents("own") == before

    # Whatever it has read before.
    ran = segcli_process("segment", "in/00 ü%.png", "own/a.png", "-o", "there/", *there)
    assert ran.returncode == 4
    assert b"cannot read 'own/a.png': no such file on " in ran.stderr

    here = segcli_process("segment", "in", "-r", "-o", "here", *run)
    ran = segcli_process("segment", "in", "-r", "-o", "there", *there)
    assert ran.returncode == 1, ran.stderr
    assert records(ran.stdout, "there") == records(here.stdout, "here")
    assert contents("there") == contents("here")
    assert parts("own") == parts("there") == parts(".") == []


def test_workers_import_nothing_from_the_current_folder(
    segcli_process, tiny_model, picture, monkeypatch
):
    # As where segcli's own script is called: there this process does not, either.
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    picture("a.png"), picture("segcli/b.png")
    Path("numpy.py").write_text("raise SystemExit('not this one')")
    run = ("segment", "a.png", "segcli", "-m", tiny_model(), "-o", "out/", "--engine", "ray")
    ran = segcli_process(*run)
    assert (ran.returncode, ran.stdout) == (0, b"out/a.png\nout/b.png\n"), ran.stderr


def test_stdout_is_not_a_workers(segcli_process, tiny_model, picture):
    picture("a.png")
    ran = segcli_process("segment", "a.png", "-m", tiny_model(), "-o", "-", "--engine", "ray")
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert b"writes files, not to stdout" in ran.stderr
