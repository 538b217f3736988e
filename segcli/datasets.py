"""Where the true class map of an image lies, by the layout of the data set, and how it is read.

Five layouts: ``pairs``, two folders with the same relative paths; and those of ADE20K, Cityscapes,
Pascal VOC and CamVid. Images come from ``segcli.inputs``, one by one and in its order; nothing here
lists a data set. Truth that is missing or cannot be used is an error of its image.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from segcli import image_io, storage
from segcli.errors import ImageError, TruthError, UsageError
from segcli.evaluate import VOID, reduce_labels
from segcli.inputs import Source, file_identity, is_folder

Layout: TypeAlias = Literal["pairs", "ade20k", "cityscapes", "voc", "camvid"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_Labels: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

# The folders of images and of truth below the root, and the split that is evaluated.
_FOLDERS: dict[Layout, tuple[str, str, str]] = {
    "ade20k": ("images", "annotations", "validation"),
    "cityscapes": ("leftImg8bit", "gtFine", "val"),
    "voc": ("JPEGImages", "SegmentationClass", "val"),
    "camvid": ("images", "annotations", "val"),
}
# What follows the stem in the names of labels, best first; mmsegmentation's converted COCO-Stuff
# has the second one.
_ENDINGS = tuple(
    marker + suffix
    for suffix in (".png", ".PNG", ".tif", ".tiff", ".bmp")
    for marker in ("", "_labelTrainIds")
)
# cityscapesScripts, helpers/labels.py: the id in *_labelIds.png of each trainId, in their order.
_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_LABEL_IDS_ENDING = "_gtFine_labelIds.png"
_CITYSCAPES_ENDINGS = ("_gtFine_labelTrainIds.png", _LABEL_IDS_ENDING)


class Sample(NamedTuple):
    """An image and the file of its true class map, or why there is none."""

    source: Source
    truth: str | TruthError


@dataclass(frozen=True)
class Dataset:
    """Where truth lies and how its values count.

    Attributes:
        layout: One of ``LAYOUTS``.
        truth: The folder of labels: for a layout with splits the one that holds them.
        images: The folder of images to walk, recursively, where the user named the root of a data
            set as the input; None for ``pairs``, and where there is none.
        split: What is evaluated: ``val``, ``validation`` …; None for ``pairs``.
        reduce_labels: The labels count classes from 1, and 0 is void.
        listed: The stems of the split, where the layout keeps them in a list.
        is_named: The split was asked for, by its name or by its folder: truth of another is not
            taken, wherever an image comes from.
    """

    layout: Layout
    truth: str
    images: str | None = None
    split: str | None = None
    reduce_labels: bool = False
    listed: frozenset[str] | None = None
    is_named: bool = False

    def samples(self, sources: Iterable[Source]) -> Iterator[Sample]:
        """Yields the images with their truth, in the order given.

        An image of a folder that the split's list does not name is passed over; one that was named
        itself is not.

        Raises:
            UsageError: All were passed over.
        """
        passed, found = 0, False
        for source in sources:
            listed = self.listed if source.origin == "folder" else None
            if listed is not None and PurePath(source.path).stem not in listed:
                passed += 1
                continue
            found = True
            try:
                yield Sample(source, self._truth_of(source))
            except TruthError as error:
                yield Sample(source, error)
        if passed and not found:
            raise UsageError(f"the list of split {self.split!r} names none of {passed} images")

    def _truth_of(self, source: Source) -> str:
        tried = list(self._candidates(source))
        for path in tried:
            if Path(path).is_file():
                if file_identity(path) == file_identity(source.path):
                    raise TruthError(f"{source.path!r} would be its own truth")
                return path
        raise TruthError(
            f"no truth for {source.path!r}: looked for {tried[0]!r}"
            + (f" and {len(tried) - 1} other names" if tried[1:] else "")
        )

    def _candidates(self, source: Source) -> Iterator[str]:
        stem = PurePath(source.path).stem
        if self.layout == "voc":
            yield str(Path(self.truth, f"{stem}.png"))
            return
        relative = PurePath(source.relative).parent
        places, endings = [relative], _ENDINGS
        if self.layout != "pairs":
            split = PurePath(self.split or "")
            # First the place below images/ in the file's own path, whichever folder was named.
            own = _below(source.path, _FOLDERS[self.layout][0])
            elsewhere = self.is_named and own is not None and own.parts[:1] != split.parts
            places = [split, split / relative, relative]
            if own is not None and not elsewhere:
                places.insert(0, own.parent)
        if self.layout == "cityscapes":
            frame = stem.removesuffix("_leftImg8bit")
            if frame == stem:
                raise TruthError(
                    f"no truth for {source.path!r}: expected a name that ends in _leftImg8bit"
                )
            stem, endings = frame, _CITYSCAPES_ENDINGS
            # Frames apart from their tree: the name begins with the city.
            places.append(split / frame.partition("_")[0])
        for place in dict.fromkeys(places):
            for ending in endings:
                yield str(Path(self.truth, place, stem + ending))

    def read(self, path: str, *, max_pixels: int = image_io.DEFAULT_MAX_PIXELS) -> _Labels:
        """Returns the true class ids of an image, (H, W) uint8 or uint16, 255 where void.

        Args:
            path: From ``samples``.
            max_pixels: Refuse labels with more pixels than this.

        Raises:
            TruthError: The file cannot be read as class ids, or holds ids of another label set.
        """
        try:
            labels = image_io.decode_labels(storage.read_bytes(path), path, max_pixels=max_pixels)
        except ImageError as error:
            raise TruthError(f"the truth: {error}", hint=error.hint) from error
        try:
            if path.endswith(_LABEL_IDS_ENDING):
                return _train_ids(labels)
            return reduce_labels(labels) if self.reduce_labels else labels
        except TruthError as error:
            raise TruthError(f"{path!r}: {error}", hint=error.hint) from error


def open_dataset(
    truth: str,
    *,
    layout: Layout | None = None,
    split: str | None = None,
    reduce_labels: bool | None = None,
) -> Dataset:
    """Returns what a folder of truth is: the root of a data set, or its labels alone.

    Args:
        truth: The folder.
        layout: None tells it by the folders and names that are there, ``pairs`` where none is
            known.
        split: None takes the data set's own validation split.
        reduce_labels: None takes what the layout says: ADE20K's labels count from 1.

    Raises:
        UsageError: There is no such folder, the layout's own folder is not in it, or the split is
            not there.
    """
    if not is_folder(truth):
        raise UsageError(f"no such folder of truth: {truth!r}")
    layout = layout or _detect(truth)
    reduced = layout == "ade20k" if reduce_labels is None else reduce_labels
    if layout == "pairs":
        if split is not None:
            raise UsageError(
                f"the folder {truth!r} has no known layout, and so no split {split!r}",
                hint=f"name the layout: {', '.join(LAYOUTS[1:])}",
            )
        return Dataset("pairs", truth, reduce_labels=reduced)
    image_name, truth_name, own_split = _FOLDERS[layout]
    labels = _reach(truth, truth_name)
    if labels is None:
        raise UsageError(
            f"no folder {truth_name!r} in {truth!r}, which the layout {layout} has",
            hint=f"--truth is the root of the data set or its {truth_name}",
        )
    # A split that the folder itself names counts as named.
    below = _below(truth, truth_name)
    named = split or (below.parts[0] if below and below.parts else None)
    split, root, listed = named or own_split, labels.parent, None
    images = root / image_name
    if layout == "voc":
        listed = _listed(root / "ImageSets" / "Segmentation" / f"{split}.txt", needed=bool(named))
    else:
        images /= split
        if not (labels / split).is_dir():
            raise UsageError(f"no split {split!r} in {str(labels)!r}")
    walk = str(images) if images.is_dir() else None
    return Dataset(layout, str(labels), walk, split, reduced, listed, named is not None)


def _listed(path: Path, *, needed: bool) -> frozenset[str] | None:
    """Returns the stems in the list of a split, None where there is none and none is needed."""
    try:
        return frozenset(path.read_text("utf-8-sig", "surrogateescape").split())
    except OSError as error:
        if not needed:
            return None
        raise UsageError(
            f"cannot read the list of the split, {str(path)!r}: {error.strerror or error}"
        ) from error


def _detect(truth: str) -> Layout:
    if _reach(truth, "SegmentationClass"):
        return "voc"
    if _reach(truth, "gtFine"):
        return "cityscapes"
    labels = _reach(truth, "annotations")
    if labels is None:
        return "pairs"
    for split in ("validation", "training"):
        # Any data set may call a split validation; that its labels count from 1 follows from the
        # names of the files alone.
        if next((labels / split).glob("ADE_*.png"), None):
            return "ade20k"
    return "camvid" if any((labels / s).is_dir() for s in ("val", "test", "train")) else "pairs"


def _reach(truth: str, name: str) -> Path | None:
    """Returns the folder of labels that ``truth`` holds, is, or is a split or a city of."""
    path = Path(_absolute(truth))
    for folder in (path, *path.parents[:2]):
        if folder.name == name:
            return folder
    return path / name if (path / name).is_dir() else None


def _below(path: str, name: str) -> PurePath | None:
    """Returns what follows the last folder called ``name`` in a path, None without one."""
    parts = PurePath(_absolute(path)).parts
    if name not in parts:
        return None
    return PurePath(*parts[len(parts) - parts[::-1].index(name) :])


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - Path.absolute keeps the .. in it


def _train_ids(label_ids: _Labels) -> _Labels:
    """Returns the trainIds of Cityscapes' labelIds; void and what is not evaluated is 255."""
    known = 34
    if label_ids.size and label_ids.max() >= known:
        raise TruthError(
            f"holds the value {label_ids.max()}, expected Cityscapes labelIds 0..{known - 1}"
        )
    table = np.full(known, VOID, np.uint8)
    table[list(_LABEL_IDS)] = np.arange(len(_LABEL_IDS))
    return table[label_ids]
