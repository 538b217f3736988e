import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli import remote
from segcli.errors import (
    ImageMissing,
    OutputError,
    OutputExists,
    OutputWriteError,
    UsageError,
)
from segcli.remote import list_objects, object_exists, put_object, read_object, read_start

KEYS = ["a b.jpg", "a%20b.jpg", "a#b.jpg", "a?b&c=d.jpg", "é/ü+.jpg", "a\\b.jpg", "[x]{y}~*.jpg"]


def error_xml(code, message="told"):
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


def keys_of(listing):
    return [listed.key for listed in listing]


@pytest.fixture
def refusing(http_server, bucket, monkeypatch):
    """Makes the endpoint one that answers everything with a status and a body."""

    def start(status, body=b""):
        server = http_server(lambda method, path: (status, body))
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        return f"{bucket.url}/k.png"

    return start


@pytest.mark.parametrize("key", KEYS)
def test_keys_are_the_servers(bucket, key):
    put_object(f"{bucket.url}/{key}", key.encode())
    assert bucket.list() == [key]
    assert bucket.get(key) == read_object(f"{bucket.url}/{key}") == key.encode()
    assert object_exists(f"{bucket.url}/{key}")
    assert keys_of(list_objects(bucket.url, lambda key: None)) == [key]
    assert read_start(f"{bucket.url}/{key}", 2) == key.encode()[:2]
    assert read_start(f"{bucket.url}/{key}", 1000) == key.encode()


def test_what_google_is_asked(http_server, bucket, monkeypatch):
    """Its XML interface, played by a few answers: no server of it runs on this machine."""
    listing = (
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>in/a b.jpg</Key>"
        b"<Size>4</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
        b"</ListBucketResult>"
    )

    def answer(method, path):
        if "list-type" in path:
            return 200, listing
        return (200, b"data") if unquote(path) == "/g/in/a b.jpg" else (404, b"")

    server = http_server(answer)
    monkeypatch.setenv("GOOGLE_BASE_URL", server.url)
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    assert keys_of(list_objects("gs://g/in/", lambda key: None)) == ["a b.jpg"]
    assert read_object("gs://g/in/a b.jpg") == b"data"
    assert not object_exists("gs://g/in/c.jpg")
    assert server.asked[0].startswith("GET /g?list-type=2&prefix=in%2F")


def test_what_is_there_is_replaced_only_when_asked(bucket):
    url = f"{bucket.url}/x/a.png"
    put_object(url, b"one", replace=False)
    with pytest.raises(OutputExists, match=r"a\.png' exists"):
        put_object(url, b"two", replace=False)
    assert bucket.get("x/a.png") == b"one"
    put_object(url, b"two")
    assert bucket.get("x/a.png") == b"two"


def test_parts_become_one_object(bucket, monkeypatch):
    monkeypatch.setattr(remote, "_ONE_PUT", 1 << 20)
    data = bytes(range(256)) * (1 << 15)
    put_object(f"{bucket.url}/a.npy", data)
    assert bucket.get("a.npy") == data
    with pytest.raises(OutputExists):
        put_object(f"{bucket.url}/a.npy", data, replace=False)


def test_what_is_not_there(bucket):
    with pytest.raises(ImageMissing, match=r"cannot read 's3://b.*/a.jpg': no such object"):
        read_object(f"{bucket.url}/a.jpg")
    assert not object_exists(f"{bucket.url}/a.jpg")
    assert keys_of(list_objects(f"{bucket.url}/none/", lambda key: None)) == []
    assert read_start(f"{bucket.url}/a.jpg", 8) == b""
    with pytest.raises(ImageMissing, match="no such bucket"):
        read_object(f"{bucket.url}-not/a.jpg")
    with pytest.raises(UsageError, match=r"cannot list 's3://b.*-not/': no such bucket"):
        keys_of(list_objects(f"{bucket.url}-not/", lambda key: None))
    with pytest.raises(OutputError, match="no such bucket"):
        put_object(f"{bucket.url}-not/a.png", b"")


@pytest.mark.parametrize(
    ("status", "code", "message", "hint"),
    [
        (403, "InvalidAccessKeyId", "403 Forbidden, InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        (401, "", "401 Unauthorized", "AWS_SECRET_ACCESS_KEY"),
        (400, "ExpiredToken", "ExpiredToken", "AWS_ACCESS_KEY_ID"),
        (400, "AuthorizationHeaderMalformed", "Malformed", "AWS_REGION"),
        (301, "PermanentRedirect", "in another region", "AWS_REGION"),
    ],
)
def test_refusals_say_what_to_set(refusing, status, code, message, hint):
    url = refusing(status, error_xml(code) if code else b"")
    for call, error in (
        (lambda: read_object(url), ImageMissing),
        (lambda: put_object(url, b""), OutputError),
        (lambda: keys_of(list_objects(url + "/", lambda key: None)), UsageError),
    ):
        with pytest.raises(error, match=message) as caught:
            call()
        assert hint in caught.value.hint
        assert "\n" not in str(caught.value)
        assert url in str(caught.value)


def test_a_server_that_fails_is_that_images_error(refusing, monkeypatch):
    monkeypatch.setitem(remote._RETRY, "max_retries", 1)
    url = refusing(500, b"no\nidea")
    with pytest.raises(OutputWriteError, match=r"500 Internal Server Error$"):
        put_object(url, b"")
    with pytest.raises(OutputError, match="cannot tell whether"):
        object_exists(url)


def test_a_store_without_conditional_writes(refusing, monkeypatch):
    monkeypatch.setitem(remote._RETRY, "max_retries", 0)
    url = refusing(501, error_xml("NotImplemented"))
    with pytest.raises(OutputError, match="no conditional writes, which --no-clobber needs"):
        put_object(url, b"", replace=False)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://none.invalid"])
def test_a_dead_endpoint_fails_soon(bucket, monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    start = time.monotonic()
    for call, error in (
        (lambda: read_object(f"{bucket.url}/a"), ImageMissing),
        (lambda: put_object(f"{bucket.url}/a", b""), OutputWriteError),
        (lambda: keys_of(list_objects(bucket.url, lambda key: None)), UsageError),
    ):
        with pytest.raises(error, match=f"no answer from {endpoint}"):
            call()
    assert time.monotonic() - start < 30


def test_no_credentials(bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UsageError, match="no credentials were found") as caught:
        keys_of(list_objects(bucket.url, lambda key: None))
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000"),
        ("AWS_ENDPOINT_URL", "ftp://localhost"),
        ("AWS_ENDPOINT_URL", "http://"),
        ("AWS_ENDPOINT_URL", "http://[::1"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:99999"),
        ("AWS_ENDPOINT_URL", "https://exa mple.org"),
        ("AWS_ENDPOINT_URL_S3", "nonsense"),
        ("AWS_REGION", "us east/1"),
    ],
)
def test_settings_that_cannot_be(bucket, monkeypatch, capfd, name, value):
    """Which obstore would panic at, with a backtrace of Rust's."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=rf"^{name} is '.*', expected a"):
        read_object(f"{bucket.url}/a.jpg")
    assert capfd.readouterr() == ("", "")


def test_empty_settings_are_none(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "")
    put_object(f"{bucket.url}/a", b"data")
    assert bucket.get("a") == b"data"


def test_profiles_of_boto3(bucket, monkeypatch, tmp_path):
    pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    file.write_text("[mine]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    put_object(f"{bucket.url}/a", b"data")
    assert bucket.get("a") == b"data"


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    for call in (read_object, object_exists, lambda url: put_object(url, b"")):
        with pytest.raises(UsageError, match="'memory://none/a' needs object storage") as caught:
            call("memory://none/a")
        assert caught.value.hint == "pip install 'segcli[remote]'"


@pytest.mark.parametrize("url", ["s3://b/a//b.jpg", "s3://b/../a.jpg", "s3:///a.jpg"])
def test_urls_that_cannot_be(url):
    with pytest.raises(ImageMissing, match=r"its key has an empty part|expected s3://"):
        read_object(url)
    with pytest.raises(OutputWriteError, match=r"its key has an empty part|expected s3://"):
        put_object(url, b"")


# Listing


@pytest.mark.parametrize("key", ["in//b.jpg", "in/../b.jpg"])
def test_a_key_that_cannot_be_addressed_ends_a_listing(bucket, key):
    for name in ("in/a.jpg", key, "in/c.jpg"):
        bucket.put(name, b"")
    with pytest.raises(UsageError, match=r"cannot list .*: it holds the key 'in/.*b.jpg'") as ended:
        keys_of(list_objects(f"{bucket.url}/in/", lambda key: None))
    assert "--files-from" in ended.value.hint


def test_only_the_folder_is_listed(bucket):
    for key in ("p/", "p/a.jpg", "p/x/b.jpg", "p.jpg", "pq/c.jpg"):
        bucket.put(key, b"")
    assert keys_of(list_objects(f"{bucket.url}/p/", lambda key: None)) == ["a.jpg", "x/b.jpg"]
    assert keys_of(list_objects(f"{bucket.url}/p", lambda key: None)) == ["a.jpg", "x/b.jpg"]


def test_the_order_is_that_of_bytes(bucket):
    # As UTF-16, U+10000 would come before U+FFFD; after folding case, a before B.
    keys = ["\U00010000", "\ufffd", "a", "B", "a/x", "a-", "a.", "a0", "é", "z"]
    for key in keys:
        bucket.put(key + ".jpg", b"")
    wanted = sorted((key + ".jpg" for key in keys), key=str.encode)
    assert keys_of(list_objects(bucket.url, lambda key: None)) == wanted


NAMES = st.sampled_from(["a", "b", "a.", "a-", "a0", "é", "\U0010ffff"])
TREES = st.sets(st.lists(NAMES, min_size=1, max_size=3).map("/".join), max_size=30)


@given(keys=TREES, page=st.integers(1, 5), unwanted=st.sets(NAMES))
def test_pages_and_subfolders_left_out(keys, page, unwanted):
    url = f"memory://tree{time.monotonic_ns()}/in"
    for key in keys:
        put_object(f"{url}/{key}", b"")

    def left_out(key):
        *folders, _ = key.split("/")
        for depth, name in enumerate(folders):
            if name in unwanted:
                return "/".join(folders[: depth + 1])
        return None

    wanted = sorted((key for key in keys if left_out(key) is None), key=str.encode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_PAGE", page)
        assert keys_of(list_objects(url, left_out)) == wanted


def test_a_subfolder_that_is_left_out_is_not_read(bucket, monkeypatch):
    monkeypatch.setattr(remote, "_PAGE", 10)
    url = f"memory://{bucket.name}"
    for i in range(1000):
        put_object(f"{url}/out/{i:04}.png", b"")
    put_object(f"{url}/z.jpg", b"")
    asked = []

    def left_out(key):
        asked.append(key)
        return "out" if key.startswith("out/") else None

    assert keys_of(list_objects(url, left_out)) == ["z.jpg"]
    assert len(asked) == 11


# Whole or absent


def test_nothing_is_there_when_a_put_is_killed(bucket, monkeypatch, tmp_path):
    """A relay lets a part of the object through; then the process is killed."""
    import socket

    host, port = bucket.server.removeprefix("http://").split(":")
    arrived, killed = threading.Event(), threading.Event()

    def relay():
        client, _ = listener.accept()
        with client, socket.create_connection((host, int(port))) as server:
            seen = 0
            while seen < 100_000:
                data = client.recv(10_000)
                seen += len(data)
                server.sendall(data)
            arrived.set()
            killed.wait(30)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=relay)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        code = (
            "from segcli.remote import put_object\n"
            f"put_object('{bucket.url}/a.npy', bytes(30_000_000))\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
        try:
            assert arrived.wait(60)
        finally:
            process.kill()
            process.wait()
            killed.set()
            thread.join()
    assert bucket.list() == []
    assert list(Path(tmp_path).iterdir()) == []
