"""The application: its commands, and the one boundary between exceptions and exit codes.

Importing this imports typer and no more: each command imports what it needs when it runs.
"""

import os
import signal
import sys
import traceback
import warnings
from types import FrameType
from typing import Annotated, NoReturn

import typer

from segcli import __version__
from segcli.cli import bench, classify, console, doctor, export, models, options, segment
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
app.command("segment", epilog=options.EXIT_CODES)(segment.segment)
app.command("classify", epilog=options.EXIT_CODES)(classify.classify)
app.command("export", epilog=options.EXIT_CODES)(export.export)
app.add_typer(models.app, name="models")
app.command("bench", epilog=options.EXIT_CODES)(bench.bench)
app.command("doctor", epilog=options.EXIT_CODES)(doctor.doctor)


class _Terminated(BaseException):
    """SIGTERM: unwinds like Ctrl-C, so that temporary files go."""


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
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.exit(code)
    # All files are in place and all threads done; taking ONNX Runtime and the interpreter apart
    # would be a tenth of the time that one picture takes.
    os._exit(code)


def run(args: list[str]) -> int:
    """Runs one command line and returns the exit code; the one error boundary."""
    debug = "--debug" in args or bool(os.environ.get("SEGCLI_DEBUG"))
    if not debug:
        # Pillow warns about damaged metadata of files that it then decodes well.
        warnings.simplefilter("ignore")
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        app(args=args, prog_name="segcli")
    except SystemExit as error:
        # Typer has made one of Ctrl-C, too.
        if error.code == ExitCode.INTERRUPTED:
            console.say("segcli: interrupted")
        return error.code if isinstance(error.code, int) else ExitCode.BUG
    except SegcliError as error:
        console.show_error(error)
        _trace(debug)
        return error.exit_code
    except console.ReaderGone:
        return ExitCode.BROKEN_PIPE
    except _Terminated:
        console.say("segcli: terminated")
        return ExitCode.TERMINATED
    except Exception as error:
        console.say(f"segcli: bug: {type(error).__name__}: {error}")
        console.say("hint: run it again with --debug and report the traceback")
        _trace(debug)
        return ExitCode.BUG
    finally:
        signal.signal(signal.SIGTERM, previous)
    return ExitCode.OK


def _open_standard_streams() -> None:
    # Where one is closed Python has None, and the next file opened would get its number.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated
