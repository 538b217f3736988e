import os

import pytest

from segcli.errors import UsageError
from segcli.urls import (
    Address,
    below,
    is_bucket,
    is_url,
    is_url_folder,
    is_web,
    join_url,
    plain_path,
    split_url,
    url_identity,
    url_name,
    url_place,
)


@pytest.mark.parametrize(
    ("path", "url", "web", "folder"),
    [
        ("s3://b/a.jpg", True, False, False),
        ("s3://b/a/", True, False, True),
        ("S3://b/", True, False, True),
        ("gs://b", True, False, False),
        ("memory://b/x", True, False, False),
        ("https://h/a/", True, True, False),
        ("http://h/a.jpg?x=s3://b/", True, True, False),
        ("file:///a/", False, False, False),
        ("./s3://b/", False, False, False),
        ("s3:/b/", False, False, False),
        ("az://b/", False, False, False),
    ],
)
def test_kinds(path, url, web, folder):
    assert (is_url(path), is_web(path), is_url_folder(path)) == (url, web, folder)


@pytest.mark.parametrize("key", ["a%20b.jpg", "a b#c?d=e.jpg", "é/ü.jpg", "a\\b", "...", ".a"])
def test_keys_are_taken_as_they_are(key):
    assert split_url(f"s3://b/{key}") == Address("s3", "b", key)
    assert split_url(f"s3://b/{key}/") == Address("s3", "b", key)


@pytest.mark.parametrize("url", ["s3://", "s3:///a.jpg", "https://h/a.jpg"])
def test_urls_without_a_bucket(url):
    with pytest.raises(ValueError, match="expected s3://BUCKET/KEY"):
        split_url(url)


@pytest.mark.parametrize("key", ["/a", "a//b", "a//", "./a", "a/..", "..", "a/\n", "\udce9.jpg"])
def test_keys_that_cannot_be_addressed(key):
    with pytest.raises(ValueError, match="its key has"):
        split_url("s3://b/" + key)


@pytest.mark.parametrize("bucket", ["a b", "ü", "a%20", "[x]", "a:8"])
def test_buckets_that_cannot_be(bucket):
    with pytest.raises(ValueError, match="its bucket has"):
        split_url(f"s3://{bucket}/a.jpg")


def test_a_bucket_alone():
    assert all(map(is_bucket, ("s3://b", "s3://b/", "GS://b.jpg")))
    assert not any(map(is_bucket, ("s3://b/a", "s3://b//", "https://b", "file:///", "b")))


def test_places():
    assert join_url("s3://b/", "x/y") == join_url("s3://b", "x/y") == "s3://b/x/y"
    assert below("s3://b/x/y.jpg", "s3://b/x") == below("s3://b/x/y.jpg", "s3://b/x/") == "y.jpg"
    assert below("s3://b/xy.jpg", "s3://b/x") is None
    assert below("s3://b/x", "s3://b/x/") is None


def test_names_leave_out_a_signature():
    signed = "https://h/p/a%20b.jpg?X-Signature=q/secret.png#f"
    assert url_name(signed) == "a b.jpg"
    assert url_place(signed, "https://h/") == "p/a b.jpg"
    assert url_place(signed, "https://other/") == ".."
    assert url_name("s3://b/p/a%20b?c.jpg") == "a%20b?c.jpg"
    assert url_name("https://h/a%20b/?c") == "a b"
    assert (url_name("s3://b/in/"), url_name("s3://b")) == ("in", "b")
    assert url_place("s3://b/p/a%20b?c.jpg", "s3://b") == "p/a%20b?c.jpg"


def test_identities_are_no_files():
    identities = [url_identity(url) for url in ("s3://b/a", "s3://b/A", "gs://b/a")]
    assert len(set(identities)) == 3
    assert max(identities) < 0
    assert identities[0] == url_identity("s3://b/a")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///a/b%20c%23.jpg", b"/a/b c#.jpg"),
        ("FILE://localhost/a", b"/a"),
        ("file:///caf%E9.jpg", b"/caf\xe9.jpg"),
        ("a%20b.jpg", b"a%20b.jpg"),
        ("s3://b/A", b"s3://b/A"),
        ("S3://b/A", b"s3://b/A"),
        ("HTTPS://h/A?B", b"https://h/A?B"),
        ("S3:/b", b"S3:/b"),
    ],
)
def test_file_urls(url, path):
    assert os.fsencode(plain_path(url)) == path


@pytest.mark.parametrize("url", ["file://host/a.jpg", "file://a.jpg"])
def test_file_urls_of_other_hosts(url):
    with pytest.raises(UsageError, match="names another host"):
        plain_path(url)
