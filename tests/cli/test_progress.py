import pytest

from segcli.cli.progress import progress_text


@pytest.mark.parametrize(
    ("counts", "total", "seconds", "expected"),
    [
        ((3, 0, 0), None, 2.0, "3 images, 1.5 images/s"),
        ((3, 0, 1), 10, 2.0, "4/10 images, 2.0 images/s, 0:03 left, 1 failed"),
        # A resumed run: the skipped ones took no time.
        ((10, 90, 0), 1100, 1.0, "100/1100 images, 10.0 images/s, 1:40 left"),
        ((1, 0, 0), 7201, 1.0, "1/7201 images, 1.0 images/s, 2:00:00 left"),
        ((0, 5, 0), 10, 0.0, "5/10 images, 0.0 images/s"),
    ],
)
def test_progress(counts, total, seconds, expected):
    found = dict(zip(("ok", "skipped", "error"), counts, strict=True))
    assert progress_text(found, total, seconds) == expected
