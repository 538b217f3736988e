"""What only the file descriptors of a real process show."""

import json
import os
import subprocess
from pathlib import Path

import pytest

NOISE = "noise of a native library"

POLLUTER = f"""\
import importlib.abc, importlib.machinery, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            sys.meta_path.remove(self)
            # Past Python's own stream, as C code would.
            os.write(1, b"{NOISE}\\n")
            print("{NOISE}")

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def polluted(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(POLLUTER)
    return {"PYTHONPATH": str(site)}


def test_noise_does_not_reach_an_image(segcli_process, polluted, picture, tiny_model):
    args = ("segment", "-m", tiny_model(), picture(), "-o", "-")
    done = segcli_process(*args, **polluted)
    assert done.returncode == 0
    assert done.stdout == segcli_process(*args).stdout
    assert done.stderr.decode().count(NOISE) == 2


def test_noise_does_not_reach_records(segcli_process, polluted, picture, tiny_model):
    done = segcli_process(
        "segment", "-m", tiny_model(), picture(), "-o", "x.png", "--jsonl", **polluted
    )
    assert json.loads(done.stdout)["status"] == "ok"
    model = tiny_model("c.onnx", task="classification", palette=())
    done = segcli_process("classify", "-m", model, picture().name, **polluted)
    assert [line.split(b"\t")[0] for line in done.stdout.splitlines()] == [b"a.png"] * 3


def test_noise_does_not_reach_the_report(segcli_process, polluted):
    done = segcli_process("doctor", "--json", **polluted)
    assert json.loads(done.stdout)
    assert NOISE in done.stderr.decode()


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["segment", "none.png", "-o", "x.png"], 2),
        (["segment", "a.png", "--no-such-flag"], 2),
        (["segment", "a.png", "-m", "nonsense", "-o", "x.png"], 3),
        (["no-such-command"], 2),
        (["models", "show", "nonsense"], 3),
        (["export", "nonsense"], 2),
    ],
)
def test_errors_go_to_stderr_only(segcli_process, picture, args, code):
    picture()
    done = segcli_process(*args)
    assert (done.returncode, done.stdout) == (code, b"")
    assert done.stderr
    assert b"Traceback" not in done.stderr


def test_debug_shows_a_traceback(segcli_process, picture):
    done = segcli_process("segment", picture(), "-m", "nonsense", "-o", "x.png", "--debug")
    assert done.returncode == 3
    assert b"Traceback" in done.stderr


def in_shell(command, redirection, *args):
    """Runs segcli from a shell that closes or redirects descriptors first."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command, *map(str, args)],
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_closed_stderr(command, picture, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ("segment", "-m", tiny_model(), picture(), "none.png", "-o", "out", "--jsonl")
    done = in_shell(command, "2>&-", *args)
    assert done.returncode == 1
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["ok", "error"]
    assert Path("out/a.png").is_file()


def test_closed_stdout(command, picture, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = in_shell(command, ">&-", "segment", "-m", tiny_model(), picture(), "-o", "x.png")
    assert Path("x.png").is_file()
    assert b"Traceback" not in done.stderr
    # Nobody could be told the file's name; and an image for stdout would be lost.
    assert done.returncode == 5
    done = in_shell(command, ">&-", "segment", "-m", tiny_model(), picture(), "-o", "-")
    assert done.returncode == 5
    assert b"cannot write to stdout" in done.stderr


def test_closed_stdin(command, picture, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = in_shell(command, "<&-", "segment", "-m", tiny_model(), picture(), "-o", "x.png")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"x.png\n", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_stderr(command, picture, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ("segment", "-m", tiny_model(), picture(), "none.png", "-o", "out", "--jsonl")
    done = in_shell(command, "2>/dev/full", *args)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_stdout(command, picture, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ("segment", "-m", tiny_model(), picture(), "-o", "-")
    done = in_shell(command, ">/dev/full", *args)
    assert done.returncode == 5
    assert b"Traceback" not in done.stderr
    assert b"No space left" in done.stderr


def test_a_pipe_as_output(command, picture, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    with subprocess.Popen(
        [*command, "segment", "-m", str(tiny_model()), str(picture()), "-o", "pipe.png"],
        stdout=subprocess.PIPE,
    ) as process:
        data = Path("pipe.png").read_bytes()
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert data.startswith(b"\x89PNG")
