import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as pycocotools_mask

from segcli.coco import encode_rle, trace_polygons

# pycocotools 2.0.11 decodes into an array of NumPy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# 1 x 1, rows and columns among them; few classes make holes and diagonals.
CLASS_MAPS = st.one_of(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=st.integers(0, last),
    )
    for last in (1, 2, 5)
)
CHECKERBOARD = (np.indices((7, 6)).sum(axis=0) % 2).astype(np.uint8)


def nested(size):
    """Square frames of classes 0 and 1 in turn: holes in holes."""
    distance = np.minimum(np.arange(size), np.arange(size)[::-1])
    return (np.minimum.outer(distance, distance) % 2).astype(np.uint8)


def reference_counts(mask):
    return pycocotools_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


def check_rle(class_map, class_ids):
    strings = encode_rle(class_map, class_ids)
    assert list(strings) == class_ids
    for class_id, counts in strings.items():
        mask = class_map == class_id
        assert counts == reference_counts(mask)
        decoded = pycocotools_mask.decode({"size": list(mask.shape), "counts": counts})
        np.testing.assert_array_equal(decoded, mask)


def even_odd(rings, shape):
    """Fills by the definition: a pixel is in if a ray to its left crosses the rings oddly often."""
    crossings = np.zeros(shape, np.int64)
    for ring in rings:
        for (x, y), (to_x, to_y) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if x == to_x:
                crossings[min(y, to_y) : max(y, to_y), x:] += 1
    return crossings % 2 == 1


def signed_area(ring):
    x, y = ring.T
    return int((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2


def check_polygons(class_map, class_ids):
    polygons = trace_polygons(class_map, class_ids)
    assert list(polygons) == class_ids
    for class_id, rings in polygons.items():
        mask = class_map == class_id
        np.testing.assert_array_equal(even_odd(rings, mask.shape), mask)
        assert sum(map(signed_area, rings)) == mask.sum()
        firsts = [(ring[0, 1], ring[0, 0]) for ring in rings]
        assert firsts == sorted(firsts)
        for ring in rings:
            assert tuple(ring[0, ::-1]) == min((y, x) for x, y in ring)
            # Steps go along rows and columns in turn: no corner lies on a straight line.
            steps = np.roll(ring, -1, axis=0) - ring
            assert (np.count_nonzero(steps, axis=1) == 1).all()
            assert ((steps[:, 0] == 0) != (np.roll(steps, 1, axis=0)[:, 0] == 0)).all()


@given(CLASS_MAPS)
def test_rle_is_that_of_pycocotools(class_map):
    before = class_map.copy()
    check_rle(class_map, [0, 1, 2, 7])
    assert list(encode_rle(class_map)) == np.unique(class_map).tolist()
    np.testing.assert_array_equal(class_map, before)


@given(CLASS_MAPS)
def test_an_even_odd_fill_of_the_polygons_is_the_mask(class_map):
    before = class_map.copy()
    check_polygons(class_map, [0, 1, 2, 7])
    assert list(trace_polygons(class_map)) == np.unique(class_map).tolist()
    np.testing.assert_array_equal(class_map, before)


@pytest.mark.parametrize(
    "class_map",
    [
        *(
            np.full(shape, v, np.uint8)
            for shape in [(1, 1), (1, 9), (9, 1), (5, 4)]
            for v in (0, 1)
        ),
        np.array([[0, 0, 1, 1, 0]], np.uint8),
        CHECKERBOARD,
        nested(17),
        np.kron(nested(9), np.ones((3, 2), np.uint8)),
        np.array([[300, 65535], [65535, 0]], np.uint16),
    ],
    ids=lambda m: f"{m.shape[0]}x{m.shape[1]}",
)
def test_full_empty_and_difficult_masks(class_map):
    class_ids = sorted({0, 1, *np.unique(class_map).tolist()})
    check_rle(class_map, class_ids)
    check_polygons(class_map, class_ids)


def test_run_lengths_and_differences_of_many_digits():
    # Runs of 2**k and their mirror image: differences on both sides of each digit's limit.
    lengths = [2**k + d for k in range(17) for d in (-1, 0, 1)]
    lengths += lengths[::-1]
    row = np.repeat(np.arange(len(lengths)) % 2, lengths).astype(np.uint8)
    check_rle(row[:, None], [0, 1])
    check_rle(row[None, :], [0, 1])


def test_counts_of_a_mask_that_is_known():
    # Down the columns: 2 zeros, 3 ones, 1 zero; "O" is 1 - 2.
    assert encode_rle(np.array([[0, 1], [0, 1], [1, 0]], np.uint8)) == {0: "023O", 1: "231"}


def test_rings_of_a_frame_and_its_hole():
    class_map = nested(5)[1:4, 1:4]  # a frame of ones around a zero
    polygons = trace_polygons(class_map)
    outer, hole = polygons[1]
    assert outer.tolist() == [[0, 0], [3, 0], [3, 3], [0, 3]]
    assert hole.tolist() == [[1, 1], [1, 2], [2, 2], [2, 1]]
    assert [ring.tolist() for ring in polygons[0]] == [[[1, 1], [2, 1], [2, 2], [1, 2]]]


def test_pixels_that_touch_at_a_corner_are_apart():
    polygons = trace_polygons(CHECKERBOARD)
    assert [len(rings) for rings in polygons.values()] == [21, 21]
    assert {len(ring) for ring in polygons[0]} == {4}


def test_deterministic_whatever_the_memory_layout():
    class_map = np.random.default_rng(1).integers(0, 4, (40, 30)).astype(np.uint8)
    views = [class_map, np.asfortranarray(class_map), np.repeat(class_map, 2, axis=1)[:, ::2]]
    for view in views:
        assert encode_rle(view) == encode_rle(class_map)
        found, expected = trace_polygons(view), trace_polygons(class_map)
        for class_id, rings in expected.items():
            assert [r.tolist() for r in found[class_id]] == [r.tolist() for r in rings]
