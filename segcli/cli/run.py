"""Records and lines of a run: Outcomes told to the streams as they come."""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from segcli.cli.console import Results, Talk
from segcli.cli.engines import announce
from segcli.cli.pages import add_to_page, told_to
from segcli.cli.progress import progress
from segcli.errors import ExitCode, ImageError, ImageMissing, UsageError
from segcli.inputs import exists
from segcli.urls import is_url

if TYPE_CHECKING:
    from segcli.cli.engines import Engine
    from segcli.inputs import Source
    from segcli.report import Report
    from segcli.results import Outcome

Records = Literal["text", "json", "jsonl"]


def records_of(*, json: bool, jsonl: bool) -> Records:
    """Returns how records are written.

    Raises:
        UsageError: Both were asked for.
    """
    if json and jsonl:
        raise UsageError("--json and --jsonl exclude each other")
    return "json" if json else "jsonl" if jsonl else "text"


def dry_run(
    sources: Iterable["Source"],
    plan: Callable[["Source"], tuple[str, ...]] | None,
    out: Results,
    talk: Talk,
    *,
    end: bytes,
) -> ExitCode:
    """Writes each input and what it would write, and returns the code that planning gives.

    Args:
        sources: The inputs, in order.
        plan: Returns what a source would write, nothing where it would be left; raises ImageError.
            None where a run writes no files: the inputs alone are shown.
        out: Takes the pairs: ``input -> output`` where ``end`` is a newline, else both ended so.
        talk: Takes errors.
        end: After each line, or after each path.
    """
    failed = False
    for source in sources:
        try:
            targets = plan(source) if plan else ()
            listed = source.origin == "folder" and is_url(source.path)
            if source.origin != "stdin" and not listed and not exists(source.path, ImageMissing):
                raise ImageMissing(f"cannot read {source.path!r}: no such file")
        except ImageError as error:
            failed = True
            talk.image_error(error)
            continue
        if plan is None:
            out.line(source.path, end)
        for target in targets:
            if end == b"\n":
                out.line(f"{source.path} -> {target}")
            else:
                out.line(source.path, end)
                out.line(target, end)
    talk.hidden_errors()
    return ExitCode.SOME_FAILED if failed else ExitCode.OK


def report(
    outcomes: Iterable["Outcome"],
    out: Results,
    talk: Talk,
    *,
    records: Records,
    timing: bool,
    model: "Engine",
    text: Callable[["Outcome"], None],
    total: int | None = None,
    page: "Report | None" = None,
) -> ExitCode:
    """Writes every Outcome as it comes and returns the run's exit code.

    Args:
        outcomes: In input order.
        out: Takes the results.
        talk: Takes errors, details and the summary.
        records: How results are written.
        timing: Keeps ``elapsed_ms`` in records.
        model: For what is said of it.
        text: Writes one Outcome where records are ``text``.
        total: How many there will be, None where a list is still being read.
        page: A report to add each to.
    """
    start = time.perf_counter()
    counts = {"ok": 0, "skipped": 0, "error": 0}
    with progress(talk, out, total) as advance:
        for outcome in told_to(page, outcomes, counts):
            if not any(counts.values()):
                announce(model, talk)
            counts[outcome.status] += 1
            advance(counts)
            if page is not None:
                add_to_page(page, outcome, timing=timing)
            if records == "text":
                text(outcome)
            elif records == "jsonl":
                out.line(outcome.to_json(timing=timing))
            else:
                opening = "[\n" if sum(counts.values()) == 1 else ",\n"
                out.write((opening + outcome.to_json(timing=timing)).encode())
            if outcome.error:
                talk.image_error(outcome.error)
            else:
                talk.detail(f"{outcome.path}: {outcome.status}, {outcome.elapsed_ms or 0:.0f} ms")
    if records == "json":
        out.write(b"\n]\n" if sum(counts.values()) else b"[]\n")
    talk.hidden_errors()
    seconds = time.perf_counter() - start
    if page is not None:
        page.close({**counts, "seconds": round(seconds, 3)})
    done = sum(counts.values())
    if done > 1 or talk.verbose:
        parts = [f"{counts['ok']} done"]
        parts += [
            f"{counts[k]} {w}"
            for k, w in (("skipped", "skipped"), ("error", "failed"))
            if counts[k]
        ]
        talk.note(
            f"{done} image{'s' if done != 1 else ''}: {', '.join(parts)} in {seconds:.1f} s "
            f"({done / max(seconds, 1e-9):.1f} images/s) on {model.provider}"
        )
    return ExitCode.SOME_FAILED if counts["error"] else ExitCode.OK
