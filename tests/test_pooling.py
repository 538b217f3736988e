import numpy as np
import pytest

from segcli.errors import InferenceError
from segcli.pooling import pool


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_windows_are_torchs_average_pooling():
    torch = pytest.importorskip("torch")
    features = noise(5, 9, 12)
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(features), 7, stride=1).numpy()
    found = pool(features, "7x7")
    assert found.shape == (5, 3, 6)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_window_is_the_mean():
    features = noise(4, 7, 7)
    np.testing.assert_allclose(pool(features, "7x7")[:, 0, 0], pool(features, "mean"), atol=1e-6)


def test_means():
    features = noise(4, 5, 6)
    np.testing.assert_allclose(pool(features, "mean"), features.mean((1, 2)), atol=1e-6)
    tokens = noise(30, 4)
    np.testing.assert_allclose(pool(tokens, "mean"), tokens.mean(0), atol=1e-6)
    assert pool(tokens[0], "mean") is not None
    assert (pool(tokens[0], "mean") == tokens[0]).all()
    assert pool(features, "none") is features


@pytest.mark.parametrize("shape", [(4, 6, 9), (4, 9, 6), (30, 4)])
def test_no_windows(shape):
    with pytest.raises(InferenceError, match=r"have no windows of 7x7"):
        pool(noise(*shape), "7x7")
