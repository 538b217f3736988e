"""The two streams: results on stdout and nothing else there, all talk on stderr.

The only room that prints. While a command runs, file descriptor 1 points at stderr, so that what
native libraries print cannot reach a pipeline; results go to the saved descriptor.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from segcli.errors import ImageError, OutputError, SegcliError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

# After so many errors of single images the rest are only counted.
MAX_SHOWN_ERRORS = 5


class ReaderGone(Exception):
    """The reader of stdout went away: stop quietly, exit 141.

    No OSError, so that Typer's own handling of EPIPE, which exits 1, does not see it.
    """


class Results:
    """The real stdout, for bytes; unbuffered, so that each record leaves as it is done."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes) -> int:
        """Writes all of ``data``.

        Raises:
            ReaderGone: The reader went away.
            OutputError: It cannot be written, a full disk for instance.
        """
        try:
            if self._descriptor is None:
                sys.stdout.buffer.write(data)
            else:
                view = memoryview(data)
                while view:
                    view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise _not_written(error) from error
        return len(data)

    def flush(self) -> None:
        """Does nothing: every write has left already."""

    def line(self, text: str, end: bytes = b"\n") -> None:
        """Writes one line; undecodable bytes of file names come out as they were."""
        self.write(os.fsencode(text) + end)

    def isatty(self) -> bool:
        """Says whether results go to a terminal."""
        if self._descriptor is None:
            return sys.stdout.isatty()
        return os.isatty(self._descriptor)


@contextlib.contextmanager
def results() -> Iterator[Results]:
    """Opens stdout for results; until it closes, anything else printed there goes to stderr."""
    try:
        stdout, stderr = sys.stdout.fileno(), sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        # A test runner's stand-in has no descriptor to guard.
        yield Results(None)
        return
    sys.stdout.flush()
    saved = os.dup(stdout)
    os.dup2(stderr, stdout)
    try:
        yield Results(saved)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os.dup2(saved, stdout)
        os.close(saved)


class Talk:
    """What is said on stderr.

    Args:
        quiet: Errors only.
        verbose: Adds a line per image.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self._errors = 0

    def note(self, text: str) -> None:
        """Says one line, unless quiet."""
        if not self.quiet:
            self._say(text)

    def detail(self, text: str) -> None:
        """Says one line if verbose."""
        if self.verbose:
            self._say(text)

    def image_error(self, error: ImageError) -> None:
        """Says why one image failed; the sixth and later are only counted."""
        self._errors += 1
        if self._errors <= MAX_SHOWN_ERRORS or self.verbose:
            show_error(error)

    def hidden_errors(self) -> None:
        """Says how many errors were only counted."""
        if self._errors > MAX_SHOWN_ERRORS and not self.verbose:
            self._say(f"and {self._errors - MAX_SHOWN_ERRORS} more errors (-v shows all)")

    def _say(self, text: str) -> None:
        say(f"segcli: {text}")


def watch_stdout() -> None:
    """Makes what Typer prints, help for instance, fail as ``Results`` does."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    stdout = sys.stdout
    # Line by line on a terminal, as Python does it.
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Watched(stdout.fileno(), "w", closefd=False)),
        encoding=stdout.encoding,
        errors="backslashreplace",
        line_buffering=stdout.line_buffering,
    )


class _Watched(io.FileIO):
    def write(self, data: Any, /) -> int:  # noqa: ANN401
        try:
            return super().write(data)
        except OSError as error:
            raise _not_written(error) from error


def _not_written(error: OSError) -> ReaderGone | OutputError:
    if isinstance(error, BrokenPipeError):
        return ReaderGone()
    return OutputError(f"cannot write to stdout: {error.strerror}")


def say_at_once(text: str) -> None:
    """Says one line from within a signal handler, where Python's own stream may be busy."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), f"{text}\n".encode())


def say(text: str) -> None:
    """Prints one line on stderr, control characters of file names made visible."""
    # Stderr that is closed or full must not change what the run does.
    with contextlib.suppress(OSError, ValueError):
        print(visible(text), file=sys.stderr, flush=True)


def show_error(error: SegcliError) -> None:
    """Prints an error and its hint."""
    say(f"segcli: error: {error}")
    if error.hint:
        say(f"hint: {error.hint}")


def visible(text: str) -> str:
    """Returns ``text`` with control characters and undecodable bytes escaped."""
    return "".join(
        c
        if c.isprintable()
        else c.encode("unicode_escape", "backslashreplace").decode()
        if not "\ud800" <= c <= "\udfff"
        else f"\\x{ord(c) & 0xFF:02x}"
        for c in text
    )


def terminal(out: Results) -> "RichConsole":
    """Returns a Rich console that draws on the results' terminal."""
    from rich.console import Console

    class _File:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            return out.write(text.encode("utf-8", "backslashreplace"))

        def flush(self) -> None:
            out.flush()

        def isatty(self) -> bool:
            return out.isatty()

    file: Any = _File()
    return Console(file=file, markup=False, highlight=False)


def dump_json(out: Results, value: object) -> None:
    """Writes one indented JSON value."""
    out.write(json.dumps(value, indent=2, ensure_ascii=True).encode() + b"\n")
