import json
from itertools import pairwise

import pytest

from segcli.errors import CheckpointError
from segcli.labels import DATASETS, dataset_labels, dataset_palette, read_labels, usual_names

SIZES = {"ade20k": 150, "cityscapes": 19, "voc": 21, "camvid": 11, "cocostuff": 171}
COLORS = [
    ("ade20k", 0, "wall", (120, 120, 120)),
    ("ade20k", 2, "sky", (6, 230, 230)),
    ("ade20k", 7, "bed", (204, 5, 255)),
    ("ade20k", 149, "flag", (92, 0, 255)),
    ("cityscapes", 0, "road", (128, 64, 128)),
    ("cityscapes", 18, "bicycle", (119, 11, 32)),
    ("voc", 0, "background", (0, 0, 0)),
    ("voc", 3, "bird", (128, 128, 0)),
    ("voc", 20, "tvmonitor", (0, 64, 128)),
    ("camvid", 0, "sky", (128, 128, 128)),
    ("camvid", 4, "pavement", (60, 40, 222)),
    ("camvid", 10, "bicyclist", (0, 128, 192)),
    ("cocostuff", 0, "person", (0, 192, 64)),
    ("cocostuff", 80, "banner", (0, 192, 0)),
    ("cocostuff", 170, "wood", (64, 64, 0)),
]


def test_usual_names_of_imagenet_with_and_without_a_background():
    names = usual_names("classification", 1000)
    assert len(names) == 1000
    assert (names[0], names[-1].split(",")[0]) == ("tench, Tinca tinca", "toilet tissue")
    # Two classes of that name: the bird and the machine.
    assert [i for i, name in enumerate(names) if name == "crane"] == [134, 517]
    assert all(name == name.strip() and name for name in names)
    assert usual_names("classification", 1001) == ("background", *names)


def test_usual_names_of_segmenters_and_of_nothing():
    assert usual_names("segmentation", 21) == dataset_labels("voc").names
    for task, count in (("classification", 21), ("segmentation", 1000), ("features", 1000)):
        assert usual_names(task, count) == ()


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_has_stripped_unique_names_and_a_color_each(dataset):
    names, palette = dataset_labels(dataset)
    assert len(names) == len(palette) == SIZES[dataset]
    assert len(set(names)) == len(names)
    assert all(name == name.strip() and name for name in names)
    assert all(len(c) == 3 and all(0 <= v <= 255 for v in c) for c in palette)


def test_the_table_of_data_sets_is_whole():
    assert sorted(DATASETS) == sorted(SIZES)


@pytest.mark.parametrize(("dataset", "class_id", "name", "rgb"), COLORS)
def test_spot_checks(dataset, class_id, name, rgb):
    names, palette = dataset_labels(dataset)
    assert (names[class_id], palette[class_id]) == (name, rgb)


def test_the_voc_palette_is_the_rule_it_is_said_to_be():
    others = ["background", *(f"thing {i}" for i in range(20))]
    assert dataset_palette(others) == dataset_labels("voc").palette


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_known_data_set_has_its_official_palette(dataset):
    names, palette = dataset_labels(dataset)
    assert dataset_palette(names) == palette
    assert dataset_palette([f" {n.upper().replace(' ', '_')}" for n in names]) == palette


def test_labels_of_a_known_set_in_another_order_take_its_colors_by_name():
    names, palette = dataset_labels("cityscapes")
    assert dataset_palette(names[::-1]) == palette[::-1]
    assert dataset_palette(["Traffic_Light", "rider"]) == (palette[6], palette[12])


def test_one_strange_label_gives_a_generated_palette():
    names, palette = dataset_labels("cityscapes")
    colors = dataset_palette([*names[:-1], "unicorn"])
    assert colors != palette
    assert len(set(colors)) == 19


def test_repeated_names_still_tell_the_classes_apart():
    assert len(set(dataset_palette(["crane", "bus", "crane"]))) == 3
    assert len(set(dataset_palette(["road", "road"]))) == 2
    # ADE20K itself paints road and skyscraper alike.
    assert len(set(dataset_palette(["road", "skyscraper", "wall"]))) == 3


@pytest.mark.parametrize("first", ["background", "x"])
def test_generated_colors_are_distinct_and_do_not_depend_on_the_number(first):
    names = [first, *(f"class {i}" for i in range(1023))]
    palette = dataset_palette(names)
    assert len(set(palette)) == len(palette) == 1024
    assert all(0 <= v <= 255 for c in palette for v in c)
    assert palette[:5] == dataset_palette(names[:5])
    assert ((0, 0, 0) in palette) == (first == "background")
    assert (palette[0] == (0, 0, 0)) == (first == "background")


def test_no_classes_have_no_colors():
    assert dataset_palette([]) == ()


def read(tmp_path, content, name="labels.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_labels(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.txt", "a\nb c\nd\n"),
        ("l.txt", "a\nb c\nd"),
        ("l.txt", "\ufeffa \r\n b c\r\nd\r\n\r\n"),
        ("l", '["a", "b c", "d"]'),
        ("l.txt", '{"0": "a", "1": "b c", "2": "d"}'),
        ("l.json", '\ufeff{"2": "d", "1": " b c", "0": "a"}'),
        ("config.json", '{"x": 1, "id2label": {"0": "a", "1": "b c", "2": "d"}}'),
    ],
)
def test_the_forms_without_colors(tmp_path, name, content):
    assert read(tmp_path, content, name) == (("a", "b c", "d"), None)


@pytest.mark.parametrize("name", ["l.csv", "l.txt"])
@pytest.mark.parametrize(
    "content",
    [
        'id,name,r,g,b\n0,"a, b",1,2,3\n1,c,0,0,255\n',
        '\ufeffID,Name,R,G,B\r\n1,c,0,0,255\r\n0,"a, b",1,2,3\r\n\r\n',
    ],
)
def test_csv_gives_the_colors_too(tmp_path, name, content):
    expected = (("a, b", "c"), ((1, 2, 3), (0, 0, 255)))
    assert read(tmp_path, content, name) == expected


def test_our_own_data_can_be_read_back(tmp_path):
    names, palette = dataset_labels("ade20k")
    rows = [
        f"{i},{n},{r},{g},{b}" for i, (n, (r, g, b)) in enumerate(zip(names, palette, strict=True))
    ]
    assert read(tmp_path, "\n".join(["id,name,r,g,b", *rows]), "l.csv") == (
        names,
        palette,
    )


def test_names_may_occur_twice(tmp_path):
    assert read(tmp_path, "crane\nbus\ncrane\n").names == ("crane", "bus", "crane")


def test_an_id_per_line_of_plain_text_counts_other_breaks_as_no_line(tmp_path):
    with pytest.raises(CheckpointError, match="line 1: found 'a\\\\x0bb'"):
        read(tmp_path, "a\x0bb\nc\n")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("l.txt", "", ["holds no class name"]),
        ("l.txt", " \n\n", ["holds no class name"]),
        ("l.json", "", ["line 1", "not JSON"]),
        ("l.json", "{}", ["holds no class name"]),
        ("l.json", "[]", ["holds no class name"]),
        ("l.csv", "", ["line 1", "found ''", "'id,name,r,g,b'"]),
        ("l.csv", "id,name,r,g,b\n", ["holds no class name"]),
        ("l.txt", "a\n\nb\n", ["line 2", "expected a class name"]),
        ("l.txt", b"a\n\xff\n", ["line 2", "0xff", "UTF-8"]),
        ("l.txt", "a\nb".encode("utf-16"), ["line 1", "0xff", "UTF-8"]),
        ("l.txt", "a\tb\n", ["line 1", "'a\\tb'", "control"]),
        ("l.json", '["a",\n "b"', ["line 2", "not JSON"]),
        ("l.json", '["a", 3]', ["item 1", "found 3", "class name"]),
        ("l.json", '["a", "\\ud800"]', ["item 1", "control"]),
        ("l.json", '"a"', ["found str", "list or an object"]),
        ("l.json", '{"0": "a", "2": "c"}', ["id 1 is missing", "found 2"]),
        ("l.json", '{"1": "a", "2": "c"}', ["id 0 is missing", "found 1"]),
        ("l.json", '{"0": "a", "0": "c"}', ["key '0' occurs twice"]),
        ("l.json", '{"0": "a", "00": "c"}', ["key '00'", "id 0 occurs twice"]),
        ("l.json", '{"a": 0}', ["key 'a'", "whole number"]),
        ("l.json", '{"-1": "a"}', ["found '-1'", "whole number"]),
        ("l.json", '{"0": ""}', ["key '0'", "class name"]),
        ("l.json", "[" * 200_000, ["not"]),
        ("l.json", "[" + "9" * 10_000 + "]", ["not usable JSON"]),
        ("l.csv", "0,a,1,2,3\n", ["line 1", "found '0,a,1,2,3'"]),
        ("l.csv", "id,name,r,g,b\n0,a,1,2\n", ["line 2", "4 columns", "expected 5"]),
        ("l.csv", "id,name,r,g,b\n0,a,1,2,256\n", ["line 2", "'256'", "0..255"]),
        ("l.csv", "id,name,r,g,b\n0,a,1,2,-3\n", ["line 2", "'-3'"]),
        ("l.csv", "id,name,r,g,b\nx,a,1,2,3\n", ["line 2", "'x'"]),
        (
            "l.csv",
            "id,name,r,g,b\n0,a,1,2,3\n0,b,1,2,3\n",
            ["line 3", "0 occurs twice"],
        ),
        ("l.csv", "id,name,r,g,b\n0,a,1,2,3\n2,b,1,2,3\n", ["id 1 is missing"]),
        ("l.csv", 'id,name,r,g,b\n0,"a,1,2,3\n', ["line", "not CSV"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, content, parts):
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, content, name)
    assert all(part in str(caught.value) for part in [repr(str(tmp_path / name)), *parts])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="cannot read labels file") as caught:
            read_labels(path)
        assert "one name a line" in caught.value.hint
    with pytest.raises(CheckpointError, match="null"):
        read_labels("a\0b")


def test_a_file_without_end_is_refused():
    with pytest.raises(CheckpointError, match="larger than 4 MiB"):
        read_labels("/dev/zero")


def test_the_forms_agree(tmp_path):
    names, palette = dataset_labels("voc")
    as_json = json.dumps({str(i): n for i, n in enumerate(names)})
    assert read(tmp_path, as_json).names == read(tmp_path, "\n".join(names)).names == names
    assert all(a != b for a, b in pairwise(palette))
