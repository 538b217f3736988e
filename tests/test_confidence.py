import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segcli.confidence import class_map_and_confidence
from segcli.fields import Upsampled, class_map

SIDES = st.integers(1, 9)
SIZES = st.tuples(st.integers(1, 24), st.integers(1, 300))


def noise(shape, seed=0, scale=5.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def by_torch(logits, size_hw, activation, align_corners):
    """The margins of a whole tensor, K x H x W values and all."""
    torch = pytest.importorskip("torch")
    full = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None], size=size_hw, mode="bilinear", align_corners=align_corners
    )[0].double()
    full = full.sigmoid() if activation == "sigmoid" else full.softmax(0)
    best, second = full.topk(2, 0).values
    return (best - second).numpy()


@pytest.mark.export
@settings(max_examples=100)
@given(
    st.integers(0, 2**32),
    st.tuples(st.integers(3, 8), SIDES, SIDES),
    SIZES,
    st.sampled_from(["softmax", "identity", "sigmoid"]),
    st.booleans(),
    st.sampled_from([1, 5000, 1 << 19]),
)
def test_equals_interpolation_softmax_and_top_two(
    seed, shape, size_hw, activation, align_corners, strip_values
):
    field = Upsampled(noise(shape, seed), size_hw, align_corners=align_corners)
    before = field.logits.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segcli.fields._STRIP_VALUES", strip_values)
        ids, found = class_map_and_confidence(field, activation)
    assert found.dtype == np.float32
    expected = by_torch(field.logits, size_hw, activation, align_corners)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert (ids == class_map(field)).all()
    assert (field.logits == before).all()


def test_a_single_logit_against_nothing():
    # With its plane of zeros: |2 p - 1| of p = sigmoid(x).
    x = noise((1, 5, 7))
    field = Upsampled(np.concatenate([np.zeros_like(x), x]), (5, 7))
    p = 1 / (1 + np.exp(-x[0].astype(np.float64)))
    _, found = class_map_and_confidence(field, "sigmoid")
    np.testing.assert_allclose(found, np.abs(2 * p - 1), atol=1e-6)


def test_one_class_is_sure():
    ids, found = class_map_and_confidence(Upsampled(noise((1, 3, 3)), (9, 9)), "softmax")
    assert (found == 1).all()
    assert (ids == 0).all()


def test_small_margins_keep_their_digits():
    logits = np.array([1.0, 1.0 + 2**-20], np.float32).reshape(2, 1, 1)
    _, found = class_map_and_confidence(Upsampled(logits, (1, 1)), "softmax")
    assert found.item() == pytest.approx(2**-21, rel=1e-3)


def test_full_size_logits_are_never_held():
    field = Upsampled(noise((150, 16, 16)), (500, 600))
    tracemalloc.start()
    class_map_and_confidence(field, "softmax")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * 500 * 600 * 4 / 10
