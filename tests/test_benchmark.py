import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from segcli import benchmark, image_bytes, image_io, machine, storage
from segcli.artifact import Preprocessing
from segcli.benchmark import measure, splits
from segcli.errors import DeviceError, InferenceError, OutputError, UsageError
from segcli.inputs import Source
from segcli.measurements import BenchOptions, Stage
from segcli.model import Model
from segcli.sample_images import write_images
from segcli.session import usable_cores

STAGES = ["decode", "preprocess", "infer", "postprocess", "encode"]


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The place of temporary folders, for this test alone."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


@pytest.fixture
def model(tiny_model):
    return Model.open(tiny_model(), device="cpu", threads=1)


def sources(*paths):
    return [Source(str(p), Path(p).name, "file") for p in paths]


def short(**more):
    return BenchOptions(**{"runs": 4, "warmup": 2, "image_size_wh": (40, 30), **more})


def bench(model, *paths, **more):
    return measure(lambda *_: model, sources(*paths), short(**more))


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of the functions that stages are made of."""
    made = {}

    def watch(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            made.setdefault(name, []).append(args)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("prepare", "infer", "interpret"):
        watch(Model, name)
    for name in ("read_image", "encode_output"):
        watch(benchmark, name)
    watch(storage, "write_whole")
    return made


# What is counted


def test_one_sample_a_run_in_every_stage(model, picture):
    found = bench(model, picture())
    assert [s.name for s in found.stages] == STAGES
    assert [len(s.samples_ms) for s in found.stages] == [4] * 5
    for samples, whole in zip(
        zip(*(s.samples_ms for s in found.stages), strict=True), found.image.samples_ms, strict=True
    ):
        assert all(sample > 0 for sample in samples)
        assert whole == pytest.approx(sum(samples))


def test_warmup_is_run_and_not_counted(model, picture, monkeypatch):
    # A clock that nothing but the model moves: the first two images take an hour each.
    now, durations = [0.0], iter([3600, 3600, 1, 2, 3, 10])
    real = Model.infer

    def infer(self, pixel_values):
        now[0] += next(durations, 0.5)
        return real(self, pixel_values)

    monkeypatch.setattr(Model, "infer", infer)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = bench(model, picture(), workers=1)
    by_name = {s.name: s for s in found.stages}
    assert by_name["infer"].samples_ms == (1000, 2000, 3000, 10000)
    assert found.image.median_ms == 2500
    assert found.image.p95_ms == pytest.approx(8950)
    assert by_name["decode"].samples_ms == (0,) * 4
    # Two images of warm-up and four that count, half a second each; the two are not counted.
    assert (found.throughput.images, found.throughput.seconds) == (4, 2.0)
    assert found.throughput.images_per_s == 2


def test_stages_are_the_pipelines_own(model, picture, calls):
    """As many calls as images: serial with warm-up, then the pipeline with its own."""
    bench(model, picture(), workers=1)
    serial, overlapped = 2 + 4, 2 + 4
    for name in ("prepare", "infer", "interpret"):
        assert len(calls[name]) == serial + overlapped, name
    assert len(calls["encode_output"]) == serial
    # One more to see that it can be decoded.
    assert len(calls["read_image"]) == serial + 1
    assert len(calls["write_whole"]) == overlapped


def test_the_timed_life_writes_what_segment_writes(model, picture, tmp_path, monkeypatch):
    written = {}
    for owner, name in ((benchmark, "write_atomic"), (storage, "write_whole")):
        monkeypatch.setattr(
            owner,
            name,
            lambda path, data, owner=owner, **_: written.setdefault(owner, set()).add(data),
        )
    bench(model, picture())
    assert written[benchmark] == written[storage]
    assert len(written[storage]) == 1


def test_images_take_turns(model, picture, calls):
    bench(model, picture("a.png"), picture("b.png"), picture("c.png"), workers=1)
    read = [Path(source.path).name for source, *_ in calls["read_image"]]
    chosen, warmup, timed = read[:3], read[3:5], read[5:]
    assert chosen == ["a.png", "b.png", "c.png"]
    assert warmup == ["a.png", "b.png"]
    assert timed == ["a.png", "b.png", "c.png", "a.png"]


def test_no_more_images_than_runs_are_looked_at(model, picture):
    def endless():
        for i in count():
            yield from sources(picture(f"{i}.png"))

    found = measure(lambda *_: model, endless(), short(runs=3))
    assert (found.images, len(found.image.samples_ms)) == (3, 3)


@pytest.mark.parametrize(("seconds", "runs"), [(0.01, 100), (0.5, 11), (60, 5)])
def test_runs_for_some_seconds(model, picture, monkeypatch, seconds, runs):
    now = [0.0]
    real = Model.infer

    def infer(self, pixel_values):
        now[0] += seconds
        return real(self, pixel_values)

    monkeypatch.setattr(Model, "infer", infer)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = bench(model, picture(), runs=None)
    assert len(found.image.samples_ms) == runs


def test_enough_images_to_keep_every_worker_at_work(model, picture):
    assert bench(model, picture(), runs=1, workers=3).throughput.images == 12
    assert bench(model, picture(), runs=20, workers=3).throughput.images == 20


def test_throughput_overlaps(model, picture, monkeypatch):
    """With three workers three images are in the model at once; alone, one."""
    inside, most = [0], [0]
    real = Model.infer

    def infer(self, pixel_values):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1
        return real(self, pixel_values)

    monkeypatch.setattr(Model, "infer", infer)
    bench(model, picture(), workers=3, warmup=0)
    assert most[0] == 3
    most[0] = 0
    bench(model, picture(), workers=1, warmup=0)
    assert most[0] == 1


def test_median_and_p95():
    stage = Stage("infer", (4.0, 1.0, 2.0, 3.0, 100.0))
    assert stage.median_ms == 3
    assert stage.p95_ms == pytest.approx(80.8)
    assert Stage("infer", (7.0,)).p95_ms == 7


# What is said of it


def test_classifier_has_no_encode(tiny_model, picture, temporary):
    model = Model.open(tiny_model(task="classification", palette=()), device="cpu", threads=1)
    found = bench(model, picture())
    assert [s.name for s in found.stages] == STAGES[:-1]
    assert found.task == "classification"
    assert found.throughput.images_per_s > 0
    assert list(temporary.glob("segcli-bench-*")) == []


def test_names_and_sizes(tiny_model, picture):
    spec = Preprocessing(resize="squash", size_hw=(32, 64))
    model = Model.open(tiny_model(preprocessing=spec), device="cpu", threads=1)
    found = bench(model, picture(size_wh=(9, 6)), workers=2)
    assert (found.model, found.provider) == ("tiny", ort.get_available_providers()[-1])
    assert found.provider == "CPUExecutionProvider"
    assert (found.image_wh, found.input_wh) == ((9, 6), (64, 32))
    assert (found.images, found.generated) == (1, False)
    assert (found.options.workers, found.throughput.workers) == (2, 2)
    assert found.load_ms >= 0
    assert found.cpu.strip()
    assert 1 <= found.usable_cores <= found.cores


def test_size_after_orientation(model, picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(picture(size_wh=(9, 6))) as image:
        image.save(tmp_path / "turned.png", exif=exif)
    assert bench(model, tmp_path / "turned.png").image_wh == (6, 9)


def test_sizes_that_differ_are_none(model, picture):
    found = bench(model, picture("a.png", (9, 6)), picture("b.png", (6, 9)))
    assert (found.image_wh, found.input_wh) == (None, None)
    assert (found.to_dict()["image_size"], found.to_dict()["input_size"]) == (None, None)


def test_load_time_begins_when_told(model, picture):
    options = short()
    ago = time.perf_counter() - 1000
    found = measure(lambda *_: model, sources(picture()), options, started=ago)
    assert 1e6 <= found.load_ms < 2e6
    assert measure(lambda *_: model, sources(picture()), options).load_ms < 1e5


def test_peak_memory_is_at_least_what_was_just_held():
    block = np.ones(64 << 20, np.uint8)
    peak = machine.peak_rss_bytes()
    assert peak is None or block.nbytes <= peak < 1 << 42


def test_peak_memory_of_linux_and_its_unit(monkeypatch, tmp_path):
    (tmp_path / "status").write_text("Name:\tx\nVmPeak:\t9 kB\nVmHWM:\t    2048 kB\nVmRSS:\t1 kB\n")
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "status")
    assert machine.peak_rss_bytes() == 2 << 20


@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("linux", 1024), ("freebsd14", 1024)])
def test_peak_memory_where_there_is_no_proc(monkeypatch, tmp_path, system, unit):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "none")
    monkeypatch.setattr(machine.sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=5000))
    assert machine.peak_rss_bytes() == 5000 * unit


def test_cpu_name(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3: GHz\n")
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    assert machine.cpu_name() == "Some CPU @ 3: GHz"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert machine.cpu_name() == "aarch64"


def test_splits():
    assert splits(1) == [(1, 1)]
    assert splits(12) == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]


def test_sweep(model, picture, monkeypatch):
    monkeypatch.setattr(benchmark.session, "usable_cores", lambda: 4)
    loaded = []

    def load(workers, threads):
        loaded.append(threads)
        return model

    found = measure(load, sources(picture()), short(workers=2, threads=2, sweep=True))
    assert [(t.workers, t.threads) for t in found.sweep] == [(4, 1), (2, 2), (1, 4)]
    assert all(t.images_per_s > 0 for t in found.sweep)
    # The session that has the threads already is used again.
    assert loaded == [2, 1, 4]
    assert (found.throughput.workers, found.throughput.threads) == (2, 2)


# Made images


def test_made_images(model, temporary):
    found = bench(model)
    assert (found.generated, found.images) == (True, benchmark.GENERATED_IMAGES)
    assert found.image_wh == (40, 30)
    assert list(temporary.glob("segcli-bench-*")) == []


def test_made_images_are_the_same_every_time_and_differ(tmp_path):
    first, again = (write_images(str(tmp_path / n), 2, (96, 64)) for n in "ab")
    first, again = ([Path(p).read_bytes() for p in paths] for paths in (first, again))
    assert first == again
    assert first[0] != first[1]
    pixels = image_io.decode_image(first[0], "0.jpg")
    assert pixels.shape == (64, 96, 3)


def test_made_images_have_about_the_detail_of_a_photo(tmp_path):
    """As JPEG of the same size and quality, within a factor of three of the sample photo."""
    path = Path(__file__).parents[1] / "examples/china.jpg"
    photo = image_io.decode_image(path.read_bytes(), str(path))
    [made] = write_images(str(tmp_path), 1, (photo.shape[1], photo.shape[0]))
    ratio = Path(made).stat().st_size / len(image_bytes.encode_jpeg(photo))
    assert 1 / 3 < ratio < 3


# Failures


def test_bad_image_among_good_ones_is_refused(model, picture, tmp_path):
    (tmp_path / "bad.jpg").write_text("no picture")
    errors = []
    found = measure(
        lambda *_: model,
        sources(tmp_path / "bad.jpg", picture(), tmp_path / "none.png"),
        short(),
        refuse=errors.append,
    )
    assert [e.code for e in errors] == ["decode", "missing"]
    assert (found.images, found.generated) == (1, False)


def test_no_image_can_be_decoded(model, tmp_path, temporary):
    (tmp_path / "bad.jpg").write_text("no picture")
    with pytest.raises(UsageError, match="none of the inputs can be decoded"):
        bench(model, tmp_path / "bad.jpg")
    assert list(temporary.glob("segcli-bench-*")) == []


def test_model_that_fails_ends_it(model, picture, monkeypatch, temporary):
    def fail(self, pixel_values):
        raise InferenceError("the model failed: no")

    monkeypatch.setattr(Model, "infer", fail)
    with pytest.raises(InferenceError, match="the model failed"):
        bench(model, picture())
    assert list(temporary.glob("segcli-bench-*")) == []


def test_model_that_fails_in_the_pipeline_ends_it(model, picture, monkeypatch, temporary):
    """Failed images are fast: their rate would be no throughput."""
    real, left = Model.infer, [2 + 4]

    def infer(self, pixel_values):
        left[0] -= 1
        if left[0] < 0:
            raise InferenceError("the model failed: no")
        return real(self, pixel_values)

    monkeypatch.setattr(Model, "infer", infer)
    with pytest.raises(InferenceError, match="the model failed"):
        bench(model, picture())
    assert list(temporary.glob("segcli-bench-*")) == []


def test_features_have_no_answers(tiny_model, picture):
    model = Model.open(
        tiny_model(task="features", class_names=(), palette=()), device="cpu", threads=1
    )
    with pytest.raises(UsageError, match="features"):
        bench(model, picture())


def test_device_error_passes_through(picture):
    def load(workers, threads):
        raise DeviceError("no such device")

    with pytest.raises(DeviceError):
        measure(load, sources(picture()), short())


def test_no_place_for_temporary_files(model, picture, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(OutputError, match="cannot make a temporary folder"):
        bench(model, picture())


def test_interrupt_leaves_no_folder(model, picture, monkeypatch, temporary):
    seen = []

    def interrupt(*args, **kwargs):
        seen.append(len(list(temporary.iterdir())))
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "run_images", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(lambda *_: model, sources(picture()), short())
    assert seen == [1]
    assert list(temporary.glob("segcli-bench-*")) == []


def test_all_cores_are_swept(model, picture):
    found = measure(lambda *_: model, sources(picture()), short(sweep=True))
    assert [t.workers * t.threads for t in found.sweep] == [usable_cores()] * len(found.sweep)
    assert found.sweep
