import hashlib
import json
import os
import shutil
import subprocess
import sys
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
def test_many_processes_export_once(command, own_registry, tiny_checkpoint, tmp_path, picture):
    registry = own_registry("mine", checkpoint=str(tiny_checkpoint))
    log = tmp_path / "exports"
    # Counts what is really written into the cache.
    site = patched(
        tmp_path,
        "real = store._export_into_cache\n"
        "def counted(*args, **more):\n"
        f"    open({str(log)!r}, 'a').write('1')\n"
        "    return real(*args, **more)\n"
        "store._export_into_cache = counted\n",
    )
    args = ["segment", "-m", "mine", "--registry", registry, picture(size_wh=(64, 64))]
    runs = [
        subprocess.Popen(
            [*command, *map(str, args), "-o", f"{i}.png"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": site},
            stderr=subprocess.PIPE,
        )
        for i in range(8)
    ]
    for process in runs:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    assert log.read_text() == "1"
    path = cached_path("mine")
    assert files_in(path.parent) == ["mine.json", "mine.onnx"]
    assert json.loads(path.with_suffix(".json").read_text())["sha256"] == sha256_of(path)
    assert len({(tmp_path / f"{i}.png").read_bytes() for i in range(8)}) == 1


def patched(tmp_path, code):
    """Returns a PYTHONPATH with which a process begins by changing segcli.store."""
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(f"import os\nimport segcli.store as store\n{code}")
    return str(site)


def files_in(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


KILL = "os.kill(os.getpid(), 9)"


# Where the process dies: within the bytes of the model, and before its description.
KILLS = {
    "within": (
        "import segcli.atomic as atomic\n"
        f"atomic._write_all = lambda file, data: (os.write(file.fileno(), data[:9]), {KILL})\n"
    ),
    "between": (
        "real = store.write_atomic\n"
        f"store.write_atomic = lambda p, d: {KILL} if p.endswith('.json') else real(p, d)\n"
    ),
}


@pytest.mark.export
@pytest.mark.parametrize("place", KILLS)
def test_a_killed_export_leaves_no_model(
    segcli_process, own_registry, tiny_checkpoint, tmp_path, place
):
    registry = own_registry("mine", checkpoint=str(tiny_checkpoint))
    pull = ("models", "pull", "mine", "--registry", str(registry))
    killed = segcli_process(*pull, PYTHONPATH=patched(tmp_path, KILLS[place]))
    assert killed.returncode == -9
    folder = cached_path("mine").parent
    [left] = files_in(folder)
    assert left.endswith(".onnx" if place == "between" else ".segcli-part")
    spec = load_registry(registry).get("mine")
    assert locate(spec) is None
    done = segcli_process(*pull)
    assert done.returncode == 0, done.stderr
    assert locate(spec)
    # Nothing of the first attempt is left.
    assert files_in(folder) == ["mine.json", "mine.onnx"]


@pytest.mark.export
def test_folders_of_the_cache_are_private(
    segcli_process, own_registry, tiny_checkpoint, tmp_path, monkeypatch
):
    registry = own_registry("mine", checkpoint=str(tiny_checkpoint))
    cache = tmp_path / "new" / "cache"
    done = segcli_process(
        *("models", "pull", "mine", "--registry", str(registry)), SEGCLI_CACHE_DIR=str(cache)
    )
    assert done.returncode == 0, done.stderr
    for folder in (cache.parent, cache, cache / "models"):
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.export
def test_nothing_is_made_in_a_cache_that_strangers_can_write(own_registry, tiny_checkpoint):
    registry = load_registry(own_registry("mine", checkpoint=str(tiny_checkpoint)))
    folder = cached_path("mine").parent
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(ModelNotFound, match="can be written by every user") as caught:
        obtain("mine", registry, offline=True, tell=silent)
    assert f"chmod o-w {folder}" in caught.value.hint
    assert list(folder.iterdir()) == []


def test_a_cached_model_that_strangers_can_write_is_refused(cached_model, tiny_model, tmp_path):
    path = cached_model("mine", tiny_model())
    registry = load_registry(tmp_path / "own.yaml")
    path.chmod(0o666)
    with pytest.raises(ModelNotFound, match="may hold a stranger's work") as caught:
        obtain("mine", registry, offline=True, tell=silent)
    assert "-m FILE" in caught.value.hint
    # Named, it is the user's own word.
    assert obtain(str(path), registry, offline=True, tell=silent) == path
    path.chmod(0o644)
    assert obtain("mine", registry, offline=True, tell=silent) == path


def test_a_shared_cache_that_is_read_only_works(cached_model, tiny_model, tmp_path):
    path = cached_model("mine", tiny_model())
    for place in (path, path.with_suffix(".json")):
        place.chmod(0o444)
    path.parent.chmod(0o555)
    registry = load_registry(tmp_path / "own.yaml")
    assert obtain("mine", registry, offline=True, tell=silent) == path
    path.parent.chmod(0o755)


def test_no_removal_while_another_process_makes_it(cached_model, tiny_model, tmp_path):
    path = cached_model("mine", tiny_model())
    spec = load_registry(tmp_path / "own.yaml").get("mine")
    code = (
        "import sys\nfrom filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n    print(flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path.with_suffix(".lock"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        with pytest.raises(ModelNotFound, match="another process is making it"):
            remove(spec)
        assert locate(spec) == path
        other.communicate()
    assert remove(spec) is True
    assert remove(spec) is False


def test_a_changed_local_checkpoint_makes_the_export_stale(cached_model, tiny_model, tmp_path):
    path = cached_model("mine", tiny_model())
    spec = load_registry(tmp_path / "own.yaml").get("mine")
    assert locate(spec) == path
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/model.safetensors").write_bytes(b"newer")
    assert locate(spec) is None
