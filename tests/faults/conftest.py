"""What the tests of whole processes share: pictures by the hundred, processes, what they leave."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _children_take_signals() -> Iterator[None]:
    """An ignored signal stays ignored in a child, as where the tests themselves run under nohup."""
    previous = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def start(command: tuple[str, ...]) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Starts segcli with three pipes; what still runs at the end, or after minutes, is killed."""
    with contextlib.ExitStack() as ends:

        def call(
            *args: object, seconds: float = 60.0, **options: object
        ) -> "subprocess.Popen[bytes]":
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            process = subprocess.Popen([*command, *map(str, args)], **{**pipes, **options})  # type: ignore[call-overload]
            # So that a read of a process that hangs comes to its end.
            late = threading.Timer(seconds, process.kill)
            late.start()
            ends.callback(_end, process, late)
            return process  # type: ignore[no-any-return]

        yield call


def _end(process: "subprocess.Popen[bytes]", late: threading.Timer) -> None:
    late.cancel()
    late.join()
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        # Closing stdin writes what is still in its buffer.
        with contextlib.suppress(BrokenPipeError):
            if stream:
                stream.close()


@pytest.fixture(scope="session")
def finish() -> Callable[["subprocess.Popen[bytes]"], tuple[bytes, bytes]]:
    """Ends a process's stdin and returns what is still to be read, as ``communicate`` would.

    That passes over what ``readline`` has buffered.
    """

    def call(process: "subprocess.Popen[bytes]") -> tuple[bytes, bytes]:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        with ThreadPoolExecutor(1) as pool:
            err = pool.submit(process.stderr.read)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            out = process.stdout.read()
            process.wait()
            return out, err.result()

    return call


@pytest.fixture
def tree() -> Callable[..., Path]:
    """Writes many small pictures of noise into nested folders and returns their root."""

    def make(
        count: int, size_wh: tuple[int, int] = (32, 24), *, root: str = "in", suffix: str = ".png"
    ) -> Path:
        rng = np.random.default_rng(count)
        for i in range(count):
            path = Path(root, f"{i % 5}", f"{i % 3}", f"{i:05}{suffix}")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*size_wh[::-1], 3), np.uint8)).save(path)
        return Path(root)

    return make


@pytest.fixture(scope="session")
def contents() -> Callable[..., dict[str, bytes]]:
    """Reads every file below a folder but temporary ones, by its relative path."""

    def read(folder: str | Path) -> dict[str, bytes]:
        found = {}
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and not path.name.endswith(".segcli-part"):
                found[str(path.relative_to(folder))] = path.read_bytes()
        return found

    return read


@pytest.fixture(scope="session")
def parts() -> Callable[[str | Path], list[Path]]:
    """Lists the temporary files below a folder."""
    return lambda folder: sorted(Path(folder).rglob("*.segcli-part"))


@pytest.fixture(scope="session")
def takes_over() -> Callable[["subprocess.Popen[bytes]"], bool]:
    """Says whether a process handles SIGTERM by now, which it leaves to the system at first."""

    def ask(process: "subprocess.Popen[bytes]") -> bool:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            return False
        masks = [line.split()[1] for line in lines if line.startswith(("SigCgt:", "SigBlk:"))]
        return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in masks)

    return ask


@pytest.fixture(scope="session")
def shell_code() -> Callable[[int], int]:
    """Returns the exit code that a shell shows: 128 + n for a process that signal n ended."""
    return lambda code: 128 - code if code < 0 else code


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These tests read /proc and send POSIX signals."""
    if not os.path.isdir("/proc/self"):  # noqa: PTH112
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs Linux"))
