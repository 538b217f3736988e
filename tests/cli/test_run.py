"""What segment, classify and bench share."""

import pytest

from segcli.cli.run import default_workers, progress_text
from segcli.errors import UsageError


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "single", "expected"),
    [
        (2, None, None, False, (2, 2)),
        (16, None, None, False, (16, 4)),
        (16, None, None, True, (1, 16)),
        (16, 1, None, False, (1, 16)),
        (16, 3, None, False, (3, 4)),
        (16, None, 1, False, (16, 1)),
        (16, None, 2, True, (1, 2)),
        (1, None, None, False, (1, 1)),
    ],
)
def test_defaults_come_from_the_cores(monkeypatch, cores, workers, threads, single, expected):
    monkeypatch.setattr("segcli.session.usable_cores", lambda: cores)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert default_workers(workers, threads, single=single) == expected


def test_more_threads_than_the_machine_has_are_refused(monkeypatch):
    monkeypatch.setattr("segcli.session.usable_cores", lambda: 2)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert default_workers(None, 4, single=True) == (1, 4)
    with pytest.raises(UsageError, match="--threads 5"):
        default_workers(None, 5, single=True)


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
