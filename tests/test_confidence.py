import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segcli import confidence
from segcli.confidence import confidence_map
from segcli.errors import InferenceError
from segcli.postprocess import segment_logits

SIDES = st.integers(1, 9)
SIZES = st.tuples(st.integers(1, 24), st.integers(1, 300))


def noise(shape, seed=0, scale=5.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def by_torch(logits, size_hw, activation, align_corners):
    """The margins of a float64 tensor, K x H x W values and all."""
    torch = pytest.importorskip("torch")
    full = torch.nn.functional.interpolate(
        torch.from_numpy(logits).double()[None],
        size=size_hw,
        mode="bilinear",
        align_corners=align_corners,
    )[0]
    if activation == "sigmoid":
        p = full.sigmoid()
        if len(p) == 1:
            return (2 * p[0] - 1).abs().numpy()
    else:
        p = full.softmax(0)
    best, second = p.topk(2, 0).values
    return (best - second).numpy()


@pytest.mark.export
@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.tuples(st.integers(2, 8), SIDES, SIDES),
    SIZES,
    st.sampled_from(["softmax", "identity", "sigmoid"]),
    st.booleans(),
    st.sampled_from([1, 5000, 1 << 19]),
)
def test_equals_interpolation_softmax_and_top_two(
    seed, shape, size_hw, activation, align_corners, tile_values
):
    logits = noise(shape, seed)
    before = logits.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confidence, "_TILE_VALUES", tile_values)
        found = confidence_map(logits, size_hw, activation, align_corners=align_corners)
    assert found.dtype == np.float32
    expected = by_torch(logits, size_hw, activation, align_corners)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.export
@pytest.mark.parametrize("align_corners", [False, True])
def test_margin_of_a_single_sigmoid_is_its_distance_from_even(align_corners):
    logits = noise((1, 12, 17), 4)
    found = confidence_map(logits, (50, 170), "sigmoid", align_corners=align_corners)
    expected = by_torch(logits, (50, 170), "sigmoid", align_corners)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.export
def test_float32_interpolation_of_150_classes_is_as_close_as_float32_is():
    torch = pytest.importorskip("torch")
    logits = noise((150, 32, 32), 1)
    full = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None], size=(270, 480), mode="bilinear"
    )
    best, second = full.softmax(1).topk(2, 1).values[0]
    found = confidence_map(logits, (270, 480), "softmax", align_corners=False)
    np.testing.assert_allclose(found, (best - second).numpy(), rtol=0, atol=2e-4)
    expected = by_torch(logits, (270, 480), "softmax", align_corners=False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_values_that_are_known():
    # Probabilities 0.7, 0.2 and 0.1, whatever is added to all logits.
    logits = np.log(np.array([0.2, 0.7, 0.1])).astype(np.float32)[:, None, None] + 80
    margin = confidence_map(logits, (2, 3), "softmax", align_corners=False)
    np.testing.assert_allclose(margin, np.full((2, 3), 0.5), atol=1e-5)
    even = confidence_map(np.zeros((4, 2, 2), np.float32), (3, 3), "softmax", align_corners=False)
    assert (even == 0).all()


def test_huge_logits_stay_within_0_and_1():
    logits = noise((3, 4, 4), 2, scale=1e30)
    for activation in ("softmax", "sigmoid"):
        found = confidence_map(logits, (9, 9), activation, align_corners=True)
        assert ((found >= 0) & (found <= 1)).all()


def test_one_class_is_certain():
    found = confidence_map(noise((1, 2, 2)), (3, 4), "softmax", align_corners=False)
    np.testing.assert_array_equal(found, np.ones((3, 4), np.float32))


def test_margin_is_smallest_where_the_class_changes():
    logits = np.stack([np.tile(np.linspace(-4, 4, 9, dtype=np.float32), (3, 1))] * 2)
    logits[1] *= -1
    margin = confidence_map(logits, (30, 90), "softmax", align_corners=False)
    class_map, _ = segment_logits(logits, (30, 90), "softmax", align_corners=False)
    border = np.flatnonzero(np.diff(class_map[0].astype(int)))
    assert margin[0].argmin() in (border[0], border[0] + 1)
    assert margin[0, [0, -1]].min() > 0.99


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_logits_are_refused(value):
    logits = np.zeros((3, 4, 4), np.float32)
    logits[1, 2, 3] = value
    with pytest.raises(InferenceError, match="NaN or infinite"):
        confidence_map(logits, (1, 1), "softmax", align_corners=False)


def test_memory_stays_far_below_the_full_size_logits():
    logits = noise((150, 64, 64))
    tracemalloc.start()
    confidence_map(logits, (540, 960), "softmax", align_corners=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15e6  # full-size float32 logits are 311 MB
