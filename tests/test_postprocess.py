import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segcli import postprocess
from segcli.errors import InferenceError
from segcli.postprocess import argmax_class_map, count_classes, scores, top_k


def obvious_class_map(logits, size_hw, align_corners=False):
    """Every class at every pixel in float32, in the order the docstring promises."""
    one, half, zero = np.float32(1), np.float32(0.5), np.float32(0)

    def axis(in_size, out_size):
        table = []
        for pixel in range(out_size):
            if align_corners:
                scale = np.float32(in_size - 1) / np.float32(max(out_size - 1, 1))
                position = scale * np.float32(pixel)
            else:
                scale = np.float32(in_size) / np.float32(out_size)
                position = max(scale * (np.float32(pixel) + half) - half, zero)
            low = min(int(position), in_size - 1)
            weight = min(max(position - np.float32(low), zero), one)
            table.append((low, min(low + 1, in_size - 1), one - weight, weight))
        return table

    rows, cols = axis(logits.shape[1], size_hw[0]), axis(logits.shape[2], size_hw[1])
    out = np.empty(size_hw, np.int64)
    for y, (top, bottom, h0, h1) in enumerate(rows):
        for x, (left, right, w0, w1) in enumerate(cols):
            upper = h0 * (w0 * logits[:, top, left] + w1 * logits[:, top, right])
            lower = h1 * (w0 * logits[:, bottom, left] + w1 * logits[:, bottom, right])
            out[y, x] = np.argmax(upper + lower)
    return out


def smooth_field(num_classes, height, width, seed=0, blur=2.0):
    noise = np.random.default_rng(seed).standard_normal((num_classes, height, width))
    planes = [cv2.GaussianBlur(plane, (0, 0), blur) for plane in noise]
    return (5 * np.stack(planes) / np.std(planes)).astype(np.float32)


@st.composite
def fields(draw):
    side = st.integers(1, 9)
    num_classes = draw(st.integers(1, 8))
    shape = (num_classes, draw(side), draw(side))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["noise", "ties", "near ties", "masked", "tiny"]))
    logits = rng.standard_normal(shape)
    if kind == "ties":
        logits = rng.integers(-1, 2, shape)
    elif kind == "near ties":
        # One float32 step apart, so that rounding inside a cell makes them equal.
        logits = np.float32(3) + rng.integers(0, 3, shape) * np.float32(2**-22)
    elif kind == "masked":
        logits[rng.random(shape) < 0.3] = -1e30
    elif kind == "tiny":
        logits *= 1e-44
    return logits.astype(np.float32)


@settings(max_examples=300, deadline=None)
@given(
    fields(),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.booleans(),
    st.sampled_from([1, 64, 1 << 19]),
)
def test_equals_the_obvious_class_map(logits, size_hw, align_corners, strip_values):
    given_logits = logits.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess, "_STRIP_VALUES", strip_values)
        found = argmax_class_map(logits, size_hw, align_corners=align_corners)
    np.testing.assert_array_equal(found, obvious_class_map(logits, size_hw, align_corners))
    np.testing.assert_array_equal(logits, given_logits)


@pytest.mark.parametrize("size_hw", [(100, 3), (2, 150), (97, 101)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_spans_longer_than_the_limit(size_hw, align_corners):
    logits = smooth_field(5, 2, 3, blur=0.3)
    np.testing.assert_array_equal(
        argmax_class_map(logits, size_hw, align_corners=align_corners),
        obvious_class_map(logits, size_hw, align_corners),
    )


def test_class_that_leads_at_no_corner_wins_inside():
    logits = np.array([[[4, 0], [0, 4]], [[0, 4], [4, 0]], [[3, 3], [3, 3]]])
    found = argmax_class_map(logits.astype(np.float32), (32, 32))
    assert 2 not in (found[0, 0], found[0, -1], found[-1, 0], found[-1, -1])
    assert (found[12:20, 12:20] == 2).all()


def test_rounding_inside_a_cell_of_one_leader_may_tie():
    # Class 1 leads by one float32 step at every corner, but not after interpolation.
    behind = np.array([[1.1, 3.3], [5.7, 2.9]], np.float32)
    logits = np.stack([behind, np.nextafter(behind, np.float32(9))])
    expected = obvious_class_map(logits, (7, 7))
    assert set(expected.ravel()) == {0, 1}
    np.testing.assert_array_equal(argmax_class_map(logits, (7, 7)), expected)


def test_ties_go_to_the_lowest_id():
    assert not argmax_class_map(np.zeros((150, 3, 3), np.float32), (20, 20)).any()


@pytest.mark.parametrize(
    ("num_classes", "dtype"), [(256, np.uint8), (257, np.uint16), (300, np.uint16)]
)
def test_dtype_holds_the_last_class(num_classes, dtype):
    logits = np.zeros((num_classes, 2, 2), np.float32)
    logits[-1, :, 1] = 1
    found = argmax_class_map(logits, (4, 8))
    assert found.dtype == dtype
    assert found[0, -1] == num_classes - 1
    assert found[0, 0] == 0


@pytest.mark.parametrize(
    ("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")]
)
def test_non_finite_logits_are_refused(value, word):
    logits = np.zeros((3, 4, 4), np.float32)
    logits[1, 2, 3] = value
    with pytest.raises(InferenceError, match=word):
        argmax_class_map(logits, (1, 1))
    with pytest.raises(InferenceError, match=word):
        scores(logits[:, 2, 3], "softmax")


def test_memory_stays_far_below_the_full_size_logits():
    logits = smooth_field(150, 64, 64)
    size_hw = (540, 960)
    tracemalloc.start()
    argmax_class_map(logits, size_hw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25e6  # full-size float32 logits are 311 MB


@pytest.mark.export
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("in_hw", "size_hw"),
    [
        ((64, 64), (270, 481)),
        ((33, 65), (513, 513)),
        ((40, 60), (40, 60)),
        ((50, 40), (17, 90)),
        ((1, 30), (11, 200)),
    ],
)
def test_matches_torch_outside_near_ties(in_hw, size_hw, align_corners):
    import torch

    logits = smooth_field(30, *in_hw)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None],
        size_hw,
        mode="bilinear",
        align_corners=align_corners,
    )[0]
    found = argmax_class_map(logits, size_hw, align_corners=align_corners)
    differs = found != resized.argmax(0).numpy()
    best, second = resized.topk(2, dim=0).values.numpy()
    near_tie = best - second < 1e-5 * np.abs(logits).max()
    assert np.count_nonzero(differs & ~near_tie) == 0
    assert np.count_nonzero(differs) <= 2


def test_softmax_is_stable_and_sums_to_one():
    found = scores(np.array([1000, 1001, -1000], np.float32), "softmax")
    np.testing.assert_allclose(found, [1 / (1 + np.e), np.e / (1 + np.e), 0], rtol=1e-12)
    assert found.sum() == pytest.approx(1, abs=1e-15)


def test_sigmoid_scores_each_class_alone():
    found = scores(np.array([0, 2, -800, 800], np.float32), "sigmoid")
    np.testing.assert_allclose(found, [0.5, 1 / (1 + np.exp(-2)), 0, 1], rtol=1e-12)


def test_identity_leaves_logits_and_shares_no_memory():
    logits = np.array([3.0, -4.0])
    found = scores(logits, "identity")
    np.testing.assert_array_equal(found, [3, -4])
    assert not np.shares_memory(found, logits)


def test_top_k_is_best_first_with_ties_by_id():
    values = np.array([0.1, 0.4, 0.1, 0.4, 0.0])
    assert top_k(values, 3) == [(1, 0.4), (3, 0.4), (0, 0.1)]
    assert [i for i, _ in top_k(values, 9)] == [1, 3, 0, 2, 4]
    many_ties = np.arange(1000) % 2 / 2
    assert [i for i, _ in top_k(many_ties, 500)] == list(range(1, 1000, 2))


@pytest.mark.parametrize("num_classes", [2, 11, 256, 300])
def test_classes_are_counted_exactly(monkeypatch, num_classes):
    dtype = np.uint8 if num_classes <= 256 else np.uint16
    class_map = np.random.default_rng(0).integers(0, num_classes, (37, 53)).astype(dtype)
    class_map[0, 0] = num_classes - 1
    expected = [(class_map == i).sum() for i in range(num_classes)]
    for at_once in (1 << 20, 200, 1):
        # In one strip, in several whose last is shorter, and row by row.
        monkeypatch.setattr("segcli.postprocess._COUNTED_AT_ONCE", at_once)
        assert count_classes(class_map, num_classes).tolist() == expected
