"""Fixtures for every test: tiny graphs, tiny pictures, the data beside the checkout."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, TypeAlias
from urllib.parse import quote

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, settings
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from segcli.artifact import ModelCard, Preprocessing
from segcli.cli.app import run
from segcli.registry import load_registry
from segcli.store import CacheEntry, cached_path, sha256_of

# A busy machine takes its time; that says nothing about the code. The same examples in each run, so
# that a change is not blamed for what is older; --hypothesis-profile search looks for new ones.
settings.register_profile(
    "gate", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "search", settings.get_profile("gate"), derandomize=False, max_examples=2000
)
settings.load_profile("gate")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --chaos."""
    parser.addoption(
        "--chaos", action="store_true", help="run the tests marked slow_chaos too: many minutes"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked slow_chaos without --chaos."""
    if config.getoption("chaos"):
        return
    left_out = [item for item in items if item.get_closest_marker("slow_chaos")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of checkpoints and photos beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the data folder ../shared is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test sees the user's cache, model, credentials or terminal settings."""
    for name in list(os.environ):
        # GITHUB_ACTIONS makes Typer force a terminal in its help.
        if name.startswith(("SEGCLI_", "AWS_", "GOOGLE_", "RAY_")) or name in (
            "GITHUB_ACTIONS",
            "FORCE_COLOR",
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SEGCLI_CACHE_DIR", str(tmp_path / "segcli-cache"))
    return


def _card(**changes: object) -> ModelCard:
    values: dict[str, object] = {
        "name": "tiny",
        "task": "segmentation",
        "family": "segformer",
        "variant": "b0",
        "class_names": ("red", "green", "blue"),
        "palette": ((200, 0, 0), (0, 200, 0), (0, 0, 200)),
        "preprocessing": Preprocessing(resize="none"),
        "source": "made by a test",
        "weights_sha256": "0" * 64,
        "license": "MIT",
        "opset": 20,
        "versions": {"segcli": "0"},
        "verification": {},
        **changes,
    }
    return ModelCard(**values)  # type: ignore[arg-type]


@pytest.fixture
def make_card() -> Callable[..., ModelCard]:
    """Makes a valid card with some fields changed."""
    return _card


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model whose logits are the pixel's own channels: a pixel's class is its colour.

    For classification the logits are the mean colour.
    """

    def make(name: str = "tiny.onnx", *, with_card: bool = True, **changes: object) -> Path:
        card = _card(**changes)
        seg = card.task == "segmentation"
        axes = numpy_helper.from_array(np.array([2, 3], np.int64), "axes")
        node = (
            helper.make_node("Identity", ["pixel_values"], ["logits"])
            if seg
            else helper.make_node("ReduceMean", ["pixel_values", "axes"], ["logits"], keepdims=0)
        )
        graph = helper.make_graph(
            [node],
            "tiny",
            [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, "h", "w"])],
            [
                helper.make_tensor_value_info(
                    "logits", TensorProto.FLOAT, ["n", 3, "h", "w"] if seg else ["n", 3]
                )
            ],
            [] if seg else [axes],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        if with_card:
            helper.set_model_props(model, card.to_metadata())
        path = tmp_path / name
        onnx.save(model, path)
        return path

    return make


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """Writes a PNG whose left part is red, right part blue."""

    def make(name: str = "a.png", size_wh: tuple[int, int] = (8, 6), split: int = 4) -> Path:
        pixels = np.zeros((size_wh[1], size_wh[0], 3), np.uint8)
        pixels[:, :split, 0] = 255
        pixels[:, split:, 2] = 255
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return path

    return make


class Ran(NamedTuple):
    """What a command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def segcli(
    monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> Callable[..., Ran]:
    """Runs a command line in this process; stdout has no descriptor here."""

    def call(*args: object, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        capsysbinary.readouterr()
        code = run([str(arg) for arg in args])
        out, err = capsysbinary.readouterr()
        return Ran(int(code), os.fsdecode(out), os.fsdecode(err))

    return call


# What the installed script does, wherever pip put that.
COMMAND = (sys.executable, "-c", "from segcli.__main__ import main; main()")


@pytest.fixture
def command() -> tuple[str, ...]:
    """The start of a command line that runs segcli in a process of its own."""
    return COMMAND


@pytest.fixture
def segcli_process(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[bytes]"]:
    """Runs a command line in a process of its own, in the test's folder."""

    def call(
        *args: str | bytes | Path, stdin: bytes = b"", **env: str
    ) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [*COMMAND, *args],
            input=stdin,
            capture_output=True,
            cwd=tmp_path,
            env={**os.environ, **env},
            timeout=120,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def check_record() -> Callable[[object], None]:
    """Validates one record against the JSON Schema that ships with the package."""
    from jsonschema import Draft202012Validator

    schema = json.loads((files("segcli.data") / "record.schema.json").read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema).validate


@pytest.fixture
def own_registry(tmp_path: Path) -> Callable[..., Path]:
    """Writes own.yaml, a registry of one model whose weights are a local checkpoint."""

    def make(name: str, *, task: str = "segmentation", checkpoint: str = "checkpoint") -> Path:
        path = tmp_path / "own.yaml"
        path.write_text(
            f"schema: 1\nmodels:\n  {name}:\n    family: segformer\n    variant: b0\n"
            f"    task: {task}\n    checkpoint: {checkpoint}\n"
            "    license: {name: MIT, url: 'https://example.org'}\n"
        )
        return path

    return make


@pytest.fixture
def cached_model(own_registry: Callable[..., Path]) -> Callable[..., Path]:
    """Puts a model file into the cache as if it had been exported from own.yaml."""

    def make(name: str, model: Path, *, task: str = "segmentation") -> Path:
        registry = own_registry(name, task=task)
        spec = load_registry(registry).get(name)
        data = model.read_bytes()
        path = cached_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        entry = CacheEntry(spec.source, spec.revision, "", sha256_of(path), len(data))
        path.with_suffix(".json").write_text(json.dumps(asdict(entry)))
        return path

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a SegFormer with few random weights and three classes."""
    import torch
    from safetensors.torch import save_file

    from segcli.export.segformer import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_labels=3,
        depths=(1, 1, 1, 1),
        hidden_sizes=(8, 8, 16, 16),
        num_attention_heads=(1, 1, 2, 2),
        mlp_ratios=(2, 2, 2, 2),
        decoder_hidden_size=8,
    )
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(config)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-segformer"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    labels = {"0": "red", "1": "green", "2": "blue"}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "segformer", **asdict(config), "id2label": labels})
    )
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server of its own on this machine; it asks for no credentials."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=out,
            stderr=out,
        )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


class Bucket:
    """A bucket, seen by another client than segcli's: plain requests, unsigned."""

    def __init__(self, server: str, name: str) -> None:
        self.name, self.url, self.server = name, f"s3://{name}", server
        self._ask("PUT", "")

    def _ask(self, method: str, key: str, data: bytes | None = None) -> bytes:
        address = f"{self.server}/{self.name}" + (f"/{quote(key)}" if key else "")
        request = urllib.request.Request(address, data, method=method)
        # Without a key in it moto's front cannot tell which of its services is meant.
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=a/2020/us-east-1/s3/x")
        request.add_header("Content-Type", "application/octet-stream")
        with urllib.request.urlopen(request, timeout=30) as answer:
            content: bytes = answer.read()
            return content

    def put(self, key: str, data: bytes) -> None:
        """Puts an object in place."""
        self._ask("PUT", key, data)

    def get(self, key: str) -> bytes:
        """Returns an object's content."""
        return self._ask("GET", key)

    def list(self) -> list[str]:
        """Returns all keys, in the order of the server."""
        return [
            unescape(key) for key in re.findall("<Key>(.*?)</Key>", self._ask("GET", "").decode())
        ]


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket that the environment's endpoint and credentials lead to."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return Bucket(s3_server, f"b{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """Waits for something to become true, and fails where it does not."""

    def wait(what: Callable[[], object], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "it did not come about in time"
            time.sleep(0.002)

    return wait


@pytest.fixture(scope="session")
def next_interrupted() -> Callable[[Iterator[object]], object]:
    """Waits for the next item of an iterator, and is interrupted on the way."""

    def wait(items: Iterator[object]) -> object:
        interrupt = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        interrupt.start()
        try:
            return next(items)
        finally:
            interrupt.cancel()

    return wait


# Status, body, and where it is not the body's the length that the server claims.
Answer: TypeAlias = tuple[int, bytes] | tuple[int, bytes, int]


class Server(NamedTuple):
    """A server of the tests, and what it was asked."""

    url: str
    asked: list[str]


@pytest.fixture
def http_server() -> Iterator[Callable[[Callable[[str, str], Answer]], Server]]:
    """Starts a web server on this machine, given what answers a method and a path."""
    with contextlib.ExitStack() as stack:

        def start(answer: Callable[[str, str], Answer]) -> Server:
            asked: list[str] = []

            class Handler(BaseHTTPRequestHandler):
                protocol_version = "HTTP/1.1"

                def _answer(self) -> None:
                    self.rfile.read(int(self.headers.get("Content-Length") or 0))
                    asked.append(f"{self.command} {self.path}")
                    status, body, *length = answer(self.command, self.path)
                    self.send_response(status)
                    # Stores say both of every object.
                    self.send_header("Last-Modified", self.date_time_string())
                    self.send_header("ETag", '"1"')
                    self.send_header("Content-Length", str(*length or [len(body)]))
                    if length:
                        self.close_connection = True
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(body)

                do_GET = do_HEAD = do_PUT = _answer  # noqa: N815

                def log_message(self, format: str, *args: object) -> None:
                    pass

            server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            stack.callback(server.server_close)
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return Server(f"http://127.0.0.1:{server.server_port}", asked)

        yield start
