"""How far a run has come: one changing line on stderr, where that is a terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from segcli.cli.console import Results, Talk


@contextlib.contextmanager
def progress(
    talk: Talk, out: Results, total: int | None
) -> Iterator[Callable[[dict[str, int]], None]]:
    """Yields what shows the counts of each status so far; nothing where results go to a terminal.

    Args:
        talk: Says whether anything is to be shown.
        out: Where the results go.
        total: How many images there will be, None where that is not known.
    """
    if out.isatty():
        # A bar and lines in one terminal would tear each other apart.
        yield lambda counts: None
        return
    start = time.perf_counter()
    with status(talk) as show:
        yield lambda counts: show(progress_text(counts, total, time.perf_counter() - start))


def progress_text(counts: dict[str, int], total: int | None, seconds: float) -> str:
    """Returns how far a run has come: images done, images a second, time left, failures.

    Args:
        counts: Of each status.
        total: How many there will be, None where that is not known.
        seconds: Since the run began.
    """
    done = sum(counts.values())
    # What was skipped took no time, and says nothing of the others.
    worked = done - counts["skipped"]
    rate = worked / seconds if seconds > 0 else 0.0
    parts = [f"{done}/{total} images" if total is not None else f"{done} images"]
    parts.append(f"{rate:.1f} images/s")
    if total is not None and rate > 0:
        left = round((total - done) / rate)
        hours, minutes = divmod(left // 60, 60)
        clock = f"{minutes}:{left % 60:02}" if not hours else f"{hours}:{minutes:02}:{left % 60:02}"
        parts.append(f"{clock} left")
    if counts["error"]:
        parts.append(f"{counts['error']} failed")
    return ", ".join(parts)


@contextlib.contextmanager
def status(talk: Talk) -> Iterator[Callable[[str], None]]:
    """Yields what shows one changing line on stderr; nothing where it is no terminal."""
    # With -v there are lines, which the changing one would tear apart.
    if talk.quiet or talk.verbose or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.status import Status

    with Status("starting", console=Console(stderr=True, highlight=False, markup=False)) as shown:
        yield shown.update
