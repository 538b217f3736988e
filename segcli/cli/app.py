"""The application: its commands, and the one boundary between exceptions and exit codes.

Importing this imports typer and no more: each command imports what it needs when it runs.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Annotated, NoReturn

import typer

from segcli import __version__
from segcli.atomic import discard_parts
from segcli.cli import (
    bench,
    classify,
    console,
    doctor,
    embed,
    eval,
    export,
    labels,
    models,
    options,
    segment,
)
from segcli.errors import ExitCode, SegcliError

app = typer.Typer(
    name="segcli",
    help="Masks and labels from images, with SegFormer and MobileNetV2 on ONNX Runtime.",
    epilog=options.EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich would take longer to import than all else together, and boxes up usage errors.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, command: Callable[..., None]) -> None:
    app.command(name, help=options.manual(command), epilog=options.EXIT_CODES)(command)


_add("segment", segment.segment)
_add("classify", classify.classify)
_add("embed", embed.embed)
_add("eval", eval.evaluate)
_add("export", export.export)
app.add_typer(models.app, name="models")
_add("labels", labels.labels)
_add("bench", bench.bench)
_add("doctor", doctor.doctor)


class _Stopped(BaseException):
    """A signal told us to stop: unwinds, so that temporary files go.

    Not KeyboardInterrupt, of which Typer makes something of its own.
    """

    def __init__(self, exit_code: ExitCode) -> None:
        self.exit_code = exit_code


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"segcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Masks and labels from images, with SegFormer and MobileNetV2 on ONNX Runtime.

    Try: segcli segment photo.jpg -o mask.png
    """


def main() -> NoReturn:
    """Runs the command line and exits with its code."""
    _open_standard_streams()
    console.watch_stdout()
    code = run(sys.argv[1:])
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    # All files are in place and all workers done; taking ONNX Runtime and the interpreter apart
    # would be a tenth of the time that one picture takes.
    os._exit(code)


def run(args: list[str]) -> int:
    """Runs one command line and returns the exit code; the one error boundary."""
    debug = "--debug" in args or bool(os.environ.get("SEGCLI_DEBUG"))
    if not debug:
        # Pillow warns about damaged metadata of files that it then decodes well.
        warnings.simplefilter("ignore")
    with _stoppable() as told:
        code = _run(args, told, debug=debug)
        return code if told.to_stop is None else told.to_stop


def _run(args: list[str], told: "_Told", *, debug: bool) -> int:
    try:
        try:
            app(args=args, prog_name="segcli")
        finally:
            # Help and version, which Typer prints.
            sys.stdout.flush()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else ExitCode.BUG
    except SegcliError as error:
        if told.to_stop is not None:
            # What a library makes of an interrupt within it.
            return told.to_stop
        console.show_error(error)
        _trace(debug)
        return error.exit_code
    except console.ReaderGone:
        return ExitCode.BROKEN_PIPE
    except _Stopped as stop:
        return stop.exit_code
    # All of them: what panics in Rust, as obstore may, is no Exception.
    except BaseException as error:
        if told.to_stop is not None:
            # An import in C makes an ImportError of an interrupt.
            return told.to_stop
        console.say(f"segcli: bug: {type(error).__name__}: {error}")
        console.say("hint: run it again with --debug and report the traceback")
        _trace(debug)
        return ExitCode.BUG
    return ExitCode.OK


# Until a signal that Python has passed over is sent again.
_AGAIN_S = 0.05


class _Told:
    """What signals have told this process.

    Attributes:
        to_stop: The exit code to stop with, None to go on.
        unheard: Python has passed over what would have unwound.
    """

    to_stop: ExitCode | None = None
    unheard = False


@contextlib.contextmanager
def _stoppable() -> Iterator[_Told]:
    """Makes SIGINT and SIGTERM unwind; a second one ends the process at once."""
    told = _Told()

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        interrupted = signum == signal.SIGINT
        code = ExitCode.INTERRUPTED if interrupted else ExitCode.TERMINATED
        if told.unheard:
            told.unheard = False
            raise _Stopped(told.to_stop or code)
        if told.to_stop is not None:
            discard_parts()
            os._exit(code)
        told.to_stop = code
        console.say_at_once("segcli: interrupted" if interrupted else "segcli: terminated")
        raise _Stopped(code)

    def again(unraisable: "sys.UnraisableHookArgs") -> None:
        """Where the handler ran in the midst of a finalizer, which Python lets raise nothing."""
        if not isinstance(unraisable.exc_value, _Stopped):
            hook(unraisable)
            return
        told.unheard = True
        main = threading.main_thread().ident or 0
        # Not at once: that would be within this hook.
        threading.Timer(_AGAIN_S, signal.pthread_kill, (main, taken[0])).start()

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # What is ignored stays so: the shell does that to jobs in the background.
    taken = [number for number, handler in previous.items() if handler != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, stop)
    hook = sys.unraisablehook
    sys.unraisablehook = again
    try:
        yield told
    finally:
        sys.unraisablehook = hook
        for number in taken:
            signal.signal(number, previous[number])


def _open_standard_streams() -> None:
    # Where one is closed Python has None, and the next file opened would get its number. Results
    # that nobody takes are an error, as on a full disk: there stdout cannot be written.
    modes = (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY))
    for number, (name, mode) in enumerate(modes):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, mode)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()
