import io
import re

import numpy as np
import pytest
from rich.console import Console

from segcli.cli.terminal_image import TerminalImage, shrink

ESCAPE = re.compile(r"\x1b\[([0-9;]*)m")


def drawn(image, columns=80, width=100, **options):
    options = {"force_terminal": True, "color_system": "truecolor", **options}
    # A console of its own environment: NO_COLOR and TERM of the test run do not count.
    console = Console(file=io.StringIO(), width=width, _environ={}, **options)
    console.print(TerminalImage(image, columns))
    return console.file.getvalue().splitlines()


def cells(line):
    """The (upper, lower) colors of a line of half blocks, as a terminal would keep them."""
    found, colors = [], {}
    for codes, text in re.findall(r"\x1b\[([0-9;]*)m([^\x1b]*)", line):
        numbers = [int(n) for n in codes.split(";") if n]
        if numbers in ([], [0]):
            colors = {}
        while numbers and numbers != [0]:
            kind, two, *rest = numbers
            assert two == 2
            colors[kind], numbers = tuple(rest[:3]), rest[3:]
        assert set(text) <= {"▀"}
        found += [(colors.get(38), colors.get(48))] * len(text)
    return found


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(6, 9), (7, 5), (1, 1), (2, 40)])
def test_every_pixel_of_a_small_picture_is_half_a_cell(height, width):
    image = noise(height, width)
    image[:, width // 2 :] = image[:, width // 2 : width // 2 + 1]
    before = image.copy()
    lines = drawn(image)
    assert len(lines) == -(-height // 2)
    for i, line in enumerate(lines):
        upper, lower = zip(*cells(line), strict=True)
        assert upper == tuple(map(tuple, image[2 * i].tolist()))
        if 2 * i + 1 < height:
            assert lower == tuple(map(tuple, image[2 * i + 1].tolist()))
        else:
            assert set(lower) == {None}
        assert line.endswith("\x1b[0m")
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("size_hw", "columns", "width", "lines_by_columns"),
    [
        ((600, 800), 80, 100, (30, 80)),
        ((800, 600), 30, 100, (20, 30)),
        ((600, 800), 80, 40, (15, 40)),
        ((3, 900), 90, 100, (1, 90)),
    ],
)
def test_aspect_is_kept_and_neither_limit_passed(size_hw, columns, width, lines_by_columns):
    lines = drawn(noise(*size_hw), columns, width)
    assert (len(lines), len(ESCAPE.sub("", lines[0]))) == lines_by_columns


def test_pixels_are_averages_over_their_areas():
    image = noise(60, 90)
    small = shrink(image, 9)
    expected = image.reshape(6, 10, 9, 10, 3).mean(axis=(1, 3))
    assert small.shape == (6, 9, 3)
    assert np.abs(small - expected).max() <= 0.5 + 1e-6


def test_256_colors_where_the_terminal_has_no_more():
    lines = drawn(noise(4, 4), color_system="256")
    codes = ESCAPE.findall("".join(lines))
    assert any(code.startswith("38;5;") for code in codes)
    assert not any("38;2" in code or "48;2" in code for code in codes)


@pytest.mark.parametrize(
    "options",
    [{"no_color": True}, {"force_terminal": False, "color_system": None}],
    ids=["NO_COLOR", "pipe"],
)
def test_shades_without_colors(options):
    image = np.zeros((4, 10, 3), np.uint8)
    image[:2, 5:] = 255
    image[2:] = 130
    assert drawn(image, **options) == ["     █████", "▒▒▒▒▒▒▒▒▒▒"]


def test_no_half_blocks_where_the_encoding_has_none():
    image = noise(4, 6)
    for options in ({}, {"no_color": True}):
        console = Console(
            file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
            force_terminal=True,
            color_system="truecolor",
            width=40,
            _environ={},
            **options,
        )
        console.print(TerminalImage(image, 6))
        console.file.flush()
        text = console.file.buffer.getvalue().decode("ascii")
        assert [len(ESCAPE.sub("", line)) for line in text.splitlines()] == [6, 6]


def test_no_columns_are_refused():
    with pytest.raises(ValueError, match="at least one column, not 0"):
        TerminalImage(noise(2, 2), 0)
