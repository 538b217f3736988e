import numpy as np
import pytest

from segcli.errors import UsageError
from segcli.image_bytes import encode_gray_png
from segcli.object_folder import is_object_folder, walk_objects
from segcli.remote import put_object

IMAGES = (".jpg", ".png")
OWN = encode_gray_png(np.zeros((2, 2), np.uint8))
OTHER = OWN.replace(b"segcli", b"gimpli")


@pytest.fixture
def folder(bucket):
    """Makes objects below in/ of a memory, their content their own name."""
    url = f"memory://{bucket.name}/in/"

    def make(*keys, data=None):
        for key in keys:
            put_object(url + key, key.encode() if data is None else data)

    make.url = url
    return make


def walk(url, **options):
    options = {"recursive": True, "suffixes": IMAGES, "exclude_dir": None, **options}
    return list(walk_objects(url, **options))


def test_what_a_local_folder_would_give(folder):
    folder("b.JPG", "a.jpg", "x/a.jpg", "x/y/z.png", ".h.jpg", ".git/a.jpg", "x/.y/a.jpg", "t.txt")
    assert walk(folder.url) == ["a.jpg", "b.JPG", "x/a.jpg", "x/y/z.png"]
    assert walk(folder.url, recursive=False) == ["a.jpg", "b.JPG"]
    assert walk(folder.url + "x/", recursive=False) == ["a.jpg"]
    assert walk(folder.url, suffixes=(".txt",)) == ["t.txt"]


@pytest.mark.parametrize("end", ["", "/"])
def test_the_output_folder_is_left_out(folder, end):
    folder("a.jpg", "out/a.jpg", "out2/a.jpg", "x/out/a.jpg")
    found = walk(folder.url, exclude_dir=folder.url + "out" + end)
    assert found == ["a.jpg", "out2/a.jpg", "x/out/a.jpg"]
    assert len(walk(folder.url, exclude_dir="s3://other/in/out")) == 4


def test_our_own_pngs_are_left_out(folder):
    folder("a.png", "c.PNG", data=OWN)
    folder("b.png", data=OTHER)
    # Named like another format: content is not looked at.
    folder("d.jpg", data=OWN)
    folder("empty.png", data=b"")
    assert walk(folder.url) == ["b.png", "d.jpg", "empty.png"]


def test_the_mark_of_a_folder_is_no_image(bucket):
    for key in ("in/a.jpg/", "in/a.jpg/b.jpg", "in/empty.jpg"):
        bucket.put(key, b"")
    assert walk(f"{bucket.url}/in/") == ["a.jpg/b.jpg", "empty.jpg"]


def test_order_holds_with_many_looks(folder):
    keys = [f"{i:03}.png" for i in range(200)]
    folder(*keys, data=OTHER)
    folder(*keys[::3], data=OWN)
    assert walk(folder.url) == [key for i, key in enumerate(keys) if i % 3]


def test_a_walk_that_is_left_ends(folder):
    folder(*(f"{i:03}.png" for i in range(200)), data=OTHER)
    walking = walk_objects(folder.url, recursive=True, suffixes=IMAGES, exclude_dir=None)
    assert next(walking) == "000.png"
    walking.close()


def test_folders(bucket):
    bucket.put("a/b", b"")
    bucket.put("a.jpg/x", b"")
    for key, found in {"": True, "/": True, "/a": True, "/a/b": False, "/c": False}.items():
        assert is_object_folder(bucket.url + key) is found, key
    with pytest.raises(UsageError, match="no such bucket"):
        is_object_folder(bucket.url + "-not")
    with pytest.raises(UsageError, match="is no address of an object"):
        is_object_folder("s3://b/a//b")
