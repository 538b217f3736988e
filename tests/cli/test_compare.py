import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def other(tiny_model):
    """A model that differs: it adds to one channel of its input before the others are compared."""

    def make(**card):
        path = tiny_model("other.onnx", **card)
        model = onnx.load(path)
        shift = np.array([0, 0.5, 0], np.float32).reshape(1, 3, 1, 1)
        model.graph.initializer.append(numpy_helper.from_array(shift, "shift"))
        node = model.graph.node[0]
        node.input[0] = "shifted"
        model.graph.node.insert(0, helper.make_node("Add", ["pixel_values", "shift"], ["shifted"]))
        onnx.save(model, path)
        return path

    return make


def lines(text):
    return [line.split("\t") for line in text.splitlines()]


def test_a_model_agrees_with_itself(segcli, tiny_model, picture):
    picture("in/a.png"), picture("in/b.png", (9, 7), 3)
    model = tiny_model()
    ran = segcli("models", "compare", model, model, "--on", "in", "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert (found["images"], found["agreement"], found["miou"]) == (2, 1, 1)
    assert found["lowest"]["agreement"] == 1
    # Two halves of one time.
    assert 0.05 < found["speed"] < 20


def test_how_far_two_agree(segcli, tiny_model, other, tmp_path):
    from PIL import Image

    # Green is added half of its range: it wins where red is weak, in 2 of the 8 columns.
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, :, 0] = [200] * 6 + [60] * 2
    Image.fromarray(pixels).save("a.png")
    ran = segcli("models", "compare", tiny_model(), other(), "--on", "a.png")
    found = {line[0]: line[1:] for line in lines(ran.out)}
    assert float(found["agreement"][0]) == pytest.approx(0.75)
    assert found["lowest"][1] == "a.png"
    # Red: 36 of 48 in both, 48 in one; green: none of 12.
    assert float(found["miou"][0]) == pytest.approx((36 / 48 + 0) / 2)
    assert ["iou", "green", "0"] in lines(ran.out)


def test_classifiers(segcli, tiny_model, other, picture):
    card = {"task": "classification", "palette": ()}
    picture("a.png", (8, 6), 7), picture("b.png", (8, 6), 4)
    args = (tiny_model(**card), other(**card), "--on", "a.png", "--on", "b.png", "--json")
    found = json.loads(segcli("models", "compare", *args).out)
    assert found["images"] == 2
    # Red is 7/8 in the first picture and stays first; in the second all are one half.
    assert found["agreement"] == 1
    assert found["largest_difference"] > 0.05
    assert (found["miou"], found["class_iou"]) == (None, [])


def test_an_image_that_fails(segcli, tiny_model, picture):
    picture("a.png")
    Path("b.png").write_bytes(b"damaged")
    ran = segcli(
        "models", "compare", tiny_model(), tiny_model(), "--on", "a.png", "--on", "b.png", "--json"
    )
    assert ran.code == 1
    assert json.loads(ran.out)["images"] == 1
    assert "cannot decode 'b.png'" in ran.err


def test_models_that_cannot_be_compared(segcli, tiny_model, picture):
    picture("a.png")
    classifier = tiny_model("c.onnx", task="classification", palette=())
    ran = segcli("models", "compare", tiny_model(), classifier, "--on", "a.png")
    assert ran.code == 2
    assert "for segmentation with 3 classes" in ran.err
    assert segcli("models", "compare", classifier, "none.onnx", "--on", "a.png").code == 3
    Path("b.png").write_bytes(b"damaged")
    ran = segcli("models", "compare", classifier, classifier, "--on", "b.png")
    assert (ran.code, "no image to compare on" in ran.err) == (2, True)
