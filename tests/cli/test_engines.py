import pytest

from segcli.cli.engines import default_workers
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
