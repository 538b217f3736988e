"""What an evaluation comes to: one record, lines, tables, a picture of who is taken for whom."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segcli.cli.console import Results
    from segcli.eval_state import EvalState
    from segcli.model import Model
    from segcli.protocol import Protocol

_SUMMARY = ("miou", "mean_accuracy", "pixel_accuracy", "loss", "top1", "top5", "pixels", "images")


def figures_of(
    state: "EvalState",
    model: "Model",
    class_names: Sequence[str],
    protocol: "Protocol",
    failed: int,
    *,
    loss: bool,
) -> dict[str, Any]:
    """Returns what ``--json`` writes."""
    from segcli.evaluate import figures

    found: dict[str, Any] = {
        "schema": 1,
        "model": model.card.name,
        "provider": model.provider,
        "task": model.card.task,
        "protocol": asdict(protocol),
        "images": len(state.images),
        "failed": failed,
    }
    if model.card.task != "segmentation":
        return found | state.hits.figures()
    found |= figures(state.confusion, class_names)
    if loss:
        found["loss"] = state.loss_sum / found["pixels"] if found["pixels"] else None
    return found | {"confusion": state.confusion.tolist()}


def write_confusion(path: str, state: "EvalState", class_names: Sequence[str]) -> None:
    """Writes who is taken for whom as a PNG."""
    from segcli.atomic import write_atomic
    from segcli.confusion_picture import draw_confusion
    from segcli.image_bytes import encode_png_rgb

    write_atomic(path, encode_png_rgb(draw_confusion(state.confusion, class_names)))


def write_lines(found: Mapping[str, Any], out: "Results") -> None:
    """Writes ``name<TAB>value``, then ``id<TAB>class<TAB>iou<TAB>accuracy<TAB>pixels``."""
    from segcli.cli.console import visible

    for name in (name for name in _SUMMARY if name in found):
        out.line(f"{name}\t{_digits(found[name])}")
    for row in found.get("classes", ()):
        cells = (_digits(row["iou"]), _digits(row["accuracy"]), str(row["pixels"]))
        out.line("\t".join((str(row["class_id"]), visible(row["name"]), *cells)))


def _digits(value: float | None) -> str:
    return "nan" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def draw_table(found: Mapping[str, Any], out: "Results") -> None:
    """Draws tables for people."""
    from rich.table import Table
    from rich.text import Text

    from segcli.cli.console import terminal, visible

    screen = terminal(out)
    if "classes" in found:
        table = Table(box=None, pad_edge=False)
        table.add_column("class")
        for title in ("IoU", "accuracy", "pixels"):
            table.add_column(title, justify="right")
        for row in found["classes"]:
            shown = ("-" if row[k] is None else f"{row[k]:.1%}" for k in ("iou", "accuracy"))
            table.add_row(Text(visible(row["name"])), *shown, f"{row['pixels']:,}")
        screen.print(table)
        screen.print()
    summary = Table(box=None, pad_edge=False, show_header=False)
    for name in (name for name in _SUMMARY if name in found):
        summary.add_row(name.replace("_", " "), _digits(found[name]))
    screen.print(summary)
