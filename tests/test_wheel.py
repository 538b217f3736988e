"""The wheel, away from the checkout: what is in it, and that it runs with nothing else of ours."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

# The export extra absent, no network, and no editable install of the checkout.
ISOLATION = """\
import socket, sys

ABSENT = ("torch", "onnx", "onnxscript", "safetensors", "h5py", "tflite", "transformers")

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

def refuse(*args, **more):
    raise OSError("the network was asked for")

sys.meta_path[:] = [Without(f) for f in sys.meta_path if "editable" not in str(f).lower()]
sys.path[:] = [p for p in sys.path if p != ROOT]
socket.socket.connect = socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built in a copy so that no build folder is left here."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "models.yaml"):
        shutil.copy(ROOT / name, copy)
    for name in ("segcli", "export", "tests"):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, copy],
        check=True,
        capture_output=True,
        timeout=300,
    )
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return set(archive.namelist())


@pytest.fixture
def installed(wheel, tmp_path):
    """Runs the wheel's own command line."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "sitecustomize.py").write_text(f"ROOT = {str(ROOT)!r}\n{ISOLATION}")
    work = tmp_path / "work"
    work.mkdir()

    def call(*args):
        code = (
            "import segcli, sys; from segcli.cli.app import main\n"
            f"assert segcli.__file__.startswith({str(site)!r}), segcli.__file__\n"
            "main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            capture_output=True,
            cwd=work,
            env={**os.environ, "PYTHONPATH": str(site)},
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return call


def test_holds_code_and_data(names):
    wanted = {
        f"segcli/{p.relative_to(ROOT / 'segcli')}"
        for p in (ROOT / "segcli").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    wanted |= {f"segcli/export/{p.name}" for p in (ROOT / "export").glob("*.py")}
    assert wanted <= names
    assert {
        "segcli/py.typed",
        "segcli/data/models.yaml",
        "segcli/data/ade20k.csv",
        "segcli/data/imagenet.txt",
        "segcli/data/segformer-b0-camvid.onnx",
        "segcli/data/selfcheck.json",
        "segcli/data/record.schema.json",
        "segcli/data/segmentation.schema.json",
        "segcli/data/report.css",
        "segcli/data/report.entry.html.j2",
        "segcli/data/report.html.j2",
        "segcli/data/report.js",
        "segcli/export/convert.py",
        "segcli/export/hub_names.py",
        "segcli/export/mobilenet_names.py",
        "segcli/export/state_dict.py",
        "segcli/export/tf_h5.py",
        "segcli/export/tflite.py",
        "segcli/export/tflite_graph.py",
        "segcli/export/tflite_input.py",
        "segcli/export/tflite_layer.py",
        "segcli/export/timm_config.py",
        "segcli/export/trace.py",
    } <= wanted


def test_holds_nothing_else(names):
    assert {n.split("/")[0].rpartition(".")[2] for n in names} == {"segcli", "dist-info"}
    assert not [n for n in names if "test" in n.lower() or "__pycache__" in n]


def test_entry_point_and_licence(wheel, names):
    [entry] = [n for n in names if n.endswith("entry_points.txt")]
    with zipfile.ZipFile(wheel) as archive:
        assert "segcli = segcli.__main__:main" in archive.read(entry).decode()
    assert [n for n in names if n.endswith("licenses/LICENSE")]


def test_registry_in_the_wheel_is_whole(wheel):
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read("segcli/data/models.yaml")
    assert data == (ROOT / "models.yaml").read_bytes()


def test_embedded_model_runs(installed, tmp_path, picture):
    image = picture(size_wh=(64, 48))
    code, out, err = installed("segment", str(image), "-o", "mask.png")
    assert (code, out, err) == (0, "mask.png\n", "")
    assert (tmp_path / "work" / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_doctor_is_content(installed):
    code, out, err = installed("doctor", "--device", "cpu")
    assert (code, err) == (0, ""), out


def test_models_are_listed(installed):
    code, out, _ = installed("models", "list")
    assert code == 0
    assert "segformer-b5\t" in out


def test_export_says_what_is_missing(installed):
    code, out, err = installed("export", "segformer-b0", "-o", "x.onnx")
    assert (code, out) == (3, "")
    assert "torch, onnx, onnxscript, safetensors cannot be imported" in err
    assert "pip install 'segcli[export]'" in err


def test_first_use_of_a_name_says_what_is_missing(installed, picture):
    code, out, err = installed("segment", str(picture()), "-m", "segformer-b0", "-o", "y.png")
    assert (code, out) == (3, "")
    assert "needs the export extra" in err
