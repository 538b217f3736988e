import csv
import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RED, GREEN, BLUE = range(3)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(tiny_model):
    return tiny_model()


@pytest.fixture
def evaluate(segcli, tiny):
    return lambda *args, **more: segcli("eval", "-m", tiny, *args, **more)


@pytest.fixture
def labelled(picture):
    """Pictures of red and blue, and truth that is right but for some pixels and void."""
    generator = np.random.default_rng(3)
    for i in range(7):
        size, split = (8 + i, 6 + i % 3), 2 + i % 5
        picture(f"images/{i % 2}/{i}.png", size, split)
        truth = np.full((size[1], size[0]), BLUE, np.uint8)
        truth[:, :split] = RED
        wrong = generator.random(truth.shape)
        truth[wrong < 0.2] = 255
        truth[wrong > 0.85] = RED
        path = Path(f"labels/{i % 2}/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(truth).save(path)
    return ("images", "-r", "--truth", "labels")


def table(path):
    return {row["path"]: row for row in csv.DictReader(Path(path).read_text().splitlines())}


def by_hand(masks, labels, num_classes=3):
    """mIoU and pixel accuracy in plain NumPy, from the files that ``segment`` wrote."""
    both, of_truth, of_mask = (np.zeros(num_classes) for _ in range(3))
    for path in sorted(Path(labels).rglob("*.png")):
        truth = np.asarray(Image.open(path))
        mask = np.asarray(Image.open(Path(masks) / path.relative_to(labels)))
        counted = truth != 255
        for c in range(num_classes):
            both[c] += ((truth == c) & (mask == c))[counted].sum()
            of_truth[c] += (truth == c)[counted].sum()
            of_mask[c] += (mask == c)[counted].sum()
    union = of_truth + of_mask - both
    return np.mean(both[union > 0] / union[union > 0]), both.sum() / of_truth.sum()


def test_the_figures_are_those_of_the_masks(evaluate, segcli, tiny, labelled):
    segcli("segment", "-m", tiny, "images", "-r", "-o", "masks")
    miou, accuracy = by_hand("masks", "labels")
    ran = evaluate(*labelled, "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert found["miou"] == pytest.approx(miou, abs=1e-12)
    assert found["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert 0.3 < miou < 0.99
    assert [c["iou"] is None for c in found["classes"]] == [False, True, False]
    assert np.sum(found["confusion"]) == found["pixels"]


def test_lines(evaluate, labelled):
    found = json.loads(evaluate(*labelled, "--json", "--loss").out)
    lines = [line.split("\t") for line in evaluate(*labelled, "--loss").out.splitlines()]
    values = {line[0]: line[1] for line in lines if len(line) == 2}
    assert float(values["miou"]) == pytest.approx(found["miou"], rel=1e-5)
    assert float(values["loss"]) == pytest.approx(found["loss"], rel=1e-5)
    assert values["images"] == "7"
    assert ["1", "green", "nan", "nan", "0"] in lines


def test_the_truth_keeps_its_size(evaluate, picture):
    # Twice as large as the image: the prediction is made at that size.
    picture("images/a.png", (8, 6), 4)
    truth = np.full((12, 16), BLUE, np.uint8)
    truth[:, :8] = RED
    Path("labels").mkdir()
    Image.fromarray(truth).save("labels/a.png")
    found = json.loads(evaluate("images", "--truth", "labels", "--json").out)
    assert found["pixels"] == 12 * 16
    assert found["pixel_accuracy"] > 0.9


def test_a_loss_by_windows_is_that_of_the_whole_where_one_window_is_enough(evaluate, labelled):
    whole = json.loads(evaluate(*labelled, "--json", "--loss", "--resize", "64x64").out)
    tiled = json.loads(
        evaluate(*labelled, "--json", "--loss", "--resize", "64x64", "--tile", 64).out
    )
    assert tiled["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert tiled["confusion"] == whole["confusion"]


def test_reduced_labels(evaluate, picture):
    picture("images/a.png", (8, 6), 4)
    truth = np.full((6, 8), BLUE + 1, np.uint8)
    truth[:, :4] = RED + 1
    truth[0] = 0
    Path("labels").mkdir()
    Image.fromarray(truth).save("labels/a.png")
    found = json.loads(evaluate("images", "--truth", "labels", "--json", "--reduce-labels").out)
    assert (found["miou"], found["pixels"]) == (1, 40)


def test_the_root_of_a_data_set(evaluate, picture):
    for split in ("val", "test"):
        picture(f"set/images/{split}/a.png", (8, 6), 4 if split == "val" else 2)
        truth = np.full((6, 8), BLUE, np.uint8)
        truth[:, :4] = RED
        Path(f"set/annotations/{split}").mkdir(parents=True)
        Image.fromarray(truth).save(f"set/annotations/{split}/a.png")
    right = json.loads(evaluate("--truth", "set", "--json").out)
    assert right["miou"] == 1
    assert json.loads(evaluate("set", "--truth", "set", "--json").out) == right
    wrong = json.loads(evaluate("--truth", "set", "--split", "test", "--json").out)
    assert wrong["pixel_accuracy"] == pytest.approx(0.75)


def test_an_image_without_truth_fails_alone(evaluate, labelled, picture):
    expected = json.loads(evaluate(*labelled, "--json").out)
    picture("images/0/none.png")
    Path("images/0/damaged.png").write_bytes(b"no image")
    Path("labels/0/damaged.png").write_bytes(Path("labels/0/0.png").read_bytes())
    ran = evaluate(*labelled, "--json", "--csv", "images.csv")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert (found["failed"], found["images"], found["miou"]) == (2, 7, expected["miou"])
    assert "no truth for 'images/0/none.png'" in ran.err
    rows = table("images.csv")
    assert len(rows) == 9
    assert rows["images/0/none.png"]["status"] == "error"
    assert rows["images/0/0.png"]["status"] == "ok"
    assert float(rows["images/0/0.png"]["miou"]) > 0


def test_going_on_from_a_state(evaluate, labelled, tiny_model, segcli):
    expected = json.loads(evaluate(*labelled, "--json").out)
    first = evaluate(*labelled, "--json", "--state", "state.json", "--limit", 3)
    assert json.loads(first.out)["images"] == 3
    second = evaluate(*labelled, "--json", "--state", "state.json", "--csv", "images.csv")
    assert json.loads(second.out) == expected
    assert "3 images are counted in 'state.json' already" in second.err
    assert len(Path("images.csv").read_text().splitlines()) == 8
    # Of another protocol, it is refused.
    ran = evaluate(*labelled, "--state", "state.json", "--resize", "64x64")
    assert ran.code == 2
    assert "is of another run: its resize is 'model', this run's 'size'" in ran.err


def test_a_limit_counts_images_that_the_state_lacks(evaluate, labelled):
    found = []
    for _ in range(4):
        ran = evaluate(*labelled, "--json", "--state", "state.json", "--limit", 3)
        found.append(json.loads(ran.out)["images"])
    assert found == [3, 6, 7, 7]


def test_an_interrupt_keeps_what_is_counted(command, labelled, tiny, picture, segcli):
    args = [*command, "eval", "-m", str(tiny), "--truth", "labels", "--state", "s.json"]
    with subprocess.Popen(
        [*args, "--files-from", "-", "--root", "images", "-v"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        # The list stays open.
        process.stdin.write(b"images/0/0.png\nimages/1/1.png\n")
        process.stdin.flush()
        while b"1.png,ok" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    assert sorted(json.loads(Path("s.json").read_text())["images"]) == [
        "images/0/0.png",
        "images/1/1.png",
    ]


def test_a_picture_of_the_confusion(evaluate, labelled):
    assert evaluate(*labelled, "--confusion", "c.png").code == 0
    with Image.open("c.png") as picture:
        assert picture.mode == "RGB"
        assert min(picture.size) > 100


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["images"], "no --truth given"),
        (["images", "--truth", "nowhere"], "no such folder of truth: 'nowhere'"),
        (["-", "--truth", "labels"], "has no truth"),
        (["images", "-r", "--truth", "labels", "--split", "val"], "no known layout"),
        (["images", "-r", "--truth", "labels", "--overlap", "3"], "--overlap goes with --tile"),
        (["--truth", "labels"], "no input given"),
    ],
)
def test_usage(evaluate, labelled, args, says):
    ran = evaluate(*args)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err


# Classifiers


@pytest.fixture
def classify(segcli, tiny_model):
    model = tiny_model("c.onnx", task="classification", palette=())
    return lambda *args: segcli("eval", "-m", model, *args)


def test_folders_of_classes(classify, picture):
    picture("val/red/a.png", (8, 6), 7)
    picture("val/red/b.png", (8, 6), 1)
    picture("val/blue/c.png", (8, 6), 1)
    picture("val/2/d.png", (8, 6), 2)
    picture("val/zebra/e.png")
    ran = classify("val", "-r", "--truth", "val", "--json", "--csv", "images.csv")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert (found["images"], found["failed"]) == (4, 1)
    assert (found["top1"], found["top5"]) == (0.75, 1)
    rows = table("images.csv")
    assert rows["val/red/b.png"]["predicted_name"] == "blue"
    assert rows["val/red/b.png"]["rank"] == "1"


def test_a_limit_counts_classified_images_that_the_state_lacks(classify, picture):
    for name in ("a.png", "b.png", "c.png"):
        picture(f"val/red/{name}", (8, 6), 7)
    found = []
    for _ in range(3):
        ran = classify("val", "-r", "--truth", "val", "--json", "--state", "s.json", "--limit", 2)
        found.append(json.loads(ran.out)["images"])
    assert found == [2, 3, 3]


def test_a_list_of_classes(classify, picture):
    for name in ("a.png", "b.png"):
        picture(name, (8, 6), 7)
    Path("truth.csv").write_text("path,label\na.png,red\nb.png,blue\n")
    found = json.loads(classify("a.png", "b.png", "--truth", "truth.csv", "--json").out)
    assert (found["top1"], found["top5"]) == (0.5, 1)


def test_a_background_that_the_truth_does_not_have(segcli, tiny_model, picture):
    # "background" is the model's first class, and red in the picture: it does not count.
    model = tiny_model(
        "c.onnx", task="classification", palette=(), class_names=("background", "green", "blue")
    )
    picture("a.png", (8, 6), 7)
    Path("truth.csv").write_text("path,label\na.png,1\n")
    args = ("eval", "-m", model, "a.png", "--truth", "truth.csv", "--json")
    assert json.loads(segcli(*args, "--truth-classes", 2).out)["top1"] == 1
    assert json.loads(segcli(*args).out)["top1"] == 0


def test_options_of_segmentation_do_not_go_with_a_classifier(classify, picture):
    picture("val/red/a.png")
    ran = classify("val", "-r", "--truth", "val", "--loss")
    assert ran.code == 2
    assert "is a classifier" in ran.err


def test_a_list_restricts_as_arguments_do(evaluate, picture):
    for split in ("val", "test"):
        for name in ("a", "b"):
            picture(f"set/images/{split}/{name}.png", (8, 6), 4)
            Path(f"set/annotations/{split}").mkdir(parents=True, exist_ok=True)
            truth = np.full((6, 8), BLUE, np.uint8)
            truth[:, :4] = RED
            Image.fromarray(truth).save(f"set/annotations/{split}/{name}.png")
    for place in ("set", "set/annotations/val"):
        args = ("--files-from", "-", "--truth", place, "--json")
        found = json.loads(evaluate(*args, stdin=b"set/images/val/b.png\n").out)
        assert (found["images"], found["miou"]) == (1, 1)
    # The truth that was named is the one that is used, or none.
    ran = evaluate("set/images/test", "--truth", "set/annotations/val", "--json")
    assert ran.code == 0
    Path("set/annotations/val/a.png").unlink()
    ran = evaluate("set/images/test", "--truth", "set/annotations/val", "--json")
    assert (ran.code, json.loads(ran.out)["images"]) == (1, 1)
    assert "no truth for 'set/images/test/a.png'" in ran.err


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--csv", "images/0/0.png"], 2, "is there and is not a table of images"),
        (["--confusion", "labels/0/0.png"], 2, "is there and segcli did not write it"),
        (["--confusion", "c.jpg"], 2, "does not end in .png"),
        (["--csv", "x", "--state", "./x"], 2, "are files of their own"),
        (["--csv", "x.html", "--report", "x.html"], 2, "are files of their own"),
        (["--csv", "s3://bucket/x.csv"], 2, "--csv 's3://bucket/x.csv' is a URL"),
        (["--csv", "-"], 2, "is no file name"),
        (["--csv", "images"], 2, "is no file name"),
        (["--csv", "images/0/0.png/x.csv"], 5, "is not a folder"),
    ],
)
def test_no_file_is_lost_and_no_work(evaluate, labelled, args, code, says):
    before = {path: path.read_bytes() for path in Path().rglob("*.png")}
    ran = evaluate(*labelled, *args)
    assert (ran.code, ran.out) == (code, "")
    assert says in ran.err
    assert {path: path.read_bytes() for path in Path().rglob("*.png")} == before


def test_its_own_files_are_replaced(evaluate, labelled):
    args = (*labelled, "--csv", "i.csv", "--confusion", "c.png")
    assert evaluate(*args).code == 0
    assert evaluate(*args).code == 0
