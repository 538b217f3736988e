"""What the agreement of a graph with another one counts, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from segcli.artifact import Preprocessing
from segcli.errors import ExportError, UsageError
from segcli.export.agreement import BOUNDS, FEATURE_BOUNDS, check, require_images
from segcli.export.precision import lower

TWO = {"class_names": ("a", "b"), "palette": ((0, 0, 0), (9, 9, 9))}


@pytest.fixture
def halves(picture):
    """An image file whose left half is red, its right half blue."""
    return str(picture("halves.png", size_wh=(8, 8), split=4))


@pytest.fixture
def red(picture):
    return str(picture("red.png", size_wh=(8, 8), split=8))


def test_what_float16_rounds_away_is_seen(affine, make_card, halves, red):
    """Between 1000 and 1000.1 float16 has no value: red, which b wins, becomes a."""
    full = affine([[0, 0, 0], [0.1, 0, 0]], [1000, 1000])
    card = make_card(**TWO)
    half = lower(full, "fp16")
    with pytest.raises(ExportError) as caught:
        check(full, half, "fp16", card, [halves])
    assert "agrees with fp32 by 0.5 on 1 images, required is 0.995" in str(caught.value)
    assert "--min-agreement" in caught.value.hint
    assert check(full, half, "fp16", card, [halves, red], 0.25) == {
        "kind": "fp16",
        "agreement": 0.25,
        "bound": 0.25,
        "images": 2,
        "lowest": 0.0,
    }


def test_what_float16_overflows_is_seen(make_graph, make_card, halves):
    nodes = [
        ("Mul", ["pixel_values", "large"], ["huge"], {}),
        ("Mul", ["huge", "small"], ["logits"], {}),
    ]
    weights = {"large": np.float32([60000]), "small": np.float32([0.01])}
    full = make_graph(nodes, weights)
    card = make_card(preprocessing=Preprocessing(resize="none", rescale=2 / 255))
    with pytest.raises(ExportError, match=r"the fp16 graph fails on .*infinite logits"):
        check(full, lower(full, "fp16"), "fp16", card, [halves], 0.0)


def test_a_graph_agrees_with_itself(affine, make_card, halves):
    full = affine(np.eye(3), [0, 0, 0])
    found = check(full, lower(full, "fp16"), "fp16", make_card(), [halves])
    assert found == {
        "kind": "fp16",
        "agreement": 1.0,
        "bound": BOUNDS["fp16"],
        "images": 1,
        "lowest": 1.0,
    }


def test_the_map_has_the_size_of_the_image(affine, make_card, picture):
    """A third of the image differs, of the logits' two columns one does."""
    full, other = affine([[0, 0, 0], [1, 0, 0]], [0.5, 0]), affine(np.zeros((2, 3)), [1, 0])
    path = str(picture(size_wh=(9, 6), split=3))
    card = make_card(**TWO, preprocessing=Preprocessing(resize="squash", size_hw=(6, 9)))
    assert check(full, other, "int8", card, [path], 0)["agreement"] == 0.6666
    squashed = Preprocessing(resize="squash", size_hw=(2, 2), interpolation="nearest")
    card = make_card(**TWO, preprocessing=squashed)
    found = check(full, other, "int8", card, [path], 0)["agreement"]
    # Linear from 1 at x = 2.25 - 0.5 to 0 at 6.75 - 0.5: above a half for 4 of 9.
    assert found == 0.5555


def test_one_logit_is_foreground_against_nothing(affine, make_card, halves):
    card = make_card(**TWO, activation="sigmoid")
    full, other = affine([[1, 0, 0]], [-0.5]), affine([[1, 0, 0]], [0.5])
    assert check(full, other, "int8", card, [halves], 0)["agreement"] == 0.5


def test_classification_counts_labels(make_graph, make_card, halves, red):
    def classifier(bias):
        nodes = [
            ("ReduceMean", ["pixel_values", "axes"], ["mean"], {"keepdims": 0}),
            ("Add", ["mean", "bias"], ["logits"], {}),
        ]
        weights = {"axes": np.array([2, 3]), "bias": np.float32(bias)}
        return make_graph(nodes, weights, logits=("n", "k"))

    card = make_card(task="classification", palette=(), activation="identity")
    full, other = classifier([0, 0.25, 0]), classifier([0, 0.75, 0])
    # Red 1 against green 0.75 keeps its label, red 0.5 does not.
    with pytest.raises(ExportError, match=r"by 0\.5 on 2 images, required is 0\.98"):
        check(full, other, "int8", card, [halves, red])
    assert check(full, other, "int8", card, [halves, red], 0.5) == {
        "kind": "int8",
        "agreement": 0.5,
        "bound": 0.5,
        "images": 2,
        "max_score_diff": 0.5,
    }


def test_features_are_compared_by_their_relative_difference(affine, make_card, halves):
    card = make_card(task="features", class_names=(), palette=())
    full = affine(np.eye(3), [0, 0, 0])
    found = check(full, affine(np.eye(3) * 1.03125, [0, 0, 0]), "int8", card, [halves])
    assert found["agreement"] == found["lowest"] == 0.9687
    assert found["bound"] == FEATURE_BOUNDS["int8"]
    with pytest.raises(ExportError, match=r"by 0\.875 "):
        check(full, affine(np.eye(3) * 1.125, [0, 0, 0]), "int8", card, [halves])
    with pytest.raises(ExportError, match="not finite"):
        check(full, affine(np.eye(3), [np.inf, 0, 0]), "int8", card, [halves], 0)


def test_images_that_cannot_be_read(affine, make_card, tmp_path, halves):
    full = affine(np.eye(3), [0, 0, 0])
    Path(tmp_path / "bad.png").write_bytes(b"no image")
    for name in ("bad.png", "missing.png"):
        with pytest.raises(UsageError, match=name):
            check(full, full, "int8", make_card(), [halves, str(tmp_path / name)])
        with pytest.raises(UsageError, match=name):
            require_images([halves, str(tmp_path / name)], "int8")
    with pytest.raises(UsageError, match="needs images"):
        check(full, full, "int8", make_card(), [])
    with pytest.raises(UsageError, match="needs images"):
        require_images([], "int8")
    require_images([halves], "int8")
