import json
from pathlib import Path

import pytest

from segcli import diagnose, selfcheck
from segcli.errors import DeviceError


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


def test_both_onnxruntime_wheels(doctor, monkeypatch):
    monkeypatch.setattr(diagnose, "installed", list)
    code, found = doctor()
    assert code == 4
    wheel = found["onnxruntime wheel"]
    assert wheel["state"] == "fail"
    assert "both installed" in wheel["text"]
    assert wheel["mend"].startswith("pip uninstall -y onnxruntime onnxruntime-gpu && ")
    assert found["opencv wheel"]["state"] == "note"


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


def test_environment_is_named_without_its_values(segcli, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy")
    monkeypatch.setenv("SEGCLI_OFFLINE", "1")
    ran = segcli("doctor")
    assert "SEGCLI_OFFLINE, HTTPS_PROXY in force" in ran.out
    assert "secret" not in ran.out + ran.err


def test_onnxruntime_that_cannot_be_imported(segcli_process, tmp_path):
    site = tmp_path / "site" / "onnxruntime"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("raise ImportError('libcudart is not here')")
    done = segcli_process("doctor", PYTHONPATH=str(site.parent))
    assert done.returncode == 4
    assert b"cannot be imported: libcudart is not here" in done.stdout
    assert b"mend: pip install" in done.stdout
    assert b"Traceback" not in done.stderr
