"""A run as one page for a browser: every image with what the model says of it, without a network.

Entries go to unnamed temporary files as they come and from there into the page, so memory does not
grow with the run; the page is whole or absent (``segcli.atomic``). File names, labels and all that
a model's card says are data: the templates escape them, and the page's own policy
(Content-Security-Policy) runs no script but ours and loads nothing.
"""

import io
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from segcli.artifact import ModelCard
from segcli.atomic import open_atomic
from segcli.image_bytes import encode_id_png, encode_jpeg
from segcli.report_figures import row_shares, timings, worst_mistakes
from segcli.report_page import Spool, data_uri, describe_preprocessing, open_templates, page_assets

Kind = Literal["segment", "classify", "eval"]

_Image: TypeAlias = npt.NDArray[np.uint8]
_ClassMap: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

_JPEG_QUALITY = 75
_DRAWN = ("schema", "classes", "confusion")
# A table of more classes than this has cells too small for their numbers.
_MOST_NUMBERS = 32


class Report:
    """Writes one page, from one thread; without ``close()`` there is none.

    Args:
        path: The page's file, replaced if it is there.
        kind: What the run does.
        card: Of the model.
        provider: ONNX Runtime's name of what runs it.
        command: The command line, as shown.
    """

    def __init__(self, path: str, kind: Kind, card: ModelCard, provider: str, command: str) -> None:
        self._path, self._kind, self._card = path, kind, card
        self._provider, self._command = provider, command
        templates = open_templates()
        self._page = templates.get_template("report.html.j2")
        self._macros: Any = templates.get_template("report.entry.html.j2").module
        # Void is 255 or more: with more classes than that, ids take two channels.
        self._wide = len(card.class_names) > 255
        self._pixels = np.zeros(len(card.class_names), np.int64)
        self._elapsed_ms = array("d")
        self._count = self._failed = 0
        self._colors = {i: "#{:02x}{:02x}{:02x}".format(*c) for i, c in enumerate(card.palette)}
        self._files = ExitStack()
        self._entries = self._files.enter_context(Spool(path))
        self._failures = self._files.enter_context(Spool(path))

    def __enter__(self) -> Self:
        """Returns the report, whose temporary files go when the block ends."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drops what is not written."""
        self._files.close()

    def add_segmentation(
        self,
        record: Mapping[str, Any],
        thumbnail: _Image,
        class_ids: _ClassMap,
        confidence_mean: float | None = None,
    ) -> None:
        """Adds an image with its classes.

        Args:
            record: Of ``Outcome.to_dict``.
            thumbnail: (h, w, 3) uint8 RGB.
            class_ids: (h, w), an id for each of its pixels; from K on none.
            confidence_mean: Of the winning class over the pixels, in [0, 1].

        Raises:
            OutputWriteError: There is no room for it.
        """
        shares = [(c["class_id"], c["name"], c["fraction"]) for c in record["classes"]]
        for one in record["classes"]:
            self._pixels[one["class_id"]] += one["pixels"]
        maps = [("predicted", class_ids)]
        self._add(record, thumbnail, maps, shares, {"confidence": confidence_mean})

    def add_classification(self, record: Mapping[str, Any], thumbnail: _Image) -> None:
        """Adds an image with its labels.

        Args:
            record: Of ``Outcome.to_dict``.
            thumbnail: (h, w, 3) uint8 RGB.

        Raises:
            OutputWriteError: There is no room for it.
        """
        shares = [(label["class_id"], label["name"], label["score"]) for label in record["labels"]]
        if shares:
            self._pixels[shares[0][0]] += 1
        self._add(record, thumbnail, (), shares, {"confidence": shares[0][2] if shares else None})

    def add_evaluation(
        self,
        path: str,
        figures: Mapping[str, str | int | float | None],
        thumbnail: _Image,
        truth_ids: _ClassMap | None = None,
        predicted_ids: _ClassMap | None = None,
    ) -> None:
        """Adds an image with what it contributes to an evaluation.

        Args:
            path: Of the image.
            figures: By the names in ``eval_state.COLUMNS``.
            thumbnail: (h, w, 3) uint8 RGB.
            truth_ids: (h, w), an id for each of its pixels; from K on void. None for a classifier.
            predicted_ids: The same of the model's answer.

        Raises:
            OutputWriteError: There is no room for it.
        """
        maps: list[tuple[str, _ClassMap]] = []
        shares: list[tuple[int, str, float]] = []
        if truth_ids is not None and predicted_ids is not None:
            maps = [("predicted", predicted_ids), ("truth", truth_ids)]
            names = self._card.class_names
            counts = np.bincount(predicted_ids.ravel(), minlength=len(names))[: len(names)]
            order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
            shares = [(i, names[i], int(counts[i]) / predicted_ids.size) for i in order]
            self._pixels += counts
        accuracy = figures.get("pixel_accuracy")
        keys = {
            "iou": figures.get("miou"),
            "error": 1 - accuracy if isinstance(accuracy, int | float) else None,
            "loss": figures.get("loss"),
            "rank": figures.get("rank"),
        }
        self._add({"path": path, "figures": figures}, thumbnail, maps, shares, keys)

    def add_failure(self, record: Mapping[str, Any]) -> None:
        """Adds an input that failed.

        Args:
            record: Of ``Outcome.to_dict``: with ``path`` and ``error``.

        Raises:
            OutputWriteError: There is no room for it.
        """
        self._failed += 1
        self._failures.write(self._macros.failure(record))

    def _add(
        self,
        record: Mapping[str, Any],
        thumbnail: _Image,
        maps: Iterable[tuple[str, _ClassMap]],
        shares: Sequence[tuple[int, str, float]],
        keys: Mapping[str, Any],
    ) -> None:
        elapsed_ms = record.get("elapsed_ms")
        if elapsed_ms is not None:
            self._elapsed_ms.append(elapsed_ms)
        self._count += 1
        data = {k: v for k, v in {**keys, "ms": elapsed_ms}.items() if v is not None}
        # As a list, since JSON's keys are strings and would sort as such.
        data["shares"] = [[i, round(share, 6)] for i, _, share in shares]
        entry = self._macros.entry(
            record,
            data,
            data_uri("image/jpeg", encode_jpeg(thumbnail, _JPEG_QUALITY)),
            thumbnail.shape,
            [(name, self._encode_ids(ids)) for name, ids in maps],
            shares,
            self._colors,
        )
        self._entries.write(entry)

    def _encode_ids(self, ids: _ClassMap) -> Markup:
        # By the number of classes, not by the array's type: a file of labels may have either.
        stored = ids.astype(np.uint16) if self._wide else np.minimum(ids, 255).astype(np.uint8)
        return data_uri("image/png", encode_id_png(stored))

    def close(self, summary: Mapping[str, Any]) -> None:
        """Writes the page.

        Args:
            summary: Of the run, shown by its names; of an evaluation what ``--json`` gives, whose
                ``classes`` and ``confusion`` are drawn.

        Raises:
            OutputWriteError: The system does not let it be written.
        """
        with self._files, open_atomic(self._path) as file:
            page = io.BufferedWriter(file)
            for part in self._page.generate(self._context(summary)):
                page.write(part.encode())
            page.flush()
            # The file's end is open_atomic's.
            page.detach()

    def _context(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        card = self._card
        evaluated = summary.get("classes") or ()
        found = {row["class_id"] for row in evaluated if row["pixels"]}
        found.update(np.flatnonzero(self._pixels).tolist())
        listed = sorted(found, key=lambda i: (-self._pixels[i], i))
        total = max(1, int(self._pixels.sum()))
        confusion = np.array(summary.get("confusion") or np.zeros((0, 0)), np.int64)
        return {
            "kind": self._kind,
            "card": card,
            "preprocessing": describe_preprocessing(card.preprocessing),
            "provider": self._provider,
            "command": self._command,
            "summary": {k: v for k, v in summary.items() if k not in _DRAWN},
            "count": self._count,
            "failed": self._failed,
            "legend": [
                (i, card.class_names[i], self._colors.get(i), int(self._pixels[i]) / total)
                for i in listed
            ],
            "colors": [[i, *card.palette[i]] for i in listed] if self._colors else [],
            "wide": self._wide,
            "timings": timings(self._elapsed_ms),
            "evaluated": evaluated,
            "confusion": row_shares(confusion),
            "mistakes": worst_mistakes(confusion),
            "numbered": len(confusion) <= _MOST_NUMBERS,
            **page_assets(),
            "entries": self._entries.parts(),
            "failures": self._failures.parts(),
        }
