from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segcli.artifact import Interpolation
from segcli.resize import resize

# The numbers that preprocessor_config.json has for ``resample``.
RESAMPLE = {
    "nearest": 0,
    "lanczos": 1,
    "bilinear": 2,
    "bicubic": 3,
    "box": 4,
    "hamming": 5,
}

sides = st.integers(1, 80)


def test_every_filter_is_tested():
    assert set(RESAMPLE) == set(get_args(Interpolation))


@settings(max_examples=300, deadline=None)
@given(
    st.tuples(sides, sides),
    st.tuples(sides, sides),
    st.sampled_from(sorted(RESAMPLE)),
    st.integers(0, 1 << 32),
)
def test_equals_pillow(image_hw, size_hw, interpolation, seed):
    image = np.random.default_rng(seed).integers(0, 256, (*image_hw, 3), np.uint8)
    image.flags.writeable = False
    expected = Image.fromarray(image).resize(size_hw[::-1], RESAMPLE[interpolation])
    resized = resize(image, size_hw, interpolation)
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized, np.array(expected))


def triangle_resize(image, size_hw):
    """Pillow's bilinear as a loop: a widened triangle, across then down, bytes between."""

    def along_first(values, out_length):
        scale = len(values) / out_length
        support = max(scale, 1.0)
        rows = []
        for i in range(out_length):
            centre = (i + 0.5) * scale
            first = max(int(centre - support + 0.5), 0)
            last = min(int(centre + support + 0.5), len(values))
            weights = [max(1 - abs((k + 0.5 - centre) / support), 0) for k in range(first, last)]
            row = sum(
                w * values[k].astype(np.float64)
                for w, k in zip(weights, range(first, last), strict=True)
            )
            rows.append(np.floor(row / sum(weights) + 0.5))
        return np.stack(rows)

    across = along_first(image.swapaxes(0, 1), size_hw[1]).swapaxes(0, 1)
    return along_first(across, size_hw[0]).astype(np.uint8)


@pytest.mark.parametrize(
    ("image_hw", "size_hw"),
    [((40, 61), (13, 17)), ((9, 7), (20, 33)), ((30, 8), (11, 16))],
)
def test_bilinear_widens_when_it_shrinks(image_hw, size_hw):
    image = np.random.default_rng(0).integers(0, 256, (*image_hw, 3), np.uint8)
    resized = resize(image, size_hw, "bilinear").astype(int)
    # From version 13 on Pillow goes down first where the height shrinks much more.
    turned = triangle_resize(image.swapaxes(0, 1), size_hw[::-1]).swapaxes(0, 1)
    difference = min(
        (np.abs(resized - slow) for slow in (triangle_resize(image, size_hw), turned)),
        key=np.sum,
    )
    # Pillow's weights have 22 bits, so a tie may fall the other way.
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= difference.size // 50


def test_views_are_taken():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    view = image[::-1, 5:30]
    np.testing.assert_array_equal(
        resize(view, (12, 13), "bicubic"), resize(view.copy(), (12, 13), "bicubic")
    )
