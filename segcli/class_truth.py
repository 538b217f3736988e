"""The true class of an image for a classifier: the folder it lies in, or a line of a CSV file.

A label is a class name, an id, or a WordNet id of ImageNet (``n01440764``). The package has no
table from WordNet ids to names: all 1000 of ImageNet are understood, as its classes are numbered in
the order of these ids (torchvision's ``ImageFolder`` rests on the same); any other set is refused.
"""

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from segcli.errors import TruthError, UsageError
from segcli.evaluate import has_background
from segcli.inputs import Source, is_folder

CSV_HEADER = ["path", "label"]
IMAGENET_CLASSES = 1000

_WORDNET_ID = re.compile(r"n\d{8}")


class LabelledImage(NamedTuple):
    """An image and its true class among those that are ranked, or why it has none."""

    source: Source
    class_id: int | TruthError


class ClassIds:
    """Reads labels as classes of one model.

    Names match whole, or one of the synonyms between commas, in any case: ``tench`` is ImageNet's
    "tench, Tinca tinca". A label of digits alone is an id.

    Args:
        class_names: Of the model, all of them.
        num_true: Number of classes that the truth's ids count; None takes the model's, less a
            background where it has 1001 classes, ImageNet's and that.
        wordnet_ids: Those of all classes, in any order.

    Attributes:
        names: The classes that are ranked: the model's, less a background that the truth does not
            have.
        skipped: How many logits come before theirs, 0 or 1: rank ``logits[skipped:]``.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        num_true: int | None = None,
        wordnet_ids: Iterable[str] = (),
    ) -> None:
        if num_true is None:
            of_imagenet = has_background(class_names, IMAGENET_CLASSES)
            num_true = IMAGENET_CLASSES if of_imagenet else len(class_names)
        if num_true != len(class_names) and not has_background(class_names, num_true):
            raise UsageError(
                f"the truth has {num_true} classes, the model {len(class_names)}: expected as "
                "many, or one more that is background and comes first"
            )
        self.skipped = int(has_background(class_names, num_true))
        self.names = tuple(class_names[self.skipped :])
        self._wordnet = {name: i for i, name in enumerate(sorted(set(wordnet_ids)))}
        if self._wordnet and not len(self._wordnet) == len(self.names) == IMAGENET_CLASSES:
            raise UsageError(
                f"the truth names {len(self._wordnet)} WordNet ids and the model has "
                f"{len(self.names)} classes, expected ImageNet's {IMAGENET_CLASSES} of both",
                hint="segcli has no table of WordNet ids: name the folders by class or by id, or "
                f"list the images in a CSV file '{','.join(CSV_HEADER)}'",
            )
        self._whole, self._synonyms = _ids_by_name(self.names)

    def read(self, label: str) -> int:
        """Returns the id among ``names``.

        Raises:
            TruthError: The label names no class, or several.
        """
        if label.isascii() and label.isdigit():
            if int(label) < len(self.names):
                return int(label)
            raise TruthError(f"the label {label} is no class id, expected 0..{len(self.names) - 1}")
        if label in self._wordnet:
            return self._wordnet[label]
        key = _key(label)
        found = self._whole.get(key) or self._synonyms.get(key) or []
        if len(found) == 1:
            return found[0]
        if found:
            raise TruthError(
                f"the label {label!r} names the classes {' and '.join(map(str, found))}",
                hint="give the class's id instead",
            )
        raise TruthError(
            f"the label {label!r} is no class of the model",
            hint="labels are class names, ids, or the WordNet ids of all of ImageNet",
        )


def open_class_truth(
    truth: str, class_names: Sequence[str], *, num_true: int | None = None
) -> tuple[ClassIds, Callable[[Iterable[Source]], Iterator[LabelledImage]]]:
    """Returns how labels are read, and what pairs images with their classes, in the order given.

    Args:
        truth: A folder with one folder per class, in which the images lie, at any depth; or a CSV
            file with the header ``path,label``, paths below the CSV file's own folder.
        class_names: Of the model.
        num_true: As for ``ClassIds``.

    Raises:
        UsageError: Neither is there, the file is not such a CSV, or WordNet ids cannot be read.
    """
    if is_folder(truth):
        with os.scandir(truth) as entries:
            folders = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
        if not folders:
            raise UsageError(f"the folder {truth!r} holds no folder per class")
        ids = ClassIds(class_names, num_true=num_true, wordnet_ids=_wordnet_ids(folders))
        return ids, lambda sources: _paired(sources, ids, lambda path: _folder_label(path, truth))
    labels = _read_csv(truth)
    ids = ClassIds(class_names, num_true=num_true, wordnet_ids=_wordnet_ids(labels.values()))
    return ids, lambda sources: _paired(
        sources, ids, lambda path: _listed_label(path, labels, truth)
    )


def _paired(
    sources: Iterable[Source], ids: ClassIds, label_of: Callable[[str], str]
) -> Iterator[LabelledImage]:
    for source in sources:
        try:
            yield LabelledImage(source, ids.read(label_of(source.path)))
        except TruthError as error:
            named = TruthError(f"no truth for {source.path!r}: {error}", hint=error.hint)
            yield LabelledImage(source, named)


def _folder_label(path: str, root: str) -> str:
    parts = PurePath(os.path.relpath(path, root)).parts
    if len(parts) < 2 or parts[0] == "..":
        raise TruthError(f"it does not lie in a class's folder below {root!r}")
    return parts[0]


def _listed_label(path: str, labels: Mapping[str, str], csv_path: str) -> str:
    try:
        return labels[_absolute(path)]
    except KeyError:
        raise TruthError(f"{csv_path!r} does not list it") from None


def _read_csv(path: str) -> dict[str, str]:
    """Returns the label of each image by its absolute path."""
    labels: dict[str, str] = {}
    try:
        with Path(path).open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(file, strict=True)
            header = [column.strip().lower() for column in next(reader, [])]
            if header != CSV_HEADER:
                raise UsageError(
                    f"{path!r}, line 1: found {','.join(header)!r:.60}, "
                    f"expected {','.join(CSV_HEADER)!r}"
                )
            for row in filter(None, reader):
                if len(row) != len(CSV_HEADER):
                    raise UsageError(
                        f"{path!r}, line {reader.line_num}: found {len(row)} columns, expected 2"
                    )
                image = _absolute(Path(path).parent / row[0])
                if labels.setdefault(image, row[1].strip()) != row[1].strip():
                    raise UsageError(
                        f"{path!r}, line {reader.line_num}: {row[0]!r} has another label above"
                    )
    except OSError as error:
        raise UsageError(
            f"cannot read the truth {path!r}: {error.strerror or error}",
            hint="--truth is a folder with one folder per class, or a CSV file 'path,label'",
        ) from error
    except csv.Error as error:
        raise UsageError(f"{path!r}, line {reader.line_num}: not CSV: {error}") from error
    return labels


def _ids_by_name(names: Sequence[str]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    whole: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for class_id, name in enumerate(names):
        whole.setdefault(_key(name), []).append(class_id)
        for synonym in {_key(part) for part in name.split(",")}:
            synonyms.setdefault(synonym, []).append(class_id)
    return whole, synonyms


def _key(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _wordnet_ids(labels: Iterable[str]) -> set[str]:
    return {label for label in labels if _WORDNET_ID.fullmatch(label)}


def _absolute(path: str | Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - Path.absolute keeps the .. in it
