"""What an evaluation has counted so far, one row an image, kept in a file so that it can go on.

The file is whole or absent (``segcli.atomic``). It says what was evaluated by which protocol, and
counts of another model, data set or protocol are never added to.
"""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from segcli.artifact import Task
from segcli.atomic import write_atomic
from segcli.errors import ImageError, OutputError, OutputWriteError, UsageError
from segcli.evaluate import Confusion, Hits

STATE_SCHEMA = 1

Identity: TypeAlias = Mapping[str, str | int | float | bool | None]
Figures: TypeAlias = Mapping[str, str | int | float | None]

# The columns between the path and the error; ``loss`` is the mean over the pixels that count.
COLUMNS: dict[str, tuple[str, ...]] = {
    "segmentation": ("pixels", "miou", "pixel_accuracy", "loss"),
    "classification": ("class_id", "name", "rank", "predicted_id", "predicted_name"),
}


class EvalState:
    """The sums over the images that are done.

    Args:
        identity: What the sums depend on, by name, for JSON: the model's sha256, the truth's
            folder, layout and split, the resize rule, the ignored value …
        num_classes: K.

    Attributes:
        confusion: (K, K) int64, rows truth.
        hits: Of a classifier.
        loss_sum: In nats, over pixels.
        images: The figures of each image that is done, by path, in the order they came.
    """

    def __init__(self, identity: Identity, num_classes: int) -> None:
        self.identity = dict(identity)
        self.confusion: Confusion = np.zeros((num_classes, num_classes), np.int64)
        self.hits = Hits()
        self.loss_sum = 0.0
        self.images: dict[str, Figures] = {}

    def add(
        self,
        path: str,
        figures: Figures,
        *,
        confusion: Confusion | None = None,
        rank: int | None = None,
        loss_sum: float = 0.0,
    ) -> None:
        """Counts an image that is done; one that failed is left out, so that it is tried again.

        Args:
            path: Of the image, as given; each counts once.
            figures: Its row, by the names in ``COLUMNS``.
            confusion: Its own matrix.
            rank: Place of the true class, for a classifier.
            loss_sum: Over its pixels that count.
        """
        if path in self.images:
            raise ValueError(f"{path!r} is counted already")
        if confusion is not None:
            self.confusion += confusion
        if rank is not None:
            self.hits = self.hits.plus(rank)
        self.loss_sum += loss_sum
        self.images[path] = dict(figures)

    def save(self, path: str) -> None:
        """Puts the state into a file, in place of the one before.

        Raises:
            OutputError: The file cannot be written.
        """
        rows, columns = np.nonzero(self.confusion)
        counts = self.confusion[rows, columns]
        raw = {
            "schema": STATE_SCHEMA,
            "identity": self.identity,
            "num_classes": len(self.confusion),
            # Only what is not 0: a thousand classes have a million pairs.
            "confusion": np.stack([rows, columns, counts], axis=1).tolist(),
            "hits": list(self.hits),
            "loss_sum": self.loss_sum,
            "images": self.images,
        }
        try:
            write_atomic(path, json.dumps(raw, allow_nan=False).encode("ascii"))
        except OutputWriteError as error:
            raise OutputError(str(error)) from error

    @classmethod
    def load(cls, path: str, identity: Identity, num_classes: int) -> "EvalState":
        """Returns the state in a file, a new one where there is no file.

        Args:
            path: The file.
            identity: Of this run.
            num_classes: K of this run.

        Raises:
            UsageError: The file is no state, or one of another model, data set or protocol.
        """
        state = cls(identity, num_classes)
        try:
            raw: Any = json.loads(Path(path).read_bytes())
            if raw["schema"] != STATE_SCHEMA:
                raise _refused(path, "schema", raw["schema"], STATE_SCHEMA)
            known = {**raw["identity"], "num_classes": raw["num_classes"]}
            wanted = {**state.identity, "num_classes": num_classes}
            for key in wanted | known:
                if known.get(key) != wanted.get(key) or (key in known) != (key in wanted):
                    raise _refused(path, key, known.get(key), wanted.get(key))
            rows, columns, counts = _entries(raw["confusion"])
            state.confusion[rows, columns] = counts
            state.hits = Hits(*map(int, raw["hits"]))
            state.loss_sum = float(raw["loss_sum"])
            state.images = {image: dict(row) for image, row in raw["images"].items()}
        except FileNotFoundError:
            return state
        except OSError as error:
            raise UsageError(f"cannot read the state {path!r}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UsageError(
                f"{path!r} is no state of an evaluation",
                hint="name another file, or remove this one to begin anew",
            ) from error
        return state


def _entries(raw: object) -> npt.NDArray[np.int64]:
    """Returns true ids, predicted ids and counts, (3, n)."""
    entries = np.array(raw, np.int64).reshape(-1, 3).T
    # From the end, a negative id would count for another class.
    if entries.size and entries.min() < 0:
        raise ValueError("an entry below zero")
    return entries


def _refused(path: str, key: str, found: object, expected: object) -> UsageError:
    return UsageError(
        f"the state {path!r} is of another run: its {key} is {found!r}, this run's {expected!r}",
        hint="name another file, or remove this one to begin anew",
    )


def csv_header(task: Task) -> str:
    """Returns the first line of the table of images."""
    return _line(["path", "status", *COLUMNS[task], "error"])


def csv_row(task: Task, path: str, figures: Figures | ImageError) -> str:
    """Returns the line of one image: its figures to 6 digits, or why it has none.

    Args:
        task: What names the columns.
        path: Of the image.
        figures: By column; what is missing or None is empty.
    """
    if isinstance(figures, ImageError):
        return _line([path, "error", *[""] * len(COLUMNS[task]), str(figures)])
    values = [figures.get(column) for column in COLUMNS[task]]
    texts = [f"{v:.6g}" if isinstance(v, float) else "" if v is None else str(v) for v in values]
    return _line([path, "ok", *texts, ""])


def _line(values: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
