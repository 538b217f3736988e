"""Whose files count: real owners and modes, as far as this user may set them."""

import os
from pathlib import Path

import pytest

from segcli.ownership import doubt, make_private

STRANGER = 54321

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "a.onnx").write_bytes(b"x")
    for place in (folder, folder / "models"):
        place.chmod(0o755)
    return folder


@pytest.fixture
def model(cache):
    return cache / "models" / "a.onnx"


def test_own_files_are_trusted(cache, model):
    for named in (True, False):
        assert doubt(model, cache, named=named) is None
        assert doubt(cache / "models", cache, named=named) is None
        assert doubt(cache, cache, named=named) is None


def test_a_group_is_trusted(cache, model):
    for place in (cache, cache / "models", model):
        place.chmod(0o775)
    assert doubt(model, cache, named=False) is None


@pytest.mark.parametrize("place", ["", "models", "models/a.onnx", ".."])
def test_what_every_user_can_write_is_not(cache, model, place):
    at = (cache / place).resolve()
    at.chmod(0o777)
    found = doubt(model, cache, named=True)
    assert found.reason == f"{str(at)!r} can be written by every user"
    assert found.mend == f"chmod o-w {at}"
    at.chmod(0o755)
    assert doubt(model, cache, named=True) is None


def test_the_sticky_bit_protects_in_a_folder(cache, model):
    (cache / "models").chmod(0o1777)
    assert doubt(model, cache, named=False) is None
    # On a file it means nothing.
    model.chmod(0o1666)
    assert doubt(model, cache, named=False)


def test_a_link_is_judged_by_where_it_leads(cache, model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    model.rename(other / "b.onnx")
    model.symlink_to(other / "b.onnx")
    assert doubt(model, cache, named=False) is None
    other.chmod(0o777)
    assert str(other) in doubt(model, cache, named=False).reason


@as_root
@pytest.mark.parametrize("place", ["", "models", "models/a.onnx"])
def test_what_a_stranger_owns_is_not_trusted(cache, model, place):
    os.chown(cache / place, STRANGER, -1)
    found = doubt(model, cache, named=False)
    assert found.reason == (
        f"{str((cache / place).resolve())!r} belongs to user {STRANGER}, not to this user or root"
    )
    assert found.mend.startswith("chown ")


@as_root
def test_the_owner_of_a_named_folder_is_trusted(cache, model, monkeypatch):
    """An administrator's cache, who need not be root; elsewhere his files say nothing."""
    for place in (cache, cache / "models", model):
        os.chown(place, STRANGER, -1)
    real = Path.stat

    def stat(self, **more):
        found = list(real(self, **more))
        # As below /srv: the tests' own folder lies in one that every user can write.
        found[0] &= ~0o1002 if self in cache.parents else ~0
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", stat)
    assert doubt(model, cache, named=True) is None
    assert doubt(model, cache, named=False)


@as_root
def test_nobody_is_trusted_for_having_taken_a_name_first(cache, model, tmp_path):
    for place in (cache, cache / "models", model):
        os.chown(place, STRANGER, -1)
    tmp_path.chmod(0o1777)
    assert "belongs to" in doubt(model, cache, named=True).reason


@as_root
def test_the_files_of_root_are_trusted_by_others(cache, model, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert doubt(model, cache, named=False) is None


def test_folders_are_made_for_this_user_alone(tmp_path):
    old = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b")
        make_private(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(OSError):
        make_private(tmp_path / "a" / "b")
