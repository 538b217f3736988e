"""Downloads through the real huggingface_hub, from a server on this machine that has faults."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from segcli.hub import license_in, parse_hub_id

COMMIT = "c0ffee" + "0" * 34
WEIGHTS = "model.safetensors"


class Hub(ThreadingHTTPServer):
    """Speaks the hub's protocol for files in a folder ORG/REPO/FILE.

    Attributes:
        asked: Method and path of each request.
        tokens: The path and the Authorization of each request that has one.
        faults: For (method, file), what happens at each request: a status, "cut", "hang",
            "stall" (after half of the bytes) or "wrong" bytes.
        ranges: Whether a part of a file can be asked for.
        cdn: Where large files are, or None.
        etag: The ETag of every file, or None for the hub's own.
    """

    daemon_threads = True

    def __init__(self, folder):
        self.folder = folder
        self.asked, self.tokens, self.faults = [], [], {}
        self.ranges, self.cdn, self.etag = True, None, None
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that was killed


def digest(name, data):
    if name.endswith((".safetensors", ".bin")):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


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
        hub = self.server
        hub.asked.append(f"{self.command} {self.path}")
        if token := self.headers.get("Authorization"):
            hub.tokens.append((self.path, token))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "old":
            return self._redirect("/" + "/".join(["org", *parts[1:]]))
        if parts[0] == "cdn":
            parts = parts[1:]
        repo = hub.folder.joinpath(*parts[:2])
        if len(parts) != 5 or parts[2] != "resolve" or not repo.is_dir():
            return self._refuse(404, "RepoNotFound")
        if parts[3] not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        fault = next(hub.faults.get((self.command, parts[4]), iter(())), None)
        if fault == "hang":
            hub.closing.wait()
            self.close_connection = True
            return None
        if fault == "gated":
            return self._refuse(403, "GatedRepo")
        if isinstance(fault, int):
            return self._refuse(fault)
        path = repo / parts[4]
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        data = path.read_bytes()
        etag = hub.etag or digest(parts[4], data)
        if hub.cdn and parts[4] == WEIGHTS and not self.path.startswith("/cdn/"):
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            return self._redirect(f"{hub.cdn}/cdn{self.path}", linked)
        if fault == "wrong":
            data = bytes([data[0] ^ 1]) + data[1:]
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if start and hub.ranges else 200)
        if start and hub.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            data = data[start:]
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault in ("cut", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "stall":
                hub.closing.wait()
        elif body:
            self.wfile.write(data)
        return None

    def _redirect(self, location, headers=()):
        self.send_response(302)
        self.send_header("Location", location)
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self, status, code=""):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()


FILES = {
    WEIGHTS: bytes(range(256)) * 2000,
    "config.json": b'{"model_type": "segformer"}',
    "README.md": b"---\nlicense: mit\n---\n",
}


@pytest.fixture
def hub(tmp_path):
    """A hub with the repository org/bytes, which holds no real model."""
    repo = tmp_path / "hub" / "org" / "bytes"
    repo.mkdir(parents=True)
    for name, data in FILES.items():
        (repo / name).write_bytes(data)
    server = Hub(tmp_path / "hub")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def environment(hub, tmp_path):
    """Variables with which a process finds the hub there, and a hub cache of its own."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


@pytest.fixture
def at_hub(segcli_process, environment):
    """Runs a command line."""

    def call(*args, **env):
        done = segcli_process(*args, **{**environment, **env})
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return call


# huggingface_hub reads its variables when it is imported, hence the processes.
FETCH = """
import sys
from segcli.errors import DownloadError
from segcli.hub import fetch_checkpoint
source, revision, offline = sys.argv[1:]
try:
    print(*fetch_checkpoint(source, revision, offline=bool(offline)), sep="\\n")
except DownloadError as error:
    print(error, error.hint, sep="\\n", file=sys.stderr)
    sys.exit(3)
"""


@pytest.fixture
def start_fetch(environment):
    def start(source="org/bytes", revision="main", offline=False, **env):
        return subprocess.Popen(
            [sys.executable, "-c", FETCH, source, revision, "1" if offline else ""],
            env={**os.environ, **environment, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def fetch(start_fetch):
    """Fetches; returns the files by name, or the lines of the error."""

    def call(*args, **more):
        process = start_fetch(*args, **more)
        out, err = process.communicate(timeout=60)
        if process.returncode:
            assert process.returncode == 3, err
            assert out == ""
            return err.splitlines()
        assert err == ""
        folder, commit = out.splitlines()
        assert commit == COMMIT
        return {entry.name: entry.read_bytes() for entry in Path(folder).iterdir()}

    return call


def test_every_file_as_it_is(fetch, hub):
    assert fetch() == FILES
    hub.asked.clear()
    assert fetch(offline=True) == fetch(HF_HUB_OFFLINE="1") == FILES
    assert hub.asked == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_resumed(fetch, hub, ranges):
    hub.ranges = ranges
    hub.faults["GET", WEIGHTS] = iter(["cut"])
    assert fetch() == FILES
    assert sum(line.startswith("GET") and WEIGHTS in line for line in hub.asked) == 2


def test_a_download_that_stalls_is_resumed(fetch, hub):
    hub.faults["GET", WEIGHTS] = iter(["stall"])
    assert fetch(HF_HUB_DOWNLOAD_TIMEOUT="1") == FILES


def test_a_killed_download_leaves_nothing_that_counts(fetch, hub, start_fetch):
    hub.faults["GET", WEIGHTS] = iter(["stall"])
    process = start_fetch()
    while not any(line.startswith("GET") for line in hub.asked):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert fetch(offline=True)[0].startswith("cannot fetch org/bytes@main from the hub: it is not")
    assert fetch() == FILES


def blobs(environment):
    return [p for p in Path(environment["HF_HOME"]).rglob("*") if p.is_file() and p.stat().st_size]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
@pytest.mark.parametrize("links", [True, False])
def test_other_bytes_than_the_hub_says(fetch, hub, environment, name, links):
    hub.faults["GET", name] = iter(["wrong"])
    env = {} if links else {"HF_HUB_DISABLE_SYMLINKS": "1"}
    data = FILES[name]
    bad = bytes([data[0] ^ 1]) + data[1:]
    kind, found = "git sha1", hashlib.sha1(b"blob %d\0" % len(bad) + bad).hexdigest()
    if name == WEIGHTS:
        kind, found = "sha256", hashlib.sha256(bad).hexdigest()
    assert fetch(**env) == [
        f"{name} of org/bytes is damaged: its {kind} is {found}, the hub says {digest(name, data)}",
        "it is removed from the hub's cache: run again to fetch it anew",
    ]
    assert bad not in [p.read_bytes() for p in blobs(environment)]
    assert fetch(**env) == FILES


def test_a_file_that_is_damaged_in_the_cache(fetch, environment):
    fetch()
    [blob] = [
        p
        for p in blobs(environment)
        if not p.is_symlink() and p.name == digest(WEIGHTS, FILES[WEIGHTS])
    ]
    blob.write_bytes(b"x" + FILES[WEIGHTS][1:])
    assert fetch(offline=True)[0].startswith(f"{WEIGHTS} of org/bytes is damaged")
    assert not blob.exists()
    assert fetch() == FILES


def test_an_etag_that_is_no_digest_says_nothing(fetch, hub):
    hub.etag = "v1-of-a-mirror"
    (hub.folder / "org/bytes/config.json").unlink()
    (hub.folder / "org/bytes/README.md").unlink()
    assert fetch() == {WEIGHTS: FILES[WEIGHTS]}


@pytest.mark.parametrize(
    ("status", "says", "hint"),
    [
        (401, "it answered 401 Unauthorized", "HF_TOKEN"),
        ("gated", "it is gated", "accept its terms at https://huggingface.co/org/bytes"),
        (403, "it answered 403 Forbidden", "HF_TOKEN"),
        (500, "it answered 500 Internal Server Error", "connection"),
    ],
)
def test_refusals(fetch, hub, status, says, hint):
    hub.faults["HEAD", WEIGHTS] = itertools.repeat(status)
    start = time.monotonic()
    message, advice = fetch()
    assert message.startswith(f"cannot fetch org/bytes@main from the hub: {says}")
    assert hint in advice
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("source", "revision", "says"),
    [
        ("org/none", "main", "there is no such repository"),
        ("org/bytes", "none", "there is no such branch, tag or commit"),
        ("org/bare", "main", "it has neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_what_is_not_there(fetch, hub, source, revision, says):
    (hub.folder / "org" / "bare").mkdir()
    message, _ = fetch(source, revision)
    assert message.startswith(f"cannot fetch {source}@{revision} from the hub: {says}")


def test_a_passing_fault_of_the_hub(fetch, hub):
    hub.faults["HEAD", WEIGHTS] = iter([503])
    assert fetch() == FILES


def test_a_refused_download_of_a_file(fetch, hub):
    hub.faults["GET", WEIGHTS] = iter([503])
    assert "it answered 503 Service Unavailable" in fetch()[0]
    assert fetch() == FILES


def test_a_hub_that_hangs(fetch, hub):
    hub.faults["HEAD", WEIGHTS] = itertools.repeat("hang")
    start = time.monotonic()
    assert "from the hub: " in fetch(HF_HUB_ETAG_TIMEOUT="1")[0]
    assert time.monotonic() - start < 15


def test_no_connection_takes_what_is_in_the_cache(fetch):
    start = time.monotonic()
    message, hint = fetch(HF_ENDPOINT="http://127.0.0.1:9")
    assert message.startswith("cannot fetch org/bytes@main from the hub: ")
    assert "refused" in message
    assert "connection" in hint
    # huggingface_hub's own attempts take 24 s.
    assert time.monotonic() - start < 12
    fetch()
    assert fetch(HF_ENDPOINT="http://127.0.0.1:9") == FILES


def test_a_half_fetched_checkpoint_is_none_offline(fetch, hub):
    """A processor's settings that were not fetched are not taken for absent."""
    (hub.folder / "org/bytes/preprocessor_config.json").write_text("{}")
    hub.faults["GET", "preprocessor_config.json"] = iter([503])
    assert "503" in fetch()[0]
    assert "it is not whole in the hub's cache" in fetch(offline=True)[0]
    assert fetch() == {**FILES, "preprocessor_config.json": b"{}"}


def test_redirects_within_the_hub_and_to_a_cdn(fetch, hub):
    hub.cdn = f"http://localhost:{hub.server_port}"
    assert fetch("old/bytes", HF_TOKEN="hf_secret") == FILES
    assert any(line.startswith("GET /cdn/") for line in hub.asked)
    assert {path.split("/")[1] for path, _ in hub.tokens} == {"old", "org"}
    assert {token for _, token in hub.tokens} == {"Bearer hf_secret"}


@pytest.mark.parametrize("proxy", ["http://user:secret@127.0.0.1:9", "odd://user:secret@host"])
def test_the_password_of_a_proxy_is_not_shown(fetch, proxy):
    lines = fetch(HTTP_PROXY=proxy, http_proxy=proxy, NO_PROXY="", no_proxy="")
    assert lines[0].startswith("cannot fetch org/bytes@main from the hub: ")
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", ("a/b", "main")),
        ("a/b@v1.0", ("a/b", "v1.0")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("a", None),
        ("a/b/c", None),
        ("../b", None),
        ("a/b@", None),
    ],
)
def test_hub_ids(text, expected):
    assert parse_hub_id(text) == expected


# Nine references to nine references, and so on: 9^9 words as text.
BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: mit\n---\n# Text\n", "mit"),
        ("no front matter", "unknown"),
        ("---\nlicense: [mit]\n---\n", "unknown"),
        ("---\nlicense: {a: b\n---\n", "unknown"),
        (f"---\n{BOMB}license: *a9\n---\n", "unknown"),
        ("---\nlicense: mit\n---\n" + "x" * (5 << 20), "unknown"),
    ],
    ids=["plain", "none", "list", "broken", "bomb", "long"],
)
def test_license_of_a_readme(tmp_path, readme, expected):
    assert license_in(tmp_path) == "unknown"
    (tmp_path / "README.md").write_text(readme)
    assert license_in(tmp_path) == expected


@pytest.fixture
def tiny_hub(hub, tiny_checkpoint):
    """The hub, with the repository org/tiny, a real model."""
    shutil.copytree(tiny_checkpoint, hub.folder / "org" / "tiny")
    return hub


@pytest.fixture
def export(at_hub, tiny_hub):
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

    def test_name_of_the_registry(self, at_hub, tiny_hub, tmp_path, picture):
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
        tiny_hub.asked.clear()
        assert at_hub(*args)[::2] == (0, "")
        assert tiny_hub.asked == []


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
def test_offline_without_a_first_fetch(export, hub):
    for args, env in ((["--offline"], {}), ([], {"HF_HUB_OFFLINE": "1"})):
        code, _, err = export("org/tiny", *args, **env)
        assert code == 3
        assert "cannot fetch org/tiny@main" in err
    assert hub.asked == []
