import csv
import io

import numpy as np
import pytest
from PIL import Image

from segcli.class_truth import ClassIds, open_class_truth
from segcli.errors import TruthError, UsageError
from segcli.evaluate import true_rank
from segcli.inputs import open_sources

NAMES = ("tench, Tinca tinca", "hot dog, hotdog", "crane", "bus", "crane")
SLIM = ("background", *(f"class {i}" for i in range(1000)))


def sources_of(*args):
    return open_sources([str(a) for a in args], recursive=True, stdin=io.BytesIO())


@pytest.fixture
def image(tmp_path):
    def make(relative):
        path = tmp_path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)
        return str(path)

    return make


@pytest.mark.parametrize(
    ("label", "class_id"),
    [
        ("tench", 0),
        ("Tinca  TINCA", 0),
        ("tench, tinca tinca", 0),
        ("hot_dog", 1),
        ("bus", 3),
        ("4", 4),
        ("004", 4),
    ],
)
def test_labels_are_names_synonyms_or_ids(label, class_id):
    assert ClassIds(NAMES).read(label) == class_id


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("crane", "'crane' names the classes 2 and 4"),
        ("5", r"5 is no class id, expected 0\.\.4"),
        ("-1", "'-1' is no class of the model"),
        ("unicorn", "'unicorn' is no class of the model"),
        ("", "'' is no class of the model"),
        ("n01440764", "'n01440764' is no class of the model"),
    ],
)
def test_labels_that_name_no_class_or_several(label, message):
    with pytest.raises(TruthError, match=message):
        ClassIds(NAMES).read(label)


def test_a_whole_name_beats_a_synonym_of_another():
    assert ClassIds(("maillot", "maillot, tank suit")).read("maillot") == 0


def test_background_of_1001_classes_is_dropped():
    ids = ClassIds(SLIM)
    assert (ids.skipped, len(ids.names)) == (1, 1000)
    assert ids.read("class 0") == ids.read("0") == 0
    logits = np.zeros(1001)
    logits[0], logits[1] = 9, 5
    assert true_rank(logits[ids.skipped :], ids.read("class 0")) == 0
    every = ClassIds(SLIM, num_true=1001)
    assert (every.skipped, every.read("class 0"), every.read("1000")) == (0, 1, 1000)
    assert ClassIds(("background", "cat")).skipped == 0
    assert ClassIds(("background", "cat"), num_true=1).skipped == 1


def test_another_number_of_classes_is_refused():
    with pytest.raises(UsageError, match="the truth has 3 classes, the model 5"):
        ClassIds(NAMES, num_true=3)


def test_all_wordnet_ids_of_imagenet_are_in_the_order_of_its_classes():
    wordnet = [f"n{i * 7:08d}" for i in range(1000)]
    for names in (SLIM, SLIM[1:]):
        ids = ClassIds(names, wordnet_ids=reversed(wordnet))
        assert [ids.read(w) for w in wordnet] == list(range(1000))


def test_other_sets_of_wordnet_ids_are_refused(image, tmp_path):
    image("val/n01440764/a.jpg")
    image("val/n01443537/a.jpg")
    with pytest.raises(UsageError, match="names 2 WordNet ids and the model has 1000") as caught:
        open_class_truth(str(tmp_path / "val"), SLIM)
    assert "no table of WordNet ids" in caught.value.hint


def test_folders_are_classes(image, tmp_path):
    for name in ("val/bus/b.jpg", "val/bus/a.jpg", "val/hot dog/x/c.jpg", "val/unicorn/d.jpg"):
        image(name)
    stray = image("val/e.jpg")
    ids, paired = open_class_truth(str(tmp_path / "val"), NAMES)
    found = list(paired(sources_of(tmp_path / "val")))
    assert [f.source.relative for f in found] == [
        "bus/a.jpg",
        "bus/b.jpg",
        "e.jpg",
        "hot dog/x/c.jpg",
        "unicorn/d.jpg",
    ]
    assert [f.class_id for f in found if isinstance(f.class_id, int)] == [3, 3, 1]
    assert f"no truth for {stray!r}: it does not lie in a class's folder" in str(found[2].class_id)
    assert "unicorn/d.jpg': the label 'unicorn' is no class" in str(found[4].class_id)
    assert ids.names == NAMES
    [outside] = paired(sources_of(image("elsewhere/bus/a.jpg")))
    assert isinstance(outside.class_id, TruthError)


def test_a_csv_lists_paths_below_itself(image, tmp_path):
    paths = [image("set/a, b.jpg"), image("set/sub/c.jpg"), image("set/d.jpg")]
    table = tmp_path / "set/truth.csv"
    with table.open("w", newline="") as file:
        rows = [("Path", "label"), ("a, b.jpg", "3"), ("sub/c.jpg", "hot dog")]
        csv.writer(file).writerows(rows)
    _, paired = open_class_truth(str(table), NAMES)
    found = list(paired(sources_of(*paths)))
    assert [f.class_id for f in found[:2]] == [3, 1]
    assert "truth.csv' does not list it" in str(found[2].class_id)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,1\n", "line 1: found 'file,label', expected 'path,label'"),
        ("", "line 1: found '', expected"),
        ("path,label\na.jpg,1,2\n", "line 2: found 3 columns, expected 2"),
        ("path,label\na.jpg,1\n./a.jpg,2\n", r"line 3: './a.jpg' has another label above"),
        ('path,label\n"a.jpg,1\n', "line 2: not CSV"),
    ],
)
def test_a_csv_that_is_none_is_refused_by_its_line(tmp_path, text, message):
    table = tmp_path / "truth.csv"
    table.write_text(text)
    with pytest.raises(UsageError, match=message):
        open_class_truth(str(table), NAMES)


def test_truth_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot read the truth 'nowhere': No such file"):
        open_class_truth("nowhere", NAMES)
    with pytest.raises(UsageError, match="holds no folder per class"):
        open_class_truth(str(tmp_path), NAMES)


def test_the_names_of_a_real_classifier(shared):
    """Every label that the photos' reference gives is found again in its own words."""
    import json

    folder = shared / "checkpoints/mobilenet_v2_1.0_224-imagenet"
    config = json.loads((folder / "config.json").read_text("utf-8"))
    names = [config["id2label"][str(i)] for i in range(1001)]
    ids = ClassIds(names)
    assert ids.skipped == 1
    twice = {n for n in names if names.count(n) > 1}
    for class_id, name in enumerate(names[1:]):
        if name not in twice:
            assert ids.read(name) == class_id
