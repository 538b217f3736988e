"""Fields against slow, obvious implementations and PyTorch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli.fields import (
    Flipped,
    MeanProbability,
    Resized,
    Tiled,
    Upsampled,
    class_map,
    softmax,
    strips,
    windows,
)

torch = pytest.importorskip("torch")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def whole(field):
    return np.concatenate([values for _, values in strips(field)], axis=1)


def interpolate(planes, size_hw, align_corners=False):
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(planes)[None], size=size_hw, mode="bilinear", align_corners=align_corners
    )
    return resized[0].numpy()


SIZES = [((5, 7), (31, 20)), ((16, 16), (64, 64)), ((9, 4), (9, 4)), ((20, 30), (7, 11))]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("in_hw", "out_hw"), SIZES)
def test_upsampled_is_interpolate(in_hw, out_hw, align_corners, monkeypatch):
    monkeypatch.setattr("segcli.fields._STRIP_VALUES", 3 * out_hw[1] * 4)
    logits = noise(3, *in_hw)
    found = whole(Upsampled(logits, out_hw, align_corners=align_corners))
    np.testing.assert_allclose(found, interpolate(logits, out_hw, align_corners), atol=1e-6)


@pytest.mark.parametrize(("in_hw", "out_hw"), SIZES)
def test_resized_is_interpolate_of_the_field(in_hw, out_hw, monkeypatch):
    monkeypatch.setattr("segcli.fields._STRIP_VALUES", 3 * out_hw[1] * 2)
    field = Upsampled(noise(3, 4, 5), in_hw)
    expected = interpolate(whole(field), out_hw)
    np.testing.assert_allclose(whole(Resized(field, out_hw)), expected, atol=1e-6)


def slide(size_hw, tile, stride, look, num_classes):
    """mmsegmentation's sliding window as it is described there, all planes at full size."""
    height, width = size_hw
    total = np.zeros((num_classes, height, width), np.float32)
    count = np.zeros((height, width), np.float32)
    for i in range(max(height - tile + stride - 1, 0) // stride + 1):
        for j in range(max(width - tile + stride - 1, 0) // stride + 1):
            bottom = min(i * stride + tile, height)
            right = min(j * stride + tile, width)
            top, left = max(bottom - tile, 0), max(right - tile, 0)
            logits = look(slice(top, bottom), slice(left, right))
            total[:, top:bottom, left:right] += interpolate(logits, (bottom - top, right - left))
            count[top:bottom, left:right] += 1
    assert count.min() > 0
    return total / count


@pytest.mark.parametrize(
    ("size_hw", "tile", "overlap"),
    [
        ((37, 53), 16, 5),
        ((64, 96), 32, 8),
        ((100, 33), 33, 32),
        ((20, 90), 32, 8),
        ((16, 16), 16, 0),
        ((7, 5), 32, 8),
        ((33, 31), 16, 0),
    ],
)
def test_sliding_windows_are_the_obvious_ones(size_hw, tile, overlap, monkeypatch):
    # So that a strip ends within windows, and within rows that two of them share.
    monkeypatch.setattr("segcli.fields._STRIP_VALUES", 4 * size_hw[1] * 7)
    image, looks = noise(4, *size_hw), []

    def look(rows, cols):
        looks.append((rows.start, cols.start))
        # Depends on the place within the window, as a network's padding does.
        part = image[:, rows, cols]
        return part[:, ::4, ::4] + np.linspace(0, 1, part[0, ::4, ::4].size).reshape(
            part[0, ::4, ::4].shape
        ).astype(np.float32)

    field = Tiled(size_hw, tile, overlap, look, 4)
    found = whole(field)
    ran = list(looks)
    expected = slide(size_hw, tile, tile - overlap, look, 4)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Each window ran once.
    assert sorted(ran) == sorted(looks[len(ran) :])
    assert (class_map(Tiled(size_hw, tile, overlap, look, 4)) == found.argmax(axis=0)).all()


def test_windows_of_cityscapes():
    # 2048 x 1024 at 1024 / 768: three windows, the last one moved inward.
    assert [w.start for w in windows(2048, 1024, 768)] == [0, 768, 1024]
    assert list(windows(1024, 1024, 768)) == [slice(0, 1024)]


@given(st.integers(1, 400), st.integers(1, 100), st.data())
def test_windows_cover_all_and_lie_inside(length, tile, data):
    stride = data.draw(st.integers(1, tile))
    found = list(windows(length, tile, stride))
    covered = np.zeros(length, int)
    for window in found:
        assert window.stop - window.start == min(tile, length)
        covered[window] += 1
    assert covered.min() >= 1
    assert len(found) == max(length - tile + stride - 1, 0) // stride + 1


def test_a_constant_image_has_no_seams():
    field = Tiled((50, 70), 32, 9, lambda *_: np.full((2, 8, 8), 3.25, np.float32), 2)
    assert (whole(field) == 3.25).all()


def test_windows_are_forgotten_below_their_last_row():
    field = Tiled((200, 30), 20, 4, lambda *_: noise(2, 5, 5), 2)
    most = 0
    for top in range(200):
        field.rows(top, top + 1)
        most = max(most, len(field._kept))
    assert most == 2


def test_logits_are_averaged_and_not_masks():
    # Two windows that disagree: the one that is surer wins where they overlap.
    def look(rows, cols):
        sure = cols.start == 0
        planes = np.zeros((2, 4, 4), np.float32)
        planes[0 if sure else 1] = 5 if sure else 1
        return planes

    found = class_map(Tiled((4, 6), 4, 2, look, 2))
    assert (found == [0, 0, 0, 0, 1, 1]).all()


def test_flipped():
    field = Upsampled(noise(3, 4, 5), (8, 10))
    assert (whole(Flipped(field)) == whole(field)[:, :, ::-1]).all()


def test_probabilities_are_averaged():
    fields = [Upsampled(noise(3, 4, 5, seed=i) * 4, (9, 13)) for i in range(3)]
    expected = np.mean(
        [torch.softmax(torch.from_numpy(whole(f)), 0).numpy() for f in fields], axis=0
    )
    found = whole(MeanProbability(fields))
    np.testing.assert_allclose(np.exp(found), expected, atol=1e-6)
    assert (class_map(MeanProbability(fields)) == found.argmax(axis=0)).all()


def test_softmax_of_large_values():
    assert softmax(np.array([[[1e30]], [[-1e30]]], np.float32)).ravel().tolist() == [1, 0]


def test_many_classes_are_16_bit():
    field = Resized(Upsampled(noise(300, 2, 2), (4, 4)), (5, 6))
    found = class_map(field)
    assert found.dtype == np.uint16
    assert (found == whole(field).argmax(axis=0)).all()
