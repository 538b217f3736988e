"""Class names and colours: those of the known data sets, and those of a user's own file.

``segcli.export`` asks here for the palette of a ModelCard and reads ``--labels FILE``. The data
are the CSV files in ``segcli.data``; no array is made here and no image is coloured.
"""

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from segcli.artifact import Rgb, Task
from segcli.errors import CheckpointError

# Small sets first: labels that several sets know take the colours of the more specific one.
# "cocostuff" has the 171 classes and the palette of mmsegmentation's COCOStuffDataset, train ids 0
# to 170; the palette gives some classes the same colour.
DATASETS = ("camvid", "cityscapes", "voc", "ade20k", "cocostuff")
CSV_HEADER = ["id", "name", "r", "g", "b"]
MAX_BYTES = 4 << 20

_HINT = (
    "one name a line, JSON (a list, or an object from id to name), "
    "or CSV with the header 'id,name,r,g,b'"
)


class Labels(NamedTuple):
    """Class names in id order, and their colours where the source has any."""

    names: tuple[str, ...]
    palette: tuple[Rgb, ...] | None


@cache
def dataset_labels(dataset: str) -> Labels:
    """Returns the names and the official colours of one of ``DATASETS``."""
    resource = files("segcli.data") / f"{dataset}.csv"
    return _from_csv(resource.read_text("utf-8"), f"{dataset}.csv")


@cache
def usual_names(task: Task, num_classes: int) -> tuple[str, ...]:
    """Returns what a MobileNetV2 with so many classes is nearly always trained on, or nothing.

    That is ImageNet, in TF-Slim's models behind a class ``background``, and Pascal VOC.
    """
    if task == "classification" and num_classes in (1000, 1001):
        names = (files("segcli.data") / "imagenet.txt").read_text("utf-8").splitlines()
        return ("background", *names)[-num_classes:]
    if task == "segmentation" and num_classes == 21:
        return dataset_labels("voc").names
    return ()


def dataset_palette(class_names: Sequence[str]) -> tuple[Rgb, ...]:
    """Returns one RGB colour per class, whatever the classes.

    Case, spaces and underscores in names do not count. A model with exactly the classes of a known
    data set, in its order, has that set's palette. One whose labels all occur in a known set takes
    its colours by name, if they tell the classes apart. Any other has the Pascal VOC colour map:
    all colours differ, and class i has the same one whatever the number of classes. There black
    is kept for a class 0 named background.
    """
    keys = [_key(name) for name in class_names]
    known = [dataset_labels(dataset) for dataset in DATASETS]
    for names, palette in known:
        if palette and keys == [_key(name) for name in names]:
            return palette
    for names, palette in known:
        colors = dict(zip(map(_key, names), palette or (), strict=False))
        if all(key in colors for key in keys):
            chosen = tuple(colors[key] for key in keys)
            if len(set(chosen)) == len(chosen):
                return chosen
    first = 0 if keys[:1] == ["background"] else 1
    return tuple(_voc_color(first + i) for i in range(len(keys)))


def read_labels(path: Path | str) -> Labels:
    """Returns what a labels file says, for ``segcli export --labels FILE``.

    The form is told by the suffix, else by the content: plain text with one name a line; JSON, a
    list or an object from id to name, bare or under ``id2label`` as in a config.json; CSV with the
    columns ``id,name,r,g,b``, which alone has colours. Names are stripped and may occur twice, as
    "crane" does in ImageNet; ids run from 0 without a gap, in any order.

    Raises:
        CheckpointError: The file cannot be read, or a line of it is not as described.
    """
    where = f"labels file {str(path)!r}"
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot read {where}: {reason}", hint=_HINT) from error
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{where} is larger than {MAX_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CheckpointError(
            f"{where}, line {line}: found byte 0x{data[error.start]:02x}, expected UTF-8"
        ) from error

    suffix = Path(path).suffix.lower()
    if suffix == ".json" or (suffix != ".csv" and text.lstrip()[:1] in ("{", "[")):
        return _from_json(text, where)
    header = text.partition("\n")[0].strip().lower()
    if suffix == ".csv" or header == ",".join(CSV_HEADER):
        return _from_csv(text, where)
    return _from_text(text, where)


def labels_text(class_names: Sequence[str], palette: Sequence[Rgb]) -> str:
    """Returns what ``read_labels`` reads: CSV, or one name a line where there are no colours."""
    if not palette:
        return "".join(f"{name}\n" for name in class_names)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for class_id, (name, color) in enumerate(zip(class_names, palette, strict=True)):
        writer.writerow([class_id, name, *color])
    return text.getvalue()


def _from_text(text: str, where: str) -> Labels:
    lines = text.rstrip().split("\n") if text.strip() else []
    return Labels(
        _in_order(((i, line, f"{where}, line {i + 1}") for i, line in enumerate(lines)), where),
        None,
    )


def _from_json(text: str, where: str) -> Labels:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{where}: key {twice!r} occurs twice")
        return result

    try:
        raw = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where}, line {error.lineno}: not JSON: {error.msg}", hint=_HINT
        ) from error
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{where}: not usable JSON", hint=_HINT) from error
    if isinstance(raw, dict) and isinstance(raw.get("id2label"), dict):
        raw = raw["id2label"]
    if isinstance(raw, list):
        entries = [(i, name, f"{where}, item {i}") for i, name in enumerate(raw)]
    elif isinstance(raw, dict):
        entries = [
            (_number(key, f"{where}, key {key!r}"), name, f"{where}, key {key!r}")
            for key, name in raw.items()
        ]
    else:
        raise CheckpointError(
            f"{where}: found {type(raw).__name__}, expected a list or an object",
            hint=_HINT,
        )
    return Labels(_in_order(entries, where), None)


def _from_csv(text: str, where: str) -> Labels:
    reader = csv.reader(io.StringIO(text), strict=True, skipinitialspace=True)
    entries: list[tuple[int, str, str]] = []
    colors: dict[int, Rgb] = {}
    try:
        header = [column.strip().lower() for column in next(reader, [])]
        if header != CSV_HEADER:
            raise CheckpointError(
                f"{where}, line 1: found {','.join(header)!r}, expected {','.join(CSV_HEADER)!r}",
                hint=_HINT,
            )
        for row in reader:
            if not row:
                continue
            place = f"{where}, line {reader.line_num}"
            if len(row) != len(CSV_HEADER):
                raise CheckpointError(
                    f"{place}: found {len(row)} columns, expected {len(CSV_HEADER)}"
                )
            class_id = _number(row[0].strip(), place)
            r, g, b = (_number(v.strip(), place, below=256) for v in row[2:])
            entries.append((class_id, row[1], place))
            colors[class_id] = (r, g, b)
    except csv.Error as error:
        raise CheckpointError(
            f"{where}, line {reader.line_num}: not CSV: {error}", hint=_HINT
        ) from error
    names = _in_order(entries, where)
    return Labels(names, tuple(colors[i] for i in range(len(names))))


def _number(text: str, place: str, below: int = 1 << 16) -> int:
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < below:
        return int(text)
    raise CheckpointError(
        f"{place}: found {text[:40]!r}, expected a whole number in 0..{below - 1}"
    )


def _in_order(entries: Iterable[tuple[int, Any, str]], where: str) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for class_id, name, place in entries:
        if class_id in names:
            raise CheckpointError(f"{place}: id {class_id} occurs twice, expected each id once")
        names[class_id] = _name(name, place)
    if not names:
        raise CheckpointError(f"{where} holds no class name", hint=_HINT)
    for expected, class_id in enumerate(sorted(names)):
        if class_id != expected:
            raise CheckpointError(
                f"{where}: id {expected} is missing, found {class_id}, "
                "expected ids from 0 without a gap"
            )
    return tuple(names[i] for i in range(len(names)))


def _name(value: object, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise CheckpointError(f"{place}: found {value!r:.40}, expected a class name")
    name = value.strip()
    # A tab or line break in a name would break the lines of `segcli classify`; half a surrogate
    # pair cannot be written as UTF-8.
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        raise CheckpointError(
            f"{place}: found {name!r:.40}, expected a name without control characters"
        )
    return name


def _key(name: str) -> str:
    return "".join(name.casefold().replace("_", " ").split())


def _voc_color(index: int) -> Rgb:
    # Pascal VOC devkit's colour map: bit 3k of the index is bit 7-k of red, and so on. One to one.
    r = g = b = 0
    for k in range(8):
        r |= (index >> (3 * k) & 1) << (7 - k)
        g |= (index >> (3 * k + 1) & 1) << (7 - k)
        b |= (index >> (3 * k + 2) & 1) << (7 - k)
    return r, g, b
