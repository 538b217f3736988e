import numpy as np
import pytest

from segcli.thumbnail import MOST_HIGH, MOST_WIDE, sample_class_map, thumbnail


def test_averages_areas():
    image = np.zeros((4, 4 * MOST_WIDE, 3), np.uint8)
    image[:, 0::2] = (100, 0, 255)
    found = thumbnail(image)
    assert found.shape == (1, MOST_WIDE, 3)
    assert np.abs(found.astype(int) - (50, 0, 128)).max() <= 1


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [
        ((240, 320), (240, 320)),
        ((720, 960), (240, 320)),
        ((9600, 100), (MOST_HIGH, 5)),
        ((1, 5000), (1, 320)),
        ((5000, 1), (480, 1)),
        ((3, 2), (3, 2)),
    ],
)
def test_sizes(size_hw, expected):
    found = thumbnail(np.zeros((*size_hw, 3), np.uint8))
    assert found.shape == (*expected, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_samples_centres_and_mixes_no_ids(dtype):
    class_map = np.arange(36, dtype=dtype).reshape(6, 6)
    found = sample_class_map(class_map, (2, 3))
    assert found.dtype == dtype
    assert found.tolist() == [[7, 9, 11], [25, 27, 29]]


def test_samples_up_as_well():
    class_map = np.array([[1, 2]], np.uint8)
    assert sample_class_map(class_map, (2, 4)).tolist() == [[1, 1, 2, 2]] * 2


def test_same_size_is_the_map_itself():
    class_map = np.random.default_rng(0).integers(0, 9, (7, 5)).astype(np.uint8)
    assert (sample_class_map(class_map, (7, 5)) == class_map).all()
