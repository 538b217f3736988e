import ctypes
import json
import os
import sys
from ctypes.util import find_library
from pathlib import Path

import onnxruntime
import pytest

from segcli import cuda_libraries, diagnose, selfcheck, session
from segcli.errors import DeviceError
from segcli.session import CUDA, TENSORRT, available_providers


@pytest.fixture
def doctor(segcli):
    def call(*args):
        ran = segcli("doctor", *args, "--json")
        return ran.code, {f["check"]: f for f in json.loads(ran.out)}

    return call


@pytest.fixture
def no_cuda():
    try:
        selfcheck.run("cuda")
    except DeviceError:
        return
    pytest.skip("CUDA works here")


def test_text(segcli):
    ran = segcli("doctor")
    assert ran.code == 0, ran.out
    assert ran.err == ""
    heads = [line.partition(":")[0].split(maxsplit=1) for line in ran.out.splitlines()]
    checks = {name: state for state, name in heads if state != "mend"}
    assert {"segcli", "packages", "onnxruntime", "cuda", "threads", "cache", "self-check"} <= set(
        checks
    )
    assert set(checks.values()) <= {"ok", "note"}
    assert checks["self-check"] == "ok"


def test_json(doctor):
    code, found = doctor()
    assert code == 0
    assert found["self-check"]["state"] == "ok"
    assert set(found["segcli"]) == {"check", "state", "text", "mend", "exit_code"}


def in_process(segcli_process, *args, **env):
    done = segcli_process("doctor", "--device", "cpu", "--json", *args, **env)
    assert done.stderr == b""
    return done.returncode, {f["check"]: f for f in json.loads(done.stdout)}


def wheel(site, name):
    folder = site / f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


def test_both_onnxruntime_wheels(segcli_process, tmp_path):
    for name in (*diagnose.ORT_WHEELS, *diagnose.OPENCV_WHEELS):
        wheel(tmp_path / "site", name)
    code, found = in_process(segcli_process, PYTHONPATH=str(tmp_path / "site"))
    assert code == 4
    both = found["onnxruntime wheel"]
    assert both["state"] == "fail"
    assert both["text"].startswith("onnxruntime and onnxruntime-gpu are both installed")
    assert both["mend"] == (
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    )
    assert found["opencv wheel"]["state"] == "note"
    assert "opencv-python, opencv-python-headless" in found["opencv wheel"]["text"]


def test_no_onnxruntime_wheel(doctor, monkeypatch):
    monkeypatch.setattr(diagnose, "installed", lambda names: [])
    code, found = doctor()
    assert code == 4
    assert found["onnxruntime wheel"]["text"] == "none is installed"


def test_cache_below_a_file(doctor, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SEGCLI_CACHE_DIR", str(tmp_path / "file" / "cache"))
    code, found = doctor()
    assert code == 3
    assert found["cache"]["state"] == "fail"
    assert "SEGCLI_CACHE_DIR" in found["cache"]["mend"]


def test_models_in_the_cache_are_named(doctor, cached_model, tiny_model):
    cached_model("mine", tiny_model())
    assert doctor()[1]["cache"]["text"].endswith(": mine")


@pytest.mark.parametrize("damage", ["cut", "empty", "absent", "other"])
def test_damaged_embedded_model(doctor, monkeypatch, tmp_path, tiny_model, damage):
    data = selfcheck.embedded_model().read_bytes()
    path = tmp_path / "model.onnx"
    if damage == "cut":
        path.write_bytes(data[:-1000])
    elif damage == "empty":
        path.touch()
    elif damage == "other":
        path = tiny_model()
    monkeypatch.setattr(selfcheck, "embedded_model", lambda: Path(path))
    code, found = doctor("--device", "cpu")
    assert code == 3
    assert found["self-check"]["state"] == "fail"


def test_other_logits(doctor, monkeypatch):
    monkeypatch.setattr(selfcheck, "run", lambda device: ("CPUExecutionProvider", 0.5))
    code, found = doctor("--device", "cpu")
    assert code == 3
    assert "logits differ by 0.5" in found["self-check"]["text"]
    assert found["self-check"]["mend"]


def test_device_that_is_not_here(doctor, no_cuda):
    code, found = doctor("--device", "cuda")
    assert code == 4
    assert found["self-check"]["state"] == "fail"
    assert found["self-check"]["mend"]


# A library that the loader takes, whatever its name says.
LIBRARY = find_library("m")


def loadable(name):
    for folder in ("/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib"):
        if (path := Path(folder, name)).exists():
            return path.read_bytes()
    pytest.skip(f"no {name} to copy")


@pytest.fixture
def with_driver(segcli_process, tmp_path, no_cuda):
    """Runs the doctor on a machine whose loader finds a CUDA driver and the given libraries."""
    if CUDA not in available_providers() or not LIBRARY or sys.platform != "linux":
        pytest.skip("this ONNX Runtime has no CUDA provider")
    folder = tmp_path / "lib"
    folder.mkdir()

    def call(libraries=(), search=True):
        (folder / "libcuda.so.1").write_bytes(loadable(LIBRARY))
        other = folder if search else tmp_path / "nvidia" / "cu13" / "lib"
        other.mkdir(parents=True, exist_ok=True)
        for name, data in dict(libraries).items():
            (other / name).write_bytes(loadable(LIBRARY) if data is None else data)
        env = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(tmp_path)}
        return in_process(segcli_process, **env)

    return call


@pytest.fixture
def needed():
    """The first library that the CUDA provider of this wheel wants and this machine lacks."""
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    with pytest.raises(OSError) as caught:
        ctypes.CDLL(str(provider))
    return str(caught.value).partition(":")[0]


def test_cuda_driver_without_cuda_libraries(with_driver, needed):
    code, found = with_driver()
    assert code == 4
    cuda = found["cuda"]
    assert cuda["state"] == "fail"
    assert cuda["text"].endswith(f"needs {needed}, this machine has none of any version")
    assert cuda["mend"] == "pip install 'segcli[cuda]'"
    # The self-check ran on the CPU all the same.
    assert found["self-check"]["state"] == "ok"


def test_cuda_libraries_of_another_major(with_driver, needed):
    stem, _, major = needed.rpartition(".")
    older = [f"{stem}.{int(major) - 2}", f"{stem}.{int(major) - 1}"]
    code, found = with_driver(dict.fromkeys([*older, f"{older[0]}.9.1"]))
    assert code == 4
    text = f"needs {needed}, this machine has {older[0]} and {older[1]}"
    assert found["cuda"]["text"].endswith(text)


def test_cuda_library_that_the_loader_does_not_search(with_driver, needed, tmp_path):
    # ONNX Runtime looks below the nvidia/ beside itself only.
    code, found = with_driver({needed: None}, search=False)
    assert code == 4
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    text = f"{needed}, which lies in {folder}: the loader does not look"
    assert found["cuda"]["text"].endswith(text)
    assert found["cuda"]["mend"] == f"export LD_LIBRARY_PATH={folder}:$LD_LIBRARY_PATH"


def test_cuda_library_that_is_broken(with_driver, needed, tmp_path):
    code, found = with_driver({needed: b"no library" * 99})
    assert code == 4
    assert f"{tmp_path}/lib/{needed}: invalid ELF header" in found["cuda"]["text"]


def test_provider_that_is_listed_and_does_not_load(with_driver):
    if TENSORRT not in available_providers():
        pytest.skip("this ONNX Runtime has no TensorRT provider")
    _, found = with_driver()
    assert found["tensorrt"]["state"] == "note"
    assert "lists it, but it does not load: needs lib" in found["tensorrt"]["text"]
    assert "TensorRT" in found["tensorrt"]["mend"]


@pytest.mark.parametrize("works", [True, False])
def test_no_cudnn(doctor, monkeypatch, tmp_path, works):
    """Whether CUDA then works, only the device says; there is none here."""
    (tmp_path / "libcudnn.so.8").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    if find_library("cudnn") or sys.platform != "linux":
        pytest.skip("cuDNN is here, or elsewhere")

    def run(device):
        if device == "cuda" and not works:
            raise DeviceError("CUDAExecutionProvider does not start")
        return device, 1e-6

    monkeypatch.setattr(selfcheck, "run", run)
    monkeypatch.setattr(session, "cuda_driver_present", lambda: True)
    monkeypatch.setattr(session, "available_providers", lambda: [CUDA])
    monkeypatch.setattr(cuda_libraries, "missing_for", lambda provider: None)
    code, found = doctor("--device", "cpu")
    assert (code, found["cuda"]["state"]) == ((0, "note") if works else (4, "fail"))
    assert "needs libcudnn.so.9, this machine has libcudnn.so.8" in found["cuda"]["text"]
    assert found["cuda"]["mend"] == "pip install 'segcli[cuda]'"


def test_affinity(segcli_process, tmp_path):
    if not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2:
        pytest.skip("no affinity to set")
    (tmp_path / "sitecustomize.py").write_text("import os\nos.sched_setaffinity(0, {0})\n")
    _, found = in_process(segcli_process, PYTHONPATH=str(tmp_path))
    threads = found["threads"]
    assert threads["state"] == "note"
    assert threads["text"].startswith(f"1 of {os.cpu_count()} cores may be used; the affinity mask")
    assert "taskset" in threads["mend"]


@pytest.mark.parametrize(
    "files",
    [
        {"cpu.max": "150000 100000\n"},
        {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"},
    ],
)
def testcgroup_quota(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    finding = diagnose._threads(2, tmp_path)
    assert finding.state == "note"
    assert "the cgroup allows the time of 1.5" in finding.text
    assert "docker run --cpus" in finding.mend
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert "cgroup" not in diagnose._threads(2, tmp_path).text


def test_thread_variables(doctor, monkeypatch):
    for name in diagnose.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "is set" not in doctor("--device", "cpu")[1]["threads"]["text"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = doctor("--device", "cpu")[1]["threads"]
    assert threads["state"] == "note"
    assert "OMP_NUM_THREADS=1 is set" in threads["text"]
    assert "unset OMP_NUM_THREADS" in threads["mend"]


@pytest.fixture
def read_only():
    """Takes the right to write away; root loses it by becoming another user for a while."""
    modes = {}

    def change(place, mode):
        modes.setdefault(place, place.stat().st_mode & 0o7777)
        place.chmod(mode)

    def take(folder):
        change(folder, 0o555)
        if os.geteuid() == 0:
            for parent in folder.parents:
                # Open to that user; the cache stays root's, as an administrator keeps one.
                mode = parent.stat().st_mode & 0o7777
                if not mode & 0o001:
                    change(parent, mode | 0o011)
            os.seteuid(65534)

    yield take
    os.seteuid(os.getuid())
    for place, mode in modes.items():
        place.chmod(mode)


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes")
def test_read_only_cache(cached_model, tiny_model, read_only):
    folder = cached_model("mine", tiny_model()).parents[1]
    read_only(folder)
    finding = diagnose._cache()
    assert finding.state == "note"
    assert finding.text.endswith(": its models can be used, others not: mine")


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes")
def test_empty_read_only_cache(tmp_path, read_only):
    folder = tmp_path / "segcli-cache"
    folder.mkdir()
    read_only(folder)
    finding = diagnose._cache()
    assert (finding.state, finding.exit_code) == ("fail", 3)
    assert "SEGCLI_CACHE_DIR" in finding.mend


def test_cache_that_others_can_write(doctor, cached_model, tiny_model):
    folder = cached_model("mine", tiny_model()).parent
    folder.chmod(0o777)
    code, found = doctor("--device", "cpu")
    assert code == 3
    assert found["cache"]["state"] == "fail"
    assert f"{str(folder)!r} can be written by every user" in found["cache"]["text"]
    assert found["cache"]["mend"] == f"chmod o-w {folder}"


@pytest.mark.parametrize("name", ["torch", "onnxscript"])
def test_no_export_extra(doctor, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    code, found = doctor("--device", "cpu")
    assert code == 0
    assert found["export"]["state"] == "note"
    assert found["export"]["text"].startswith(f"{name} cannot be imported")
    assert found["export"]["mend"] == "pip install 'segcli[export]'"


@pytest.fixture
def no_proxy(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.endswith("_OFFLINE"):
            monkeypatch.delenv(name)


def test_proxies_are_named_without_their_values(segcli, monkeypatch, no_proxy):
    assert "proxy" not in segcli("doctor", "--device", "cpu").out
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy")
    monkeypatch.setenv("all_proxy", "user:secret@elsewhere:1")
    monkeypatch.setenv("NO_PROXY", "localhost")
    for args in ((), ("--json",)):
        ran = segcli("doctor", "--device", "cpu", *args)
        assert ran.code == 0
        assert "HTTPS_PROXY, ALL_PROXY in force" in ran.out
        assert "but not for the hosts in NO_PROXY" in ran.out
        assert "secret" not in ran.out + ran.err


def test_socks_proxy_without_socksio(doctor, monkeypatch, no_proxy):
    monkeypatch.setenv("ALL_PROXY", "socks5://user:secret@host:1080")
    monkeypatch.setitem(sys.modules, "socksio", None)
    found = doctor("--device", "cpu")[1]["socks proxy"]
    assert found["text"].startswith("ALL_PROXY is a SOCKS proxy, for which socksio is missing")
    assert found["mend"] == "pip install socksio"


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "SEGCLI_OFFLINE"])
def test_offline(doctor, monkeypatch, no_proxy, name):
    assert "offline" not in doctor("--device", "cpu")[1]
    monkeypatch.setenv(name, "1")
    found = doctor("--device", "cpu")[1]["offline"]
    assert found["state"] == "note"
    assert found["text"].startswith(f"{name} forbids downloads")
    assert found["mend"] == f"unset {name}"


def test_environment(doctor, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://user:secret@mirror")
    found = doctor("--device", "cpu")[1]["environment"]
    assert found["text"] == "HF_ENDPOINT in force"


def test_onnxruntime_that_cannot_be_imported(segcli_process, tmp_path):
    site = tmp_path / "site" / "onnxruntime"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("raise ImportError('libcudart is not here')")
    done = segcli_process("doctor", PYTHONPATH=str(site.parent))
    assert done.returncode == 4
    assert b"cannot be imported: libcudart is not here" in done.stdout
    assert b"mend: pip install" in done.stdout
    assert b"Traceback" not in done.stderr
