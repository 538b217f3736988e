import json
import os
import pty
import signal
import subprocess
import time
from importlib.resources import files
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

STAGES = ["decode", "preprocess", "infer", "postprocess", "encode"]
KEYS = [
    *("schema", "model", "task", "provider", "workers", "threads", "images", "generated"),
    *("image_size", "input_size", "warmup", "runs", "load_ms", "stages", "image", "throughput"),
    *("peak_rss_bytes", "sweep", "machine", "versions"),
]
FACTS = [
    *("images_per_s", "peak_rss_mib", "load_ms", "model", "provider", "workers", "threads"),
    *("runs", "warmup", "images", "generated", "image_size", "input_size"),
    *("cpu", "cores", "usable_cores", "segcli", "onnxruntime", "python"),
]
SHORT = ("--runs", "3", "--warmup", "1")


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The place of temporary folders, for this process and those it starts."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", str(place))
    monkeypatch.chdir(tmp_path)
    return place


@pytest.fixture
def tiny(tiny_model):
    return tiny_model()


@pytest.fixture
def bench(segcli, tiny):
    """``segcli bench`` with the tiny model and few runs, in this process."""
    return lambda *args, **more: segcli("bench", "-m", tiny, *SHORT, *args, **more)


@pytest.fixture
def check():
    schema = json.loads((files("segcli.data") / "benchmark.schema.json").read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema).validate


def test_json(bench, picture, check, temporary):
    ran = bench(picture(size_wh=(9, 6)), "--json", "--workers", "2", "--threads", "1")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    check(found)
    assert list(found) == KEYS
    assert list(found["stages"]) == STAGES
    for times in (*found["stages"].values(), found["image"]):
        assert list(times) == ["median_ms", "p95_ms"]
        assert 0 < times["median_ms"] <= times["p95_ms"]
    assert found["image"]["median_ms"] >= max(t["median_ms"] for t in found["stages"].values())
    assert list(found["throughput"]) == ["images", "seconds", "images_per_s"]
    rate = found["throughput"]["images"] / found["throughput"]["seconds"]
    assert found["throughput"]["images_per_s"] == pytest.approx(rate, rel=1e-2)
    named = {k: found[k] for k in ("schema", "model", "task", "provider", "workers", "threads")}
    assert named == {
        "schema": 1,
        "model": "tiny",
        "task": "segmentation",
        "provider": "CPUExecutionProvider",
        "workers": 2,
        "threads": 1,
    }
    assert (found["images"], found["generated"]) == (1, False)
    assert found["image_size"] == found["input_size"] == {"width": 9, "height": 6}
    assert (found["warmup"], found["runs"], found["sweep"]) == (1, 3, [])
    assert found["peak_rss_bytes"] is None or found["peak_rss_bytes"] > 10 << 20
    assert list(temporary.glob("segcli-bench-*")) == []


def test_versions(bench, picture):
    import onnxruntime

    import segcli

    found = json.loads(bench(picture(), "--json").out)
    assert found["versions"]["segcli"] == segcli.__version__
    assert found["versions"]["onnxruntime"] == onnxruntime.__version__
    assert list(found["machine"]) == ["cpu", "cores", "usable_cores", "system"]


def test_lines_where_stdout_is_no_terminal(bench, picture):
    ran = bench(picture(), picture("b.png", (9, 9)))
    assert (ran.code, ran.err) == (0, "")
    rows = [line.split("\t") for line in ran.out.splitlines()]
    assert [row[0] for row in rows] == [*STAGES, "image", *FACTS]
    for _, median, p95 in rows[:6]:
        assert 0 < float(median) <= float(p95)
    facts = dict(rows[6:])
    assert float(facts["images_per_s"]) > 0
    assert facts["provider"] == "CPUExecutionProvider"
    assert (facts["runs"], facts["warmup"], facts["images"]) == ("3", "1", "2")
    assert (facts["generated"], facts["image_size"]) == ("no", "several")


def test_works_out_of_the_box(segcli, temporary):
    """No model, no image, no network."""
    args = ("--offline", "--runs", "1", "--warmup", "0", "--workers", "1", "--size", "64x48")
    ran = segcli("bench", *args, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["model"] == "segformer-b0-camvid"
    assert (found["generated"], found["image_size"]) == (True, {"width": 64, "height": 48})
    assert found["input_size"] == {"width": 480, "height": 360}
    assert found["runs"] == 1
    assert list(temporary.glob("segcli-bench-*")) == []


def test_model_from_the_environment(segcli, picture, tiny, monkeypatch):
    monkeypatch.setenv("SEGCLI_MODEL", str(tiny))
    assert json.loads(segcli("bench", picture(), *SHORT, "--json").out)["model"] == "tiny"


def test_model_by_name(segcli, picture, tiny, cached_model):
    cached_model("own", tiny)
    args = ("-m", "own", "--registry", "own.yaml", "--offline", "--json")
    assert json.loads(segcli("bench", picture(), *SHORT, *args).out)["model"] == "tiny"


def test_classifier(segcli, picture, tiny_model, check):
    model = tiny_model(task="classification", palette=())
    ran = segcli("bench", "-m", model, picture(), *SHORT, "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    check(found)
    assert found["task"] == "classification"
    assert list(found["stages"]) == STAGES[:-1]
    rows = segcli("bench", "-m", model, picture(), *SHORT).out.splitlines()
    assert [row.split("\t")[0] for row in rows[:5]] == [*STAGES[:-1], "image"]


def test_threads_reach_the_session(bench, picture, monkeypatch):
    from segcli import session

    opened = []
    real = session.open_session

    def open_session(path, *, device, threads, shared):
        opened.append((device, threads, shared))
        return real(path, device=device, threads=threads, shared=shared)

    monkeypatch.setattr(session, "open_session", open_session)
    found = json.loads(bench(picture(), "--json", "--threads", "1", "--device", "cpu").out)
    shared = found["workers"] > 1
    assert (opened, found["threads"]) == ([("cpu", 1, shared)], 1)


def test_sweep(bench, picture, monkeypatch, check):
    monkeypatch.setattr("segcli.session.usable_cores", lambda: 2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    ran = bench(picture(), "--sweep", "--json")
    found = json.loads(ran.out)
    check(found)
    assert [(s["workers"], s["threads"]) for s in found["sweep"]] == [(2, 1), (1, 2)]
    assert all(s["images_per_s"] > 0 for s in found["sweep"])
    rows = [line.split("\t")[0] for line in bench(picture(), "--sweep").out.splitlines()]
    assert rows[-2:] == ["images_per_s_2x1", "images_per_s_1x2"]


def test_folder(bench, picture):
    picture("in/a.png"), picture("in/sub/b.png")
    assert json.loads(bench("in", "--json").out)["images"] == 1
    assert json.loads(bench("in", "-r", "--json").out)["images"] == 2
    assert sorted(p.name for p in Path("in").rglob("*")) == ["a.png", "b.png", "sub"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--runs", "0"], "--runs"),
        (["--warmup", "-1"], "--warmup"),
        (["--workers", "0"], "--workers"),
        (["--threads", "100000"], "cores of this machine"),
        (["--size", "1080"], "not of the form WxH"),
        (["--size", "0x9"], "not of the form WxH"),
        (["--size", "65501x9"], "not of the form WxH"),
        (["--size", "50000x50000"], "is more than 178956970 pixels"),
        (["--size", "20x20", "--max-pixels", "399"], "is more than 399 pixels"),
        (["a.png", "--size", "20x20"], "there are inputs"),
        (["-"], "stdin"),
        (["none.png"], "no such file or folder: 'none.png'"),
        (["empty"], "holds no image"),
        (["bad.jpg"], "none of the inputs can be decoded"),
    ],
)
def test_usage(bench, picture, temporary, args, says):
    picture("a.png")
    Path("empty").mkdir()
    Path("bad.jpg").write_text("no picture")
    ran = bench(*args)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err
    assert list(temporary.glob("segcli-bench-*")) == []


def test_features_model(segcli, picture, tiny_model):
    model = tiny_model(task="features", class_names=(), palette=())
    ran = segcli("bench", "-m", model, picture(), *SHORT)
    assert (ran.code, ran.out) == (2, "")
    assert "features" in ran.err


def test_unknown_model_and_device(segcli, bench, picture):
    assert segcli("bench", "-m", "segfromer-b2", picture()).code == 3
    assert bench(picture(), "--device", "quantum").code == 4


def test_some_images_that_cannot_be_decoded(bench, picture):
    Path("bad.jpg").write_text("no picture")
    ran = bench("bad.jpg", picture(), "--json", "-q")
    assert ran.code == 1
    assert json.loads(ran.out)["images"] == 1
    assert "'bad.jpg'" in ran.err


def test_max_pixels(bench, picture):
    ran = bench(picture(size_wh=(20, 20)), picture("b.png"), "--max-pixels", "399", "--json")
    assert ran.code == 1
    assert "too large" in ran.err
    assert json.loads(ran.out)["image_size"] == {"width": 8, "height": 6}


def test_no_place_for_temporary_files(bench, picture, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    ran = bench(picture())
    assert (ran.code, ran.out) == (5, "")
    assert "cannot make a temporary folder" in ran.err


def test_verbose(bench, picture):
    err = bench(picture(), "-v").err
    for word in ("loading the model", "weights under MIT", "timing each stage", "pipeline"):
        assert word in err


def on_terminal(command, *args):
    """Runs a command whose stdout is a terminal; returns what it shows there and its process."""
    main, other = pty.openpty()
    try:
        done = subprocess.run(
            [*command, *map(str, args)],
            stdout=other,
            stderr=subprocess.PIPE,
            timeout=60,
            check=True,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
        )
        return os.read(main, 1 << 16).decode(), done
    finally:
        os.close(other)
        os.close(main)


def test_table_on_a_terminal(command, picture, tiny):
    shown, done = on_terminal(command, "bench", "-m", tiny, *SHORT, picture())
    rows = [line.split() for line in shown.splitlines()]
    assert rows[0] == ["stage", "median", "ms", "p95", "ms"]
    assert [row[0] for row in rows[1:7]] == [*STAGES, "image"]
    assert [row[0] for row in rows[8:]] == FACTS
    assert done.stderr == b""
    assert "\t" not in shown


def test_json_on_a_terminal_is_json(command, picture, tiny):
    shown, _ = on_terminal(command, "bench", "-m", tiny, *SHORT, picture(), "--json")
    assert list(json.loads(shown)) == KEYS


def test_only_results_on_stdout(segcli_process, picture, tiny):
    done = segcli_process("bench", "-m", tiny, *SHORT, picture(), "--json", "-v")
    assert list(json.loads(done.stdout)) == KEYS
    assert b"timing" in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGINT, 130, b"interrupted"), (signal.SIGTERM, 143, b"terminated")],
)
@pytest.mark.parametrize("runs", ["1", "1000000"])
def test_signal_leaves_no_folder(command, picture, tiny, temporary, number, code, says, runs):
    """In the stages with many runs, in the pipeline with many workers and one."""
    args = ["bench", "-m", str(tiny), "--runs", runs, str(picture(size_wh=(640, 480)))]
    args += ["--warmup", "0", "--workers", "500" if runs == "1" else "1"]
    with subprocess.Popen(
        [*command, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        written = "*/out/5.png" if runs == "1" else "*/out/a.png"
        while not list(temporary.glob(written)) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert says in err
    assert b"Traceback" not in err
    assert out == b""
    assert list(temporary.glob("segcli-bench-*")) == []
