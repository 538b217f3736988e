"""One session on the CPU of this machine; devices that are not here; core counts."""

import os
import threading

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from segcli import session as room
from segcli.errors import ArtifactError, DeviceError, ExitCode, InferenceError
from segcli.session import CPU, CUDA, TENSORRT, Session, parse_device, provider_options


def graph(shape=("n", 3, "h", "w"), dtype=TensorProto.FLOAT, inputs=1, op="Identity"):
    """Serialises a graph of one operator on its first input."""
    names = [f"x{i}" for i in range(inputs)]
    made = helper.make_graph(
        [helper.make_node(op, ["x0"] * (op == "Identity" and inputs > 0), ["logits"])]
        if inputs
        else [helper.make_node("Constant", [], ["logits"], value_floats=[1.0])],
        "g",
        [helper.make_tensor_value_info(name, dtype, list(shape)) for name in names],
        [helper.make_tensor_value_info("logits", dtype, None)],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model.SerializeToString()


def batch(*shape):
    return np.random.default_rng(0).random(shape or (1, 3, 4, 5), np.float32)


@pytest.mark.parametrize("device", ["cpu", "CPU"])
@pytest.mark.parametrize("optimize", [True, False])
def test_a_model_runs_on_the_cpu(device, optimize):
    session = Session(graph(), device=device, optimize=optimize)
    assert session.provider == CPU
    assert session.fallback is None
    assert session.input_hw is None
    assert session.output_names == ("logits",)
    for shape in ((1, 3, 4, 5), (2, 3, 1, 1), (1, 3, 64, 96)):
        x = batch(*shape)
        [found] = session.run(x)
        assert np.array_equal(found, x)


def test_a_path_and_its_bytes_are_one_model(tmp_path):
    path = tmp_path / "größe.onnx"
    path.write_bytes(graph())
    x = batch()
    assert np.array_equal(Session(path, device="cpu").run(x)[0], Session(graph()).run(x)[0])


def test_auto_without_an_accelerator_is_the_cpu(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    session = Session(graph(), device="auto")
    assert session.provider == CPU
    assert session.fallback is None


def test_auto_says_when_a_driver_is_here_but_of_no_use(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(room, "cuda_driver_present", lambda: True)
    opened = []

    def open_on_cpu(model, options, provider, number):
        opened.append(provider)
        return ort.InferenceSession(model, options, providers=[CPU])

    monkeypatch.setattr(room, "_open", open_on_cpu)
    session = Session(graph(), device="auto")
    assert opened == [CUDA, CPU]
    assert session.provider == CPU
    assert "could not use it; running on the CPU" in session.fallback


def test_auto_falls_back_where_cuda_raises(monkeypatch):
    opened = room._open

    def without_cuda(model, options, provider, number):
        if provider == CUDA:
            raise DeviceError("CUDA failure 35")
        return opened(model, options, provider, number)

    monkeypatch.setattr(room, "cuda_driver_present", lambda: True)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(room, "_open", without_cuda)
    session = Session(graph(), device="auto")
    assert session.provider == CPU
    assert "could not use it; running on the CPU" in session.fallback


def test_a_provider_that_is_asked_for_must_be_active(monkeypatch):
    """ONNX Runtime itself goes on with the CPU and a log line."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(room, "_open", lambda m, o, *_: ort.InferenceSession(m, o, providers=[CPU]))
    with pytest.raises(DeviceError, match=f"'cuda:1' was asked for but {CUDA} is not active"):
        Session(graph(), device="cuda:1")


@pytest.mark.skipif(room.cuda_driver_present(), reason="a CUDA driver is here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "tensorrt"])
def test_cuda_without_a_driver_is_a_device_error(device):
    with pytest.raises(DeviceError) as caught:
        Session(graph(), device=device)
    assert caught.value.exit_code == ExitCode.DEVICE == 4


@pytest.mark.parametrize(
    "device", ["", "gpu", "cuda0", "cpu:x", "cpu:-1", "metal", ":", "CPUExecution"]
)
def test_an_unknown_device_lists_those_that_are_there(device):
    with pytest.raises(DeviceError, match=r"this ONNX Runtime .* has .*cpu") as caught:
        Session(graph(), device=device)
    assert caught.value.exit_code == 4
    assert "segcli doctor" in caught.value.hint


def test_devices_have_names_and_numbers(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    assert parse_device("cpu") == (CPU, 0)
    assert parse_device("cuda") == (CUDA, 0)
    assert parse_device("CUDA:12") == (CUDA, 12)
    assert parse_device("tensorrt:1") == (TENSORRT, 1)
    assert room.available_providers() == [TENSORRT, CUDA, CPU]
    assert room.version() == ort.__version__


def test_provider_options():
    assert provider_options(CPU, 0) == {}
    assert provider_options(CUDA, 2) == {
        "device_id": "2",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    }
    assert provider_options(TENSORRT, 1) == {"device_id": "1"}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(("n", 3, "h", "w"), None), ((1, 3, 64, 96), (64, 96)), (("n", "c", 32, 48), (32, 48))],
    ids=str,
)
def test_a_fixed_input_size_is_known(shape, expected):
    assert Session(graph(shape), device="cpu").input_hw == expected


@pytest.mark.parametrize(
    "model",
    [
        graph(inputs=2),
        graph(inputs=0),
        graph(("n", 3, "h")),
        graph(()),
        graph(("n", 4, "h", "w")),
        graph(("n", 3, 64, "w")),
        graph(("n", 3, "h", 64)),
        graph(dtype=TensorProto.UINT8),
        graph(dtype=TensorProto.FLOAT16),
    ],
    ids=["two", "none", "3-d", "scalar", "rgba", "height", "width", "uint8", "fp16"],
)
def test_a_graph_with_another_input_is_refused(model):
    with pytest.raises(ArtifactError, match=r"expected one of float32 \(N, 3, H, W\)"):
        Session(model, device="cpu")


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage" * 99, bytes(99), graph()[:-20], graph(op="NoSuchOperator")],
    ids=["empty", "garbage", "zeros", "truncated", "unknown operator"],
)
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load") as caught:
        Session(path, device="cpu")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load the model"):
        Session(content, device="cpu")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"cannot load .*nowhere\.onnx"):
        Session(tmp_path / "nowhere.onnx", device="cpu")


def test_a_failing_run_is_one_image_s_error():
    session = Session(graph((1, 3, 4, 5)), device="cpu")
    for bad in (batch(2, 3, 4, 5), batch(1, 3, 5, 5), batch(3, 4, 5)):
        with pytest.raises(InferenceError, match="the model failed: ") as caught:
            session.run(bad)
        assert caught.value.code == "inference"
        assert "\n" not in str(caught.value)
    assert np.array_equal(session.run(batch())[0], batch())


def test_several_threads_may_run_one_session():
    session = Session(graph(), device="cpu", threads=1)
    wrong = []

    def work(i):
        x = np.full((1, 3, 8, 8), i, np.float32)
        wrong.extend(i for _ in range(20) if not np.array_equal(session.run(x)[0], x))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_threads():
    assert Session(graph(), device="cpu", threads=3).threads == 3
    assert Session(graph(), device="cpu").threads == room.usable_cores()


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Stands in for /sys/fs/cgroup."""
    quota = room.cgroup_quota
    monkeypatch.setattr(room, "cgroup_quota", lambda _: quota(tmp_path))
    return tmp_path


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("9900000 100000", 8),
        ("0 100000", 8),
        ("200000 0", 8),
        ("nonsense", 8),
        ("", 8),
        ("-1 100000", 8),
    ],
)
def test_cores_within_the_quota_of_cgroup_2(cgroup, limit, cores):
    (cgroup / "cpu.max").write_text(f"{limit}\n")
    assert room.usable_cores() == cores


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("quota", "period", "cores"),
    [("-1", "100000", 8), ("300000", "100000", 3), ("1", "100000", 1), ("x", "100000", 8)],
)
def test_cores_within_the_quota_of_cgroup_1(cgroup, quota, period, cores):
    (cgroup / "cpu").mkdir()
    (cgroup / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (cgroup / "cpu/cpu.cfs_period_us").write_text(f"{period}\n")
    assert room.usable_cores() == cores


@pytest.mark.usefixtures("eight_cores", "cgroup")
def test_cores_without_a_quota():
    assert room.usable_cores() == 8


@pytest.mark.usefixtures("cgroup")
def test_cores_where_there_is_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert room.usable_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert room.usable_cores() == 1


def test_the_session_writes_nothing(capfd):
    with pytest.raises(ArtifactError):
        Session(b"garbage", device="cpu")
    with pytest.raises(InferenceError):
        Session(graph(), device="cpu").run(batch(3, 4, 5))
    assert capfd.readouterr() == ("", "")


def test_the_tiny_model_of_the_tests_runs(tiny_model):
    model = tiny_model(task="classification", palette=())
    assert onnx.load(model).graph.node
    [found] = Session(model, device="cpu").run(np.ones((2, 3, 4, 5), np.float32))
    assert found.shape == (2, 3)


@pytest.mark.parametrize(("threads", "at_once"), [(1, 4), (2, 2), (3, 1), (4, 1), (8, 1)])
def test_a_shared_session_fills_the_cores_and_no_more(monkeypatch, threads, at_once):
    monkeypatch.setattr(room, "usable_cores", lambda: 4)
    session = Session(graph(), device="cpu", threads=threads, shared=True)
    running, most, lock = 0, 0, threading.Lock()
    entered = threading.Semaphore(0)

    class Slow:
        def run(self, names, feeds):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            entered.release()
            # Long enough that all who may come in do.
            release.wait(5)
            with lock:
                running -= 1
            return list(feeds.values())

    release = threading.Event()
    session._session = Slow()
    callers = [threading.Thread(target=session.run, args=(batch(1, 3, 2, 2),)) for _ in range(6)]
    for caller in callers:
        caller.start()
    for _ in range(at_once):
        assert entered.acquire(timeout=5)
    assert not entered.acquire(timeout=0.05)
    release.set()
    for caller in callers:
        caller.join()
    assert most == at_once


def test_a_failed_run_gives_its_place_back(monkeypatch):
    monkeypatch.setattr(room, "usable_cores", lambda: 1)
    session = Session(graph(shape=("n", 3, 8, 8)), device="cpu", shared=True)
    for _ in range(3):
        with pytest.raises(InferenceError):
            session.run(batch(1, 3, 4, 4))
    assert session.run(batch(1, 3, 8, 8))[0].shape == (1, 3, 8, 8)


def test_opening_is_waited_for_only_when_it_is_asked(monkeypatch, tmp_path):
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    good.write_bytes(graph())
    bad.write_bytes(b"no model")
    start, real = threading.Event(), Session.__init__

    def slow(self, *args, **kwargs):
        assert start.wait(5)
        real(self, *args, **kwargs)

    monkeypatch.setattr(Session, "__init__", slow)
    opening = room.open_session(good, device="cpu", threads=1)
    assert not opening.done()
    start.set()
    assert opening.result(5).provider == CPU
    with pytest.raises(ArtifactError):
        room.open_session(bad).result(5)
