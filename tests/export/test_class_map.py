"""The graph that makes class maps on a GPU gives on the CPU what the exact argmax gives."""

from importlib.resources import files

import numpy as np
import pytest

pytest.importorskip("torch")

from segcli.export.class_map import build
from segcli.postprocess import argmax_class_map
from segcli.session import Session

pytestmark = pytest.mark.export


def test_the_package_carries_this_graph():
    assert (files("segcli.data") / "class_map.onnx").read_bytes() == build()


@pytest.mark.parametrize("size_hw", [(97, 131), (64, 96), (16, 24), (7, 5), (1, 200)])
def test_it_is_the_exact_argmax_but_for_near_ties(tiny_model, size_hw):
    session = Session(tiny_model(), device="cpu", threads=1)
    batch = np.random.default_rng(0).standard_normal((1, 3, 64, 96), np.float32)
    [logits] = session.run(batch)
    expected = argmax_class_map(logits[0], size_hw)
    [found] = session.class_maps(batch, [size_hw])
    assert found.shape == size_hw
    assert len(np.unique(expected)) > 1
    assert (found == expected).mean() >= 0.999
