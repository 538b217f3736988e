import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli import render
from segcli.render import (
    color_confidence,
    colorize,
    cutout,
    keep_classes,
    legend,
    overlay,
    with_legend,
)

WHITE = [255, 255, 255]
PALETTE = np.array([[10, 20, 30], [200, 100, 0], [255, 255, 255]], np.uint8)


def scene(seed, height=5, width=7, num_classes=3, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    class_map = rng.integers(0, num_classes, (height, width)).astype(dtype)
    palette = rng.integers(0, 256, (num_classes, 3), dtype=np.uint8)
    return image, class_map, palette


@given(
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.integers(1, 5),
    st.sampled_from([(1, np.uint8), (256, np.uint8), (256, np.uint16), (900, np.uint16)]),
)
def test_colorize_looks_up_every_pixel(seed, height, width, kind):
    _, class_map, palette = scene(seed, height, width, *kind)
    colored = colorize(class_map, palette)
    assert colored.dtype == np.uint8
    np.testing.assert_array_equal(colored, palette[class_map])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colorize_blackens_what_is_not_visible(dtype):
    class_map = np.array([[0, 1], [2, 1]], dtype)
    black = [0, 0, 0]
    np.testing.assert_array_equal(
        colorize(class_map, PALETTE, visible={1}),
        [[black, PALETTE[1]], [black, PALETTE[1]]],
    )
    assert not colorize(class_map, PALETTE, visible=[]).any()
    assert PALETTE[2].tolist() == WHITE


def test_class_without_a_color_is_refused():
    with pytest.raises(ValueError, match="class 3 has no color among 3"):
        colorize(np.array([[0, 3]], np.uint8), PALETTE)


@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 5, 33, 64]),
    st.one_of(st.sampled_from([0, 0.25, 0.5, 1]), st.floats(0, 1)),
)
def test_overlay_is_the_float64_blend_with_halves_up(seed, height, opacity):
    image, class_map, palette = scene(seed, height)
    before = image.copy()
    found = overlay(image, class_map, palette, opacity)
    weight = round(opacity * 65536) / 65536
    for (y, x, channel), value in np.ndenumerate(found):
        color = float(palette[class_map[y, x], channel])
        blend = (1 - weight) * float(image[y, x, channel]) + weight * color
        assert value == math.floor(blend + 0.5)
    np.testing.assert_array_equal(image, before)


def test_overlay_leaves_hidden_classes_as_they_are():
    image, class_map, palette = scene(3, height=40)
    found = overlay(image, class_map, palette, 0.7, visible=[2])
    everywhere = overlay(image, class_map, palette, 0.7)
    np.testing.assert_array_equal(found, np.where(class_map[..., None] == 2, everywhere, image))
    np.testing.assert_array_equal(overlay(image, class_map, palette, 0.7, visible=[]), image)


@pytest.mark.parametrize("opacity", [-0.01, 1.01, math.nan])
def test_overlay_refuses_opacity_outside_0_1(opacity):
    with pytest.raises(ValueError, match="opacity"):
        overlay(*scene(0), opacity)


def test_overlay_refuses_a_class_map_of_another_size():
    image, class_map, palette = scene(0)
    with pytest.raises(ValueError, match=r"\(5, 7\).*\(5, 6\)"):
        overlay(image, class_map[:, :6], palette, 0.5)


def test_cutout_is_opaque_exactly_where_a_visible_class_is():
    image, class_map, _ = scene(4)
    found = cutout(image, class_map, [0, 2])
    np.testing.assert_array_equal(found[..., 3], np.where(class_map == 1, 0, 255))
    kept = class_map != 1
    np.testing.assert_array_equal(found[kept, :3], image[kept])
    assert (found[~kept] == 0).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_keep_classes_fills_the_others(dtype):
    class_map = np.array([[0, 1, 2], [2, 1, 0]], dtype)
    found = keep_classes(class_map, [2], fill=255)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, [[255, 255, 2], [2, 255, 255]])
    np.testing.assert_array_equal(class_map, [[0, 1, 2], [2, 1, 0]])


def swatch_rows(panel, color):
    return np.flatnonzero((panel == color).all(axis=2).any(axis=1))


def dark_columns(panel):
    return np.flatnonzero((panel < 100).all(axis=2).any(axis=0))


def test_legend_shows_swatches_in_order_on_white():
    entries = [("sky", (250, 0, 0), 0.75), ("wall", (0, 0, 250), 0.25)]
    panel = legend(entries, 300)
    assert panel.shape[0] == 300
    assert panel.dtype == np.uint8
    assert panel[-1, -1].tolist() == WHITE
    red, blue = swatch_rows(panel, entries[0][1]), swatch_rows(panel, entries[1][1])
    assert 10 <= len(red) == len(blue)
    assert red.max() < blue.min()


def test_legend_writes_names_and_shares():
    def drawn(name, share):
        return legend([(name, (0, 250, 0), share)], 300)

    without_share = drawn("wall", None)
    assert dark_columns(without_share).size > 10
    assert drawn("wall", 0.5).shape[1] > without_share.shape[1]
    assert not np.array_equal(drawn("wall", 0.25), drawn("wall", 0.26))
    assert drawn("a long wall", None).shape[1] > without_share.shape[1]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, ""),
        (1.0, "100.0 %"),
        (0.12345, "12.3 %"),
        (0.0004, "<0.1 %"),
        (0, "0.0 %"),
    ],
)
def test_share_in_percent(share, text):
    assert render._percent(share) == text


@pytest.mark.parametrize("height", [1, 64, 720, 3000])
@pytest.mark.parametrize("count", [1, 13, 150])
def test_every_entry_has_its_swatch_at_any_height(height, count):
    colors = [(100 + i, 200, 30 + i) for i in range(count)]
    panel = legend([(f"class {i}", c, 0.1) for i, c in enumerate(colors)], height)
    assert panel.shape[0] >= height
    # The text is grey: red alone tells the swatches, which are 70 apart from blue.
    is_swatch = panel[..., 0] - panel[..., 2].astype(int) == 70
    areas = np.bincount(panel[is_swatch][:, 0])[100:]
    assert len(areas) == count
    assert areas.min() == areas.max() >= max(10, height // 80) ** 2


def test_text_grows_with_the_picture_and_stays_inside():
    def text_rows(height):
        panel = legend([("HHH", (0, 250, 0), None)], height)
        dark = (panel < 100).all(axis=2)
        assert not dark[[0, -1]].any()
        assert not dark[:, -1].any()
        return np.count_nonzero(dark.any(axis=1))

    assert text_rows(20) >= 7
    assert text_rows(2000) > 2 * text_rows(200)


def test_entries_wrap_into_columns_as_high_as_the_picture():
    entries = [("wall", (0, 250, 0), None)] * 150
    assert legend(entries, 720).shape[0] == 720
    assert legend(entries, 64).shape[0] < 400


def test_legend_without_entries_is_blank():
    panel = legend([], 50)
    assert panel.shape[0] == 50
    assert (panel == 255).all()


def test_legend_draws_names_as_they_can_be_read():
    def drawn(name):
        return legend([(name, (0, 250, 0), None)], 300)

    assert not np.array_equal(drawn("日"), drawn("?"))
    assert not np.array_equal(drawn("日"), drawn("木"))
    np.testing.assert_array_equal(drawn("ह"), drawn("?"))
    np.testing.assert_array_equal(drawn("two\nlines"), drawn("two lines"))
    np.testing.assert_array_equal(drawn("x" * 60), drawn("x" * 37 + "..."))


@pytest.mark.parametrize(("picture_height", "panel_height"), [(4, 9), (9, 4), (5, 5)])
def test_with_legend_pads_the_shorter_one_white(picture_height, panel_height):
    picture = np.full((picture_height, 6, 3), 7, np.uint8)
    panel = np.full((panel_height, 2, 3), 9, np.uint8)
    joined = with_legend(picture, panel)
    assert joined.shape == (max(picture_height, panel_height), 8, 3)
    assert (joined[:picture_height, :6] == 7).all()
    assert (joined[:panel_height, 6:] == 9).all()
    assert (joined[picture_height:, :6] == 255).all()
    assert (joined[panel_height:, 6:] == 255).all()


def test_gray_confidence_is_the_nearest_of_256_levels():
    margin = np.linspace(0, 1, 1001, dtype=np.float32).reshape(7, 143)
    before = margin.copy()
    found = color_confidence(margin, "gray")
    assert (found.dtype, found.shape) == (np.uint8, (7, 143))
    assert np.abs(found - 255.0 * margin).max() <= 0.5001
    assert (found[0, 0], found[-1, -1]) == (0, 255)
    np.testing.assert_array_equal(margin, before)


def test_viridis_confidence_goes_from_purple_to_yellow_and_gets_lighter():
    found = color_confidence(np.linspace(0, 1, 256, dtype=np.float32)[None], "viridis")
    assert found.shape == (1, 256, 3)
    # The ends of matplotlib's table.
    assert np.abs(found[0, 0] - [68.0, 1, 84]).max() <= 2
    assert np.abs(found[0, -1] - [253.0, 231, 37]).max() <= 2
    lightness = found[0] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -0.5).all()
    assert len(np.unique(found[0], axis=0)) > 240
