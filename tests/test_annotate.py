import numpy as np
import pytest

from segcli.annotate import draw_contours, draw_names
from segcli.lettering import text_width

PALETTE = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [90, 90, 90]], np.uint8)
NAMES = ("sky", "road", "car", "tree")


def gray(class_map, value=128):
    return np.full((*class_map.shape, 3), value, np.uint8)


def halves(height, width):
    class_map = np.zeros((height, width), np.uint8)
    class_map[:, width // 2 :] = 1
    return class_map


@pytest.mark.parametrize(("width", "side"), [(8, 1), (320, 1), (1600, 2), (4000, 5)])
def test_each_side_of_a_border_is_a_line_in_its_own_color(width, side):
    class_map = halves(6, width)
    picture = gray(class_map)
    drawn = draw_contours(picture, class_map, PALETTE)
    middle = width // 2
    assert (drawn[:, middle - side : middle] == PALETTE[0]).all()
    assert (drawn[:, middle : middle + side] == PALETTE[1]).all()
    assert (drawn[:, : middle - side] == 128).all()
    assert (drawn[:, middle + side :] == 128).all()
    assert (picture == 128).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_borders_of_hidden_classes_are_not_drawn(dtype):
    class_map = np.repeat(np.array([[0, 3, 1, 2]], dtype), 20, axis=1).repeat(9, axis=0)
    before = class_map.copy()
    drawn = draw_contours(gray(class_map), class_map, PALETTE, visible=[1])
    changed = np.flatnonzero((drawn != 128).any(axis=(0, 2)))
    assert changed.tolist() == [40, 59]
    assert (drawn[:, changed] == PALETTE[1]).all()
    np.testing.assert_array_equal(class_map, before)
    everything = draw_contours(gray(class_map), class_map, PALETTE, visible=range(4))
    np.testing.assert_array_equal(everything, draw_contours(gray(class_map), class_map, PALETTE))
    assert (draw_contours(gray(class_map), class_map, PALETTE, visible=[]) == 128).all()


def test_one_class_has_no_contour():
    class_map = np.zeros((30, 40), np.uint8)
    assert (draw_contours(gray(class_map), class_map, PALETTE) == 128).all()


def named_pixels(class_map, names=NAMES, **options):
    return (draw_names(gray(class_map), class_map, names, **options) != 128).any(axis=2)


@pytest.mark.parametrize("scale", [1, 7])
def test_a_name_lies_in_the_largest_region_of_its_class(scale):
    small = np.zeros((200, 300), np.uint8)
    small[20:120, 10:90] = 1
    small[150:190, 200:240] = 1
    small[100:160, 120:190] = 2
    class_map = np.kron(small, np.ones((scale, scale), np.uint8))
    for class_id, inside in [(1, np.s_[20:120, 10:90]), (2, np.s_[100:160, 120:190])]:
        changed = named_pixels(class_map, visible=[class_id])
        box = tuple(slice(s.start * scale, s.stop * scale) for s in inside)
        assert changed[box].sum() == changed.sum() > 100 * scale
        # In the middle, since the region is a rectangle.
        y, x = np.nonzero(changed[box])
        assert abs(y.min() + y.max() - changed[box].shape[0]) < 12 * scale
        assert abs(x.min() + x.max() - changed[box].shape[1]) < 12 * scale


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size_hw", [(240, 320), (1301, 1900)])
def test_no_name_leaves_its_class_so_none_overlap(seed, size_hw):
    rng = np.random.default_rng(seed)
    centers = rng.random((4, 2)) * size_hw
    points = np.stack(np.indices(size_hw), axis=-1)
    distances = [np.linalg.norm(points - center, axis=2) for center in centers]
    class_map = np.argmin(distances, axis=0).astype(np.uint8)
    found = 0
    for class_id in range(4):
        changed = named_pixels(class_map, visible=[class_id])
        assert (class_map[changed] == class_id).all()
        found += changed.any()
    assert found >= 3


def test_the_deepest_place_is_taken():
    # A long corridor beside a hall: both hold the name.
    class_map = np.zeros((200, 400), np.uint8)
    class_map[90:115, 10:300] = 1
    class_map[40:165, 280:390] = 1
    _, x = np.nonzero(named_pixels(class_map, visible=[1]))
    assert x.min() > 290


def test_a_name_shrinks_and_is_left_out_where_it_does_not_fit():
    def width_in(room):
        class_map = np.zeros((1000, 1000), np.uint8)
        class_map[100:200, 100 : 100 + room] = 1
        x = np.flatnonzero(named_pixels(class_map, visible=[1]).any(axis=0))
        return int(x[-1] - x[0]) if x.size else 0

    usual = text_width("road", round(1000 / 28))
    assert width_in(500) == pytest.approx(usual, abs=12)
    assert 0.4 * usual < width_in(round(0.8 * usual)) < 0.8 * usual
    assert width_in(round(0.4 * usual)) == 0
    assert not named_pixels(np.zeros((9, 9), np.uint8)).any()


@pytest.mark.parametrize("color", [0, 128, 255])
def test_names_are_white_within_black_on_any_color(color):
    class_map = np.zeros((600, 900), np.uint8)
    drawn = draw_names(gray(class_map, color), class_map, NAMES)[..., 0]
    white, black = drawn == 255, drawn == 0
    y, x = np.nonzero(white if color != 255 else np.zeros_like(white))
    assert color == 255 or y.size > 50
    assert color == 0 or black.sum() > 50
    # The white of a letter never touches the picture's own color.
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        assert color == 0 or (drawn[y + dy, x + dx] != color).all()


def test_names_that_cannot_be_drawn_become_ids():
    class_map = np.zeros((200, 300), np.uint8)
    found = draw_names(gray(class_map), class_map, ("ह",))
    np.testing.assert_array_equal(found, draw_names(gray(class_map), class_map, ("class 0",)))
    assert not np.array_equal(found, draw_names(gray(class_map), class_map, ("?",)))


def test_inputs_stay_and_sizes_must_agree():
    class_map = halves(100, 200)
    picture = gray(class_map)
    draw_names(picture, class_map, NAMES)
    assert (picture == 128).all()
    np.testing.assert_array_equal(class_map, halves(100, 200))
    for draw in (draw_contours, draw_names):
        with pytest.raises(ValueError, match=r"\(100, 200\).*\(100, 199\)"):
            draw(picture, class_map[:, 1:], PALETTE if draw is draw_contours else NAMES)
