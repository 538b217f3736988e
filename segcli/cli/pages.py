"""The page of ``--report``: whether it can be, and what a run tells it."""

import contextlib
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from segcli.errors import SegcliError, UsageError
from segcli.urls import local_file
from segcli.writers import OutputPlan, check_folders, check_place, refuse_other_content

if TYPE_CHECKING:
    from segcli.cli.engines import Engine
    from segcli.report import Kind, Report
    from segcli.results import Outcome


@contextlib.contextmanager
def open_page(path: str | None, kind: "Kind", model: "Engine") -> "Iterator[Report | None]":
    """Yields a report that is written when it is closed, or None without a path.

    Raises:
        UsageError: The path names no .html file, or a file that is no report.
        OutputError: It cannot be written.
    """
    if path is None:
        yield None
        return
    from segcli.report import Report

    command = shlex.join(["segcli", *sys.argv[1:]])
    with Report(path, kind, model.card, model.provider, command) as page:
        yield page


def check_page(path: str | None) -> str | None:
    """Returns the file of ``--report``, refused before any work where it cannot be one.

    Raises:
        UsageError: It names no .html file, or a file that is something else.
        OutputError: It cannot be written.
    """
    path = local_file("--report", path)
    if path is None:
        return None
    if not path.lower().endswith((".html", ".htm")) or Path(path).is_dir():
        raise UsageError(f"--report {path!r} is not a file that ends in .html")
    from segcli.report_page import PAGE_START

    plan = OutputPlan("file", path, ())
    check_place(plan)
    check_folders(plan)
    refuse_other_content(path, (PAGE_START,), "a report")
    return path


def told_to(
    page: "Report | None", outcomes: Iterable["Outcome"], counts: dict[str, int]
) -> Iterator["Outcome"]:
    """Yields outcomes; what ends them early is told to the page, which is written all the same."""
    try:
        yield from outcomes
    except SegcliError as error:
        if page is not None and any(counts.values()):
            with contextlib.suppress(SegcliError):
                page.close({**counts, "ended early": str(error)})
        raise


def add_to_page(page: "Report", outcome: "Outcome", *, timing: bool) -> None:
    """Adds an Outcome to a page, with ``elapsed_ms`` where ``timing`` is asked for."""
    record, small = outcome.to_dict(timing=timing), outcome.small
    if outcome.error is not None:
        page.add_failure(record)
    elif small is not None and small.class_ids is not None:
        page.add_segmentation(record, small.image, small.class_ids, small.confidence)
    elif small is not None:
        page.add_classification(record, small.image)
