"""The boundary: what unwinds through it, and the exit code that it makes of it."""

import signal
import time

import pytest

from segcli.cli import app


@pytest.fixture
def run(monkeypatch):
    """Runs a function in the place of a command and returns the exit code."""

    def call(command):
        monkeypatch.setattr(app, "app", lambda **kwargs: command())
        return app.run([])

    return call


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_midst_of_a_finalizer_is_heard(run, capfd, number, code):
    """Python lets nothing that a finalizer raises unwind."""

    class Finalized:
        def __del__(self):
            signal.raise_signal(number)

    def command():
        Finalized()
        time.sleep(30)

    start = time.monotonic()
    assert run(command) == code
    assert time.monotonic() - start < 10
    said = "interrupted" if code == 130 else "terminated"
    assert capfd.readouterr() == ("", f"segcli: {said}\n")


def test_what_is_no_exception_is_a_bug(run, capfd):
    class PanicException(BaseException):
        """As Rust's panics arrive in Python."""

    def command():
        raise PanicException("called unwrap() on an Err value")

    assert run(command) == 70
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("segcli: bug: PanicException: called unwrap() on an Err value\nhint: ")
