"""What ``segment`` writes where no records are asked for: paths, or pictures for people."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from segcli.writers import OutputPlan

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console as RichConsole
    from rich.table import Table

    from segcli.cli.console import Results
    from segcli.results import ClassShare, Outcome

# Cells of a terminal's line that --show takes, and lines of classes below.
PREVIEW_COLUMNS = 96
_MOST_SHOWN = 12


def text_writer(
    out: "Results", plan: OutputPlan, end: bytes, palette: "npt.NDArray[np.uint8] | None"
) -> Callable[["Outcome"], None]:
    """Returns what writes one Outcome where no records are asked for.

    Args:
        out: Takes it.
        plan: Of the outputs.
        end: After each path.
        palette: Of the only image, whose classes are shown one by one; None for several.
    """
    if plan.kind == "stdout":
        # The picture itself is what goes to stdout.
        return lambda outcome: None
    if not out.isatty() or end != b"\n":
        return lambda outcome: _write_paths(outcome, out, end)
    from segcli.cli.console import terminal

    screen = terminal(out)
    return lambda outcome: _draw(outcome, screen, palette)


def _write_paths(outcome: "Outcome", out: "Results", end: bytes) -> None:
    if outcome.status == "ok":
        for path in outcome.outputs:
            out.line(path, end)


def _draw(
    outcome: "Outcome", screen: "RichConsole", palette: "npt.NDArray[np.uint8] | None"
) -> None:
    """Draws the files, and what is in them, for people."""
    from segcli.cli.console import visible

    if outcome.status == "error":
        return
    targets = ", ".join(visible(path) for path in outcome.outputs)
    screen.print(f"{visible(outcome.path)} -> {targets}")
    if outcome.preview is not None:
        from segcli.cli.terminal_image import TerminalImage

        screen.print(TerminalImage(outcome.preview, PREVIEW_COLUMNS))
    if outcome.classes and palette is not None:
        screen.print(_class_table(outcome.classes, palette))
    elif outcome.classes:
        shown = ", ".join(f"{visible(c.name)} {c.fraction:.0%}" for c in outcome.classes[:5])
        screen.print(f"    {shown}")


def _class_table(classes: "Sequence[ClassShare]", palette: "npt.NDArray[np.uint8]") -> "Table":
    """Returns a line per class: its color, name, share, and a bar as long as the share."""
    from rich.bar import Bar
    from rich.table import Table
    from rich.text import Text

    from segcli.cli.console import visible

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(width=2)
    table.add_column(overflow="ellipsis", no_wrap=True, max_width=30)
    table.add_column(justify="right")
    table.add_column(width=24)
    for share in classes[:_MOST_SHOWN]:
        color = "#{:02x}{:02x}{:02x}".format(*palette[share.class_id])
        table.add_row(
            Text("  ", style=f"on {color}"),
            Text(visible(share.name)),
            f"{share.fraction:.1%}",
            Bar(1.0, 0.0, share.fraction, color=color),
        )
    if len(classes) > _MOST_SHOWN:
        table.add_row("", f"and {len(classes) - _MOST_SHOWN} more")
    return table
