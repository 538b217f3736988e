import numpy as np
import pytest

from segcli.lettering import draw_text, readable_name, text_coverage, text_width

DRAWABLE = [
    "road",
    "café",
    "Straße",
    "Дорога",
    "δρόμος",
    "人行道",
    "도로",
    "ほどう",
]


@pytest.mark.parametrize("name", DRAWABLE)
def test_names_of_many_scripts_stay_as_they_are(name):
    assert readable_name(name, 7) == readable_name(name) == name
    questions = [text_coverage("?" * n, 30) for n in (len(name), len(name.encode()))]
    assert not any(np.array_equal(text_coverage(name, 30), q) for q in questions)


@pytest.mark.parametrize(
    ("name", "with_id", "without"),
    [
        ("two\nlines\t", "two lines", "two lines"),
        ("what?", "what?", "what?"),
        ("hi ह", "class 7", "hi ?"),
        ("cafe\u0301", "café", "café"),
        ("x\u0301", "class 7", "x?"),
        # There are glyphs, but from left to right and unjoined they say something else.
        ("רחוב", "class 7", "????"),
        ("شارع", "class 7", "????"),
        ("bad\udcff", "class 7", "bad?"),
        ("del\x7f", "class 7", "del?"),
        ("", "class 7", ""),
        ("x" * 40, "x" * 40, "x" * 40),
        ("x" * 41, "x" * 37 + "...", "x" * 37 + "..."),
    ],
)
def test_names_become_readable(name, with_id, without):
    assert readable_name(name, 7) == with_id
    assert readable_name(name) == without


@pytest.mark.parametrize("size", [11, 20, 107])
@pytest.mark.parametrize("text", [*DRAWABLE, "gypsy |_", "ÄÉÅ", "W" * 30])
def test_coverage_is_cut_to_the_text(text, size):
    coverage = text_coverage(text, size, margin=3)
    rows, columns = (np.flatnonzero(coverage.any(axis=axis)) for axis in (1, 0))
    assert (rows[0], columns[0]) == (3, 3)
    assert (rows[-1], columns[-1]) == (coverage.shape[0] - 4, coverage.shape[1] - 4)
    assert 0.5 * size < rows[-1] - rows[0] < 1.6 * size
    assert abs(columns[-1] - columns[0] - text_width(text, size)) <= 2 + size / 3


def test_text_is_drawn_where_it_should_be_and_only_there():
    canvas = np.full((50, 200, 3), 255, np.uint8)
    draw_text(canvas, "road", 30, 35, 20)
    draw_text(canvas, "", 0, 0, 20)
    y, x = np.nonzero((canvas < 128).all(axis=2))
    assert 30 <= x.min() < 34
    assert 30 + text_width("road", 20) - 4 < x.max() < 30 + text_width("road", 20)
    assert y.min() >= 35 - 20
    assert y.max() <= 35


def test_wider_text_at_larger_sizes():
    assert text_width("", 20) == 0
    assert text_width("road", 40) == pytest.approx(2 * text_width("road", 20), rel=0.1)
