import hashlib
import json
import os
import shutil
import subprocess
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


# The hub


COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Speaks the hub's protocol for whole files, from a folder ORG/REPO/FILE."""

    daemon_threads = True

    def __init__(self, folder):
        self.folder = folder
        self.asked = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        self.server.asked.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        repo = self.server.folder.joinpath(*parts[:2])
        if len(parts) != 5 or parts[2] != "resolve" or not repo.is_dir():
            return self._refuse("RepoNotFound", body)
        if parts[3] not in ("main", COMMIT):
            return self._refuse("RevisionNotFound", body)
        path = repo / parts[4]
        if not path.is_file():
            return self._refuse("EntryNotFound", body)
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)
        return None

    def _refuse(self, code, body):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(tmp_path, tiny_checkpoint):
    """A hub with the repository org/tiny."""
    shutil.copytree(tiny_checkpoint, tmp_path / "hub" / "org" / "tiny")
    server = Hub(tmp_path / "hub")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def at_hub(segcli_process, hub, tmp_path):
    """Runs a command line that finds the hub there, and a hub cache of its own."""

    def call(*args, **env):
        env = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **env,
        }
        done = segcli_process(*args, **env)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return call


@pytest.fixture
def export(at_hub):
    # A fixed size is verified at one size only: faster.
    return lambda source, *args, **env: at_hub(
        *("export", "--checkpoint", source, "-o", "x.onnx", "--image-size", "64x64"), *args, **env
    )


@pytest.mark.export
class TestHub:
    def test_fetch_then_offline(self, export, hub, tmp_path):
        code, out, err = export("org/tiny@main", "--json")
        assert code == 0, err
        assert err.splitlines()[0] == "segcli: fetching org/tiny@main"
        card = json.loads(out)["card"]
        assert (card["name"], card["source"], card["revision"]) == ("tiny", "org/tiny", COMMIT)
        assert card["license"] == "cc-by-4.0"
        assert not any("pytorch_model.bin" in line for line in hub.asked)
        hub.asked.clear()
        for args, env in (([], {"HF_HUB_OFFLINE": "1"}), (["--offline"], {})):
            (tmp_path / "x.onnx").unlink()
            code, out, err = export("org/tiny", *args, **env)
            assert code == 0, err
            assert (tmp_path / "x.onnx").is_file()
        assert hub.asked == []

    def test_falls_back_to_tensorflow_s_weights_last(self, export, hub):
        """By name alone: what a file holds is told by its content."""
        repo = hub.folder / "org" / "tiny"
        (repo / "model.safetensors").rename(repo / "tf_model.h5")
        code, _, err = export("org/tiny")
        assert code == 0, err
        asked = "\n".join(hub.asked)
        names = ("model.safetensors", "pytorch_model.bin", "tf_model.h5")
        places = [asked.index(name) for name in names]
        assert places == sorted(places)

    def test_falls_back_to_pickled_weights(self, export, hub):
        import torch
        from safetensors.torch import load_file

        repo = hub.folder / "org" / "tiny"
        state = load_file(repo / "model.safetensors")
        torch.save(state, repo / "pytorch_model.bin")
        (repo / "model.safetensors").unlink()
        (repo / "README.md").unlink()
        code, out, err = export("org/tiny", "--json")
        assert code == 0, err
        assert json.loads(out)["card"]["license"] == "unknown"

    def test_name_of_the_registry(self, at_hub, hub, tmp_path, picture):
        (tmp_path / "own.yaml").write_text(
            "schema: 1\nmodels:\n  mine:\n    family: segformer\n    variant: b0\n"
            "    task: segmentation\n    source: org/tiny\n    download_mb: 0.1\n"
            "    license: {name: Odd License, url: 'https://example.org', note: be kind}\n"
        )
        picture(size_wh=(64, 64))
        args = ("segment", "a.png", "-o", "out.png", "-m", "mine", "--registry", "own.yaml")
        code, out, err = at_hub(*args)
        assert (code, out) == (0, "out.png\n"), err
        [line] = err.splitlines()
        assert "fetching mine from org/tiny, about 0 MB, licence Odd License (be kind)" in line
        hub.asked.clear()
        assert at_hub(*args)[::2] == (0, "")
        assert hub.asked == []


@pytest.mark.export
@pytest.mark.parametrize(
    ("source", "says"),
    [("org/none", "org/none@main"), ("org/tiny@no-such-branch", "org/tiny@no-such-branch")],
)
def test_what_the_hub_does_not_have(export, tmp_path, source, says):
    code, out, err = export(source)
    assert (code, out) == (3, "")
    lines = err.splitlines()
    assert len(lines) == 3, err
    assert lines[1].startswith(f"segcli: error: cannot fetch {says} from the hub: ")
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.export
def test_repository_without_weights(export, hub):
    (hub.folder / "org" / "tiny" / "model.safetensors").unlink()
    code, _, err = export("org/tiny")
    assert code == 3
    assert "Traceback" not in err


@pytest.mark.export
def test_offline_without_a_first_fetch(export, hub):
    for args, env in ((["--offline"], {}), ([], {"HF_HUB_OFFLINE": "1"})):
        code, _, err = export("org/tiny", *args, **env)
        assert code == 3
        assert "cannot fetch org/tiny@main" in err
    assert hub.asked == []


@pytest.mark.export
def test_no_connection(export):
    code, _, err = export("org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 3
    assert len(err.splitlines()) == 3, err
    assert "cannot fetch org/tiny@main" in err


def test_a_changed_local_checkpoint_makes_the_export_stale(cached_model, tiny_model, tmp_path):
    path = cached_model("mine", tiny_model())
    spec = load_registry(tmp_path / "own.yaml").get("mine")
    assert locate(spec) == path
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/model.safetensors").write_bytes(b"newer")
    assert locate(spec) is None
