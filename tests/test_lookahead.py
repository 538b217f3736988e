import threading

import pytest

from segcli import lookahead
from segcli.inputs import Source
from segcli.lookahead import Lookahead
from segcli.storage import exists, write_whole
from segcli.writers import Format, OutputPlan

FORMATS = (Format.MASK, Format.JSON)


@pytest.fixture
def asked(monkeypatch):
    """The targets that were asked for, each with its thread."""
    questions = []

    def ask(target):
        questions.append((target, threading.current_thread()))
        return exists(target)

    monkeypatch.setattr(lookahead, "exists", ask)
    return questions


def test_answers_are_those_of_the_store(bucket, asked):
    url = f"memory://{bucket.name}"
    for i in range(0, 50, 2):
        write_whole(f"{url}/{i:02}.png", b"")
    plan = OutputPlan("folder", url, FORMATS)
    sources = [Source(f"{i:02}.jpg", f"{i:02}.jpg", "list") for i in range(50)]
    sources.insert(7, Source("out.jpg", "../out.jpg", "list"))
    ahead = Lookahead(plan)
    found = []
    for source in ahead.ahead(iter(sources)):
        found.append(source)
        if source.path != "out.jpg":
            mask, json = plan.targets(source)
            assert ahead.is_there(mask) is (int(source.path[:2]) % 2 == 0)
            assert not ahead.is_there(json)
    assert found == sources
    # Each once, and none of them by the thread that waits.
    assert len(asked) == len({target for target, _ in asked}) == 100
    assert threading.current_thread() not in {thread for _, thread in asked}


def test_files_are_asked_for_when_their_turn_comes(tmp_path, asked):
    plan = OutputPlan("folder", str(tmp_path), FORMATS)
    ahead = Lookahead(plan)
    stream = ahead.ahead(iter([Source("a.jpg", "a.jpg", "list")]))
    source = next(stream)
    assert asked == []
    (tmp_path / "a.png").touch()
    assert ahead.is_there(plan.targets(source)[0])
