import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segcli.datasets import LAYOUTS, open_dataset
from segcli.errors import TruthError, UsageError
from segcli.inputs import Source, open_sources


@pytest.fixture
def write(tmp_path):
    """Writes files below the test's folder: label maps where values are given."""

    def make(relative, values=None, palette=False):
        path = tmp_path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        if values is None:
            Image.new("RGB", (4, 3)).save(path)
        else:
            image = Image.fromarray(np.array(values))
            if palette:
                image.putpalette(np.random.default_rng(0).bytes(768))
            image.save(path)
        return str(path)

    return make


def sources_of(*args, recursive=True):
    return open_sources([str(a) for a in args], recursive=recursive, stdin=io.BytesIO())


def pairs(dataset, *args, root):
    """The images and their labels, relative to ``root``; errors as they read."""
    return [
        (
            os.path.relpath(s.source.path, root),
            str(s.truth) if isinstance(s.truth, TruthError) else os.path.relpath(s.truth, root),
        )
        for s in dataset.samples(sources_of(*args))
    ]


IDS = np.array([[0, 1, 2], [150, 255, 7]], np.uint8)


def test_two_folders_pair_by_relative_path(tmp_path, write):
    for name in ("in/b.jpg", "in/a.jpg", "in/sub/a.jpg", "in/lost.jpg"):
        write(name)
    for name in ("gt/a.tif", "gt/b.bmp", "gt/b.png", "gt/sub/a.png", "gt/unused.png"):
        write(name, IDS)
    dataset = open_dataset(str(tmp_path / "gt"))
    assert (dataset.layout, dataset.images, dataset.split) == ("pairs", None, None)
    found = pairs(dataset, tmp_path / "in", root=tmp_path)
    assert found[:2] == [("in/a.jpg", "gt/a.tif"), ("in/b.jpg", "gt/b.png")]
    assert found[2][0] == "in/lost.jpg"
    assert "lost.png" in found[2][1]
    assert found[2][1].startswith("no truth for ")
    assert found[3] == ("in/sub/a.jpg", "gt/sub/a.png")
    np.testing.assert_array_equal(dataset.read(str(tmp_path / "gt/b.png")), IDS)


def test_samples_stream(tmp_path, write):
    write("gt/a.png", IDS)
    seen = []

    def endless():
        while True:
            seen.append(1)
            yield Source("a.jpg", "a.jpg", "list")

    samples = open_dataset(str(tmp_path / "gt")).samples(endless())
    assert next(samples).truth == str(tmp_path / "gt/a.png")
    assert len(seen) == 1


def test_an_image_is_not_its_own_truth(tmp_path, write):
    write("x.jpg")
    write("x.png", IDS)
    found = pairs(
        open_dataset(str(tmp_path)), tmp_path / "x.jpg", tmp_path / "x.png", root=tmp_path
    )
    assert found[0] == ("x.jpg", "x.png")
    assert "its own truth" in found[1][1]


def test_labels_of_cocostuff_as_mmsegmentation_converts_them(tmp_path, write):
    write("in/1.jpg")
    write("gt/1_labelTrainIds.png", IDS)
    found = pairs(open_dataset(str(tmp_path / "gt")), tmp_path / "in", root=tmp_path)
    assert found == [("in/1.jpg", "gt/1_labelTrainIds.png")]


@pytest.fixture
def ade20k(tmp_path, write):
    for i in (2, 1):
        write(f"ade/images/validation/ADE_val_0000000{i}.jpg")
        write(f"ade/annotations/validation/ADE_val_0000000{i}.png", IDS)
    write("ade/images/training/ADE_train_00000001.jpg")
    write("ade/annotations/training/ADE_train_00000001.png", IDS)
    return tmp_path / "ade"


def test_ade20k_by_its_root(ade20k):
    dataset = open_dataset(str(ade20k))
    assert (dataset.layout, dataset.split, dataset.reduce_labels) == ("ade20k", "validation", True)
    assert pairs(dataset, dataset.images, root=ade20k) == [
        (
            f"images/validation/ADE_val_0000000{i}.jpg",
            f"annotations/validation/ADE_val_0000000{i}.png",
        )
        for i in (1, 2)
    ]
    labels = dataset.read(str(ade20k / "annotations/validation/ADE_val_00000001.png"))
    np.testing.assert_array_equal(labels, [[255, 0, 1], [149, 255, 6]])


@pytest.mark.parametrize("truth", ["annotations", "annotations/validation", "."])
@pytest.mark.parametrize("images", ["images", "images/validation", "."])
def test_ade20k_by_any_of_its_folders(ade20k, monkeypatch, truth, images):
    dataset = open_dataset(str(ade20k / truth))
    assert (dataset.layout, dataset.split) == ("ade20k", "validation")
    monkeypatch.chdir(ade20k / images)
    found = {s.source.relative: s.truth for s in dataset.samples(sources_of("."))}
    name = "ADE_val_00000002"
    [label] = [v for k, v in found.items() if k.endswith(f"{name}.jpg")]
    assert label == str(ade20k / f"annotations/validation/{name}.png")


def test_frames_apart_from_their_tree_find_the_split(ade20k, write):
    image = write("elsewhere/ADE_train_00000001.jpg")
    dataset = open_dataset(str(ade20k), split="training")
    [sample] = dataset.samples(sources_of(image))
    assert sample.truth == str(ade20k / "annotations/training/ADE_train_00000001.png")


def test_a_split_called_validation_does_not_make_ade20k(tmp_path, write):
    write("set/images/val/a.jpg")
    write("set/annotations/validation/a.png", IDS)
    write("set/annotations/val/a.png", IDS)
    dataset = open_dataset(str(tmp_path / "set"))
    assert (dataset.layout, dataset.reduce_labels) == ("camvid", False)


def test_reduced_labels_can_be_asked_for_or_not(ade20k, tmp_path, write):
    path = str(ade20k / "annotations/validation/ADE_val_00000001.png")
    np.testing.assert_array_equal(open_dataset(str(ade20k), reduce_labels=False).read(path), IDS)
    gt = write("gt/a.png", IDS)
    dataset = open_dataset(str(tmp_path / "gt"), reduce_labels=True)
    assert dataset.read(gt)[0, 1] == 0


@pytest.fixture
def cityscapes(tmp_path, write):
    for city, frame in (
        ("lindau", "lindau_000001_000019"),
        ("frankfurt", "frankfurt_000000_000294"),
    ):
        write(f"city/leftImg8bit/val/{city}/{frame}_leftImg8bit.png")
        ids = np.array([[7, 33, 0], [26, 9, 31]], np.uint8)
        write(f"city/gtFine/val/{city}/{frame}_gtFine_labelIds.png", ids)
        write(f"city/gtFine/val/{city}/{frame}_gtFine_color.png")
    return tmp_path / "city"


@pytest.mark.parametrize("truth", [".", "gtFine", "gtFine/val"])
def test_cityscapes(cityscapes, truth):
    dataset = open_dataset(str(cityscapes / truth))
    assert (dataset.layout, dataset.split, dataset.reduce_labels) == ("cityscapes", "val", False)
    found = pairs(dataset, dataset.images, root=cityscapes)
    assert [label for _, label in found] == [
        "gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png",
        "gtFine/val/lindau/lindau_000001_000019_gtFine_labelIds.png",
    ]
    labels = dataset.read(str(cityscapes / found[0][1]))
    np.testing.assert_array_equal(labels, [[0, 18, 255], [13, 255, 16]])


def test_cityscapes_prefers_train_ids(cityscapes, write):
    train_ids = np.array([[0, 18, 255]], np.uint8)
    path = write("city/gtFine/val/lindau/lindau_000001_000019_gtFine_labelTrainIds.png", train_ids)
    dataset = open_dataset(str(cityscapes))
    [*_, last] = dataset.samples(sources_of(dataset.images))
    assert last.truth == path
    np.testing.assert_array_equal(dataset.read(path), train_ids)


def test_cityscapes_frames_without_their_folders(cityscapes, write):
    image = write("flat/lindau_000001_000019_leftImg8bit.png")
    other = write("flat/holiday.png")
    first, second = open_dataset(str(cityscapes)).samples(sources_of(image, other))
    assert first.truth.endswith("gtFine/val/lindau/lindau_000001_000019_gtFine_labelIds.png")
    assert "ends in _leftImg8bit" in str(second.truth)


def test_every_label_id_of_cityscapes_has_its_train_id(write):
    # Of the 34 ids, in the order of the official table.
    official = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255]
    official += [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18]
    path = write("gtFine/val/x/x_gtFine_labelIds.png", np.arange(34, dtype=np.uint8)[None])
    dataset = open_dataset(str(Path(path).parent))
    assert dataset.read(path).tolist() == [official]
    write("gtFine/val/x/x_gtFine_labelIds.png", np.array([[7, 255]], np.uint8))
    with pytest.raises(TruthError, match=r"x_gtFine_labelIds.png'.*the value 255, .* 0\.\.33"):
        dataset.read(path)


@pytest.fixture
def voc(tmp_path, write):
    for stem in ("2007_000033", "2007_000042", "2007_000061", "2008_000001"):
        write(f"VOC2012/JPEGImages/{stem}.jpg")
    for stem in ("2007_000033", "2007_000061"):
        write(f"VOC2012/SegmentationClass/{stem}.png", IDS % 21, palette=True)
    lists = tmp_path / "VOC2012/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2007_000061\n2007_000042\n2007_000033\n")
    (lists / "train.txt").write_text("2008_000001\n")
    return tmp_path / "VOC2012"


@pytest.mark.parametrize("truth", [".", "SegmentationClass"])
def test_voc_takes_the_images_of_the_list(voc, truth):
    dataset = open_dataset(str(voc / truth))
    assert (dataset.layout, dataset.split) == ("voc", "val")
    found = pairs(dataset, dataset.images, root=voc)
    assert found[0] == ("JPEGImages/2007_000033.jpg", "SegmentationClass/2007_000033.png")
    assert found[1][1].startswith("no truth for")
    assert found[2] == ("JPEGImages/2007_000061.jpg", "SegmentationClass/2007_000061.png")
    assert len(found) == 3
    labels = dataset.read(str(voc / found[0][1]))
    np.testing.assert_array_equal(labels, IDS % 21)


def test_voc_tries_a_named_image_whatever_the_list(voc):
    dataset = open_dataset(str(voc), split="train")
    [sample] = dataset.samples(sources_of(voc / "JPEGImages/2007_000033.jpg"))
    assert sample.truth == str(voc / "SegmentationClass/2007_000033.png")


def test_a_split_whose_list_names_no_image_is_refused(voc):
    (voc / "ImageSets/Segmentation/val.txt").write_text("2007_000061\n", "utf-16")
    dataset = open_dataset(str(voc))
    with pytest.raises(UsageError, match="the list of split 'val' names none of 4 images"):
        pairs(dataset, dataset.images, root=voc)


def test_voc_without_lists_takes_all(voc):
    (voc / "ImageSets/Segmentation/val.txt").unlink()
    dataset = open_dataset(str(voc))
    assert len(pairs(dataset, dataset.images, root=voc)) == 4
    with pytest.raises(UsageError, match=r"cannot read the list of the split, '.*trainval.txt'"):
        open_dataset(str(voc), split="trainval")


def test_camvid(shared):
    dataset = open_dataset(str(shared / "data/camvid"))
    assert (dataset.layout, dataset.split, dataset.reduce_labels) == ("camvid", "val", False)
    samples = list(dataset.samples(sources_of(dataset.images)))
    assert len(samples) == 101
    for sample in samples:
        assert Path(sample.truth).stem == Path(sample.source.path).stem
    labels = dataset.read(samples[0].truth)
    assert labels.shape == (360, 480)
    assert set(np.unique(labels)) <= {*range(11), 255}
    assert open_dataset(str(shared / "data/camvid/annotations/test")).split == "test"


def test_colored_labels_are_an_error_of_their_image(tmp_path, write):
    path = write("gt/a.png")
    with pytest.raises(TruthError, match=r"the truth: .*a.png': found RGB") as caught:
        open_dataset(str(tmp_path / "gt")).read(path)
    assert caught.value.code == "truth"
    assert "colors" in caught.value.hint


def test_truth_that_went_away_is_an_error_of_its_image(tmp_path):
    with pytest.raises(TruthError, match=r"the truth: cannot read '.*a.png': no such file"):
        open_dataset(str(tmp_path)).read(str(tmp_path / "a.png"))


def test_what_is_not_there_is_named(tmp_path, write):
    with pytest.raises(UsageError, match="no such folder of truth: 'nowhere'"):
        open_dataset("nowhere")
    write("gt/a.png", IDS)
    for layout in LAYOUTS[1:]:
        with pytest.raises(UsageError, match=f"which the layout {layout} has"):
            open_dataset(str(tmp_path / "gt"), layout=layout)
    with pytest.raises(UsageError, match="no known layout, and so no split 'val'"):
        open_dataset(str(tmp_path / "gt"), split="val")
    write("set/annotations/val/a.png", IDS)
    with pytest.raises(UsageError, match="no split 'test'"):
        open_dataset(str(tmp_path / "set"), split="test")


def test_a_layout_can_be_named_against_its_looks(ade20k):
    dataset = open_dataset(str(ade20k / "annotations/validation"), layout="pairs")
    assert (dataset.layout, dataset.reduce_labels) == ("pairs", False)
    [first, _] = dataset.samples(sources_of(ade20k / "images/validation"))
    assert first.truth == str(ade20k / "annotations/validation/ADE_val_00000001.png")
