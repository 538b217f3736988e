import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from segcli.errors import ModelNotFound, RegistryError
from segcli.registry import load_registry
from segcli.store import (
    cache_dir,
    cache_entry,
    cached_path,
    is_path,
    locate,
    obtain,
    remove,
    sha256_of,
)


def silent(line):
    raise AssertionError(f"nothing is fetched, but it told {line!r}")


@pytest.fixture
def registry():
    return load_registry()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("segformer-b2", False), ("x.onnx", True), ("dir/x", True), ("./x", True), ("", False)],
)
def test_is_path(text, expected):
    assert is_path(text) is expected


def test_cache_dir(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "segcli-cache"
    monkeypatch.setenv("SEGCLI_CACHE_DIR", "~/models")
    assert cache_dir() == Path.home() / "models"
    monkeypatch.delenv("SEGCLI_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir().name == "segcli"


def test_embedded(registry):
    spec = registry.get("segformer-b0-camvid")
    path = locate(spec)
    assert path.is_file()
    assert obtain(spec.name, registry, offline=True, tell=silent) == path
    with pytest.raises(ModelNotFound, match="part of the package"):
        remove(spec)
    assert path.is_file()


def test_path(registry, tiny_model):
    path = tiny_model()
    assert obtain(str(path), registry, offline=True, tell=silent) == path


@pytest.mark.parametrize("text", ["none.onnx", "no/such/file", "/", "a/b.onnx"])
def test_path_that_is_no_file(registry, text):
    with pytest.raises(ModelNotFound, match="no model file at"):
        obtain(text, registry, offline=True, tell=silent)


def test_neither_name_nor_path(registry):
    with pytest.raises(ModelNotFound, match="the nearest names are"):
        obtain("segformer_b2", registry, offline=True, tell=silent)


def test_offline(registry):
    with pytest.raises(ModelNotFound, match="--offline forbids") as caught:
        obtain("segformer-b0", registry, offline=True, tell=silent)
    assert "models pull segformer-b0" in caught.value.hint
    assert not cache_dir().exists()


def test_cached(cached_model, tiny_model):
    path = cached_model("mine", tiny_model())
    registry = load_registry(Path(path.parents[2] / "own.yaml"))
    assert locate(registry.get("mine")) == path == cached_path("mine")
    assert obtain("mine", registry, offline=True, tell=silent) == path
    assert remove(registry.get("mine")) is True
    assert remove(registry.get("mine")) is False
    assert locate(registry.get("mine")) is None


@pytest.mark.parametrize(
    "change", [{"revision": "v2", "checkpoint": None}, {"source": "other/repo"}]
)
def test_cached_from_elsewhere_is_stale(cached_model, tiny_model, change, tmp_path):
    cached_model("mine", tiny_model())
    spec = load_registry(tmp_path / "own.yaml").get("mine")
    assert cache_entry(spec)
    assert cache_entry(replace(spec, **change)) is None


@pytest.mark.parametrize(
    "damage", ["cut", "no description", "no json", "list", "other keys", "no model"]
)
def test_damaged_cache_counts_as_absent(cached_model, tiny_model, damage, tmp_path):
    path = cached_model("mine", tiny_model())
    text = path.with_suffix(".json")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "no description":
        text.unlink()
    elif damage == "no model":
        path.unlink()
    else:
        text.write_text({"no json": "{", "list": "[]", "other keys": '{"a": 1}'}[damage])
    assert locate(load_registry(tmp_path / "own.yaml").get("mine")) is None


def test_registries_in_two_folders_do_not_share_a_model(cached_model, tiny_model, tmp_path):
    cached_model("mine", tiny_model())
    (tmp_path / "elsewhere").mkdir()
    other = Path(shutil.copy(tmp_path / "own.yaml", tmp_path / "elsewhere"))
    assert locate(load_registry(tmp_path / "own.yaml").get("mine"))
    assert locate(load_registry(other).get("mine")) is None


def test_registry_path_may_be_spelled_in_any_way(cached_model, tiny_model, tmp_path, monkeypatch):
    cached_model("mine", tiny_model())
    monkeypatch.chdir(tmp_path)
    assert locate(load_registry(Path("own.yaml")).get("mine"))


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(ModelNotFound, match="cannot read"):
        sha256_of(tmp_path / "none")


@pytest.mark.export
def test_checkpoint_of_own_registry_is_absent(own_registry):
    with pytest.raises(RegistryError, match="no checkpoint at"):
        obtain("mine", load_registry(own_registry("mine")), offline=True, tell=silent)


@pytest.mark.export
def test_cache_that_cannot_be_written(own_registry, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SEGCLI_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelNotFound, match="cannot write the model cache"):
        obtain("mine", load_registry(own_registry("mine")), offline=True, tell=silent)


@pytest.mark.export
def test_two_processes_export_once(command, own_registry, tiny_checkpoint, tmp_path, picture):
    registry = own_registry("mine", checkpoint=str(tiny_checkpoint))
    log = tmp_path / "exports"
    site = tmp_path / "site"
    site.mkdir()
    # Counts what is really written into the cache.
    (site / "sitecustomize.py").write_text(
        "import segcli.store as store\n"
        "real = store._export_into_cache\n"
        "def counted(*args, **more):\n"
        f"    open({str(log)!r}, 'a').write('1')\n"
        "    return real(*args, **more)\n"
        "store._export_into_cache = counted\n"
    )
    args = ["segment", "-m", "mine", "--registry", registry, picture(size_wh=(64, 64))]
    runs = [
        subprocess.Popen(
            [*command, *map(str, args), "-o", f"{i}.png"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site)},
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    for process in runs:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert log.read_text() == "1"
    path = cached_path("mine")
    assert sorted(p.name for p in path.parent.iterdir() if p.suffix != ".lock") == [
        "mine.json",
        "mine.onnx",
    ]
    assert json.loads(path.with_suffix(".json").read_text())["sha256"] == sha256_of(path)
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_a_changed_local_checkpoint_makes_the_export_stale(cached_model, tiny_model, tmp_path):
    path = cached_model("mine", tiny_model())
    spec = load_registry(tmp_path / "own.yaml").get("mine")
    assert locate(spec) == path
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/model.safetensors").write_bytes(b"newer")
    assert locate(spec) is None
