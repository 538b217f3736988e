import tracemalloc

import numpy as np
import pytest

from segcli.cross_entropy import class_map_and_loss
from segcli.errors import TruthError
from segcli.fields import Upsampled, class_map


def loss(logits, truth, *, align_corners=False, ignore_index=255):
    field = Upsampled(logits, truth.shape, align_corners=align_corners)
    found, total = class_map_and_loss(field, truth, ignore_index=ignore_index)
    assert (found == class_map(field)).all()
    return total


def scene(seed, num_classes, hw, size_hw, *, sure=1.0):
    rng = np.random.default_rng(seed)
    logits = (sure * rng.standard_normal((num_classes, *hw))).astype(np.float32)
    truth = rng.integers(0, num_classes, size_hw).astype(np.uint8)
    truth[rng.random(size_hw) < 0.2] = 255
    return logits, truth


@pytest.mark.export
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sure", [1.0, 30.0])
@pytest.mark.parametrize(
    ("num_classes", "hw", "size_hw"),
    [
        (11, (9, 12), (36, 48)),
        (150, (8, 8), (101, 67)),
        (3, (20, 30), (7, 90)),
        (2, (1, 1), (5, 4)),
    ],
)
def test_loss_is_that_of_torch(num_classes, hw, size_hw, sure, align_corners):
    torch = pytest.importorskip("torch")
    logits, truth = scene(0, num_classes, hw, size_hw, sure=sure)
    upsampled = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None], size_hw, mode="bilinear", align_corners=align_corners
    )
    expected = torch.nn.functional.cross_entropy(
        upsampled,
        torch.from_numpy(truth.astype(np.int64))[None],
        ignore_index=255,
        reduction="sum",
    ).item()
    found = loss(logits, truth, align_corners=align_corners)
    assert found == pytest.approx(expected, rel=1e-6)


def test_loss_pixel_by_pixel_where_the_sizes_agree():
    logits, truth = scene(1, 5, (4, 6), (4, 6))
    expected = 0.0
    for y, x in np.argwhere(truth != 255):
        column = logits[:, y, x].astype(np.float64)
        expected += np.log(np.exp(column).sum()) - column[truth[y, x]]
    assert loss(logits, truth) == pytest.approx(expected, rel=1e-6)


def test_loss_of_two_equal_logits_is_ln_2():
    truth = np.array([[0, 1], [1, 255]], np.uint8)
    assert loss(np.zeros((2, 1, 1), np.float32), truth) == pytest.approx(3 * np.log(2))


def test_sure_pixels_keep_their_small_loss():
    logits = np.array([[[20.0]], [[0.0]]], np.float32)
    found = loss(logits, np.zeros((3, 3), np.uint8))
    assert found == pytest.approx(9 * np.log1p(np.exp(-20)), rel=1e-6)


def test_full_size_logits_are_never_held():
    logits, truth = scene(3, 150, (16, 16), (500, 600))
    tracemalloc.start()
    loss(logits, truth)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * 500 * 600 * 4 / 12


def test_void_alone_has_no_loss():
    assert loss(np.zeros((2, 3, 3), np.float32), np.full((9, 9), 255, np.uint8)) == 0


def test_wrong_input_is_named():
    logits = np.zeros((2, 3, 3), np.float32)
    with pytest.raises(TruthError, match=r"the value 2, expected class ids 0\.\.1"):
        loss(logits, np.full((9, 9), 2, np.uint8))
    with pytest.raises(TruthError, match="the value 255"):
        loss(logits, np.full((9, 9), 255, np.uint8), ignore_index=None)
