import pytest

from segcli import web
from segcli.errors import ImageMissing
from segcli.web import read_web


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(web, "_PAUSES_S", (0.0, 0.0))


def test_query_and_odd_characters_arrive(http_server):
    server = http_server(lambda method, path: (200, path.encode()))
    assert read_web(f"{server.url}/a%20b é.jpg?X-Sig=a%2Fb+c&d=/") == (
        b"/a%20b%20%C3%A9.jpg?X-Sig=a%2Fb+c&d=/"
    )


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_are_not_asked_again(http_server, status):
    server = http_server(lambda method, path: (status, b""))
    with pytest.raises(ImageMissing, match=f"a.jpg': {status} "):
        read_web(f"{server.url}/a.jpg")
    assert len(server.asked) == 1


def test_what_passes_is_asked_again(http_server):
    answers = iter([(503, b""), (200, b"half", 10), (200, b"whole")])
    server = http_server(lambda method, path: next(answers))
    assert read_web(f"{server.url}/a.jpg") == b"whole"


def test_an_answer_that_is_cut_short(http_server):
    server = http_server(lambda method, path: (200, b"half", 10))
    with pytest.raises(ImageMissing, match="cut short"):
        read_web(f"{server.url}/a.jpg")
    assert len(server.asked) == 3


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.jpg", "http://", "http://[/a"])
def test_no_server(url):
    with pytest.raises(ImageMissing, match="cannot read "):
        read_web(url)


def test_an_answer_without_end(http_server, monkeypatch):
    monkeypatch.setattr(web, "_MOST_BYTES", 3 << 20)
    monkeypatch.setattr(web, "_BLOCK_BYTES", 1 << 16)
    server = http_server(lambda method, path: (200, bytes(8 << 20)))
    with pytest.raises(ImageMissing, match=r"a.jpg': it is more than 3 MB"):
        read_web(f"{server.url}/a.jpg")
    assert len(server.asked) == 1
    monkeypatch.setattr(web, "_MOST_BYTES", 8 << 20)
    assert read_web(f"{server.url}/a.jpg") == bytes(8 << 20)
