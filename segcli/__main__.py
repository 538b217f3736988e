"""Where the ``segcli`` command starts: an interrupt is answered before anything is imported."""

import os
import signal
from types import FrameType
from typing import NoReturn


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    # Nothing has begun. As app says and does it, which is not imported yet.
    os.write(2, b"segcli: interrupted\n")
    os._exit(130)


def main() -> NoReturn:
    """Runs the command line and exits with its code."""
    # Not where it is ignored, as for a job that a shell runs in the background.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from segcli.cli.app import main

    main()


if __name__ == "__main__":
    main()
