import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli.artifact import Preprocessing
from segcli.errors import OutputWriteError
from segcli.report_page import Spool, describe_preprocessing, open_templates, visible_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("naïve 猫 😀", "naïve 猫 😀"),
        ("a\udcffb", "a\N{REPLACEMENT CHARACTER}b"),
        ("\ud800", "\N{REPLACEMENT CHARACTER}"),
        ("a\0b\n\x1b[31m", "a␀b␊␛[31m"),
        ("\x7f\x9b", "␡\N{REPLACEMENT CHARACTER}"),
        ("", ""),
    ],
)
def test_visible_text(text, expected):
    assert visible_text(text) == expected


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_can_be_written_and_shown(text):
    shown = visible_text(text)
    shown.encode()
    assert len(shown) <= len(text)
    assert bool(shown) == bool(text)


@given(st.text(st.characters(exclude_categories=())))
def test_templates_escape_any_text(text):
    found = open_templates().from_string("<i>{{ a }}{{ b | digits }}</i>").render(a=text, b=text)
    inner = found.removeprefix("<i>").removesuffix("</i>")
    assert not set(inner) & set("<>\"'")
    assert not any("\ud800" <= c <= "\udfff" for c in inner)


def test_preprocessing_in_words():
    assert describe_preprocessing(Preprocessing(resize="none", rescale=None)) == "no resize"
    full = Preprocessing(
        resize="squash", size_hw=(360, 480), interpolation="bicubic", mean=(0.5,) * 3, std=(2,) * 3
    )
    assert describe_preprocessing(full) == (
        "resized to (360, 480) (height, width), bicubic; times 0.00392157; "
        "mean 0.5 0.5 0.5, std 2 2 2"
    )


def test_spool_gives_back_what_it_took():
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(0x20, 0xD7FF, 5000))) + "\r\n" for _ in range(40)]
    with Spool("x.html") as spool:
        for text in texts:
            spool.write(text)
        assert "".join(spool.parts()) == "".join(texts)


def test_spool_says_that_there_is_no_room():
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Spool("page.html") as spool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(OutputWriteError, match=r"'page\.html': its temporary file"):
                spool.write("x" * 100_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
