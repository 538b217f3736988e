import io
import threading
import time
from pathlib import Path

import pytest

from segcli import image_io, jobs, storage
from segcli.errors import ImageDecodeError
from segcli.formats import Format
from segcli.inputs import Source
from segcli.jobs import ClassifyJob, SegmentJob
from segcli.model import Model
from segcli.pipeline import run_images
from segcli.reading import RunOptions
from segcli.writers import OutputPlan

WORKERS = 3
# Under way per worker, and one read to see that there is more.
AHEAD = WORKERS * 2 + 1


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tiny_model):
    return Model.open(tiny_model(), device="cpu", threads=1)


@pytest.fixture
def segment(model):
    def call(
        sources,
        formats=(Format.MASK,),
        *,
        folder="out",
        workers=WORKERS,
        fail_fast=False,
        **options,
    ):
        return run_images(
            sources,
            model,
            SegmentJob(plan=OutputPlan("folder", folder, formats), **options),
            RunOptions(workers=workers, fail_fast=fail_fast),
            stdin=io.BytesIO(),
        )

    return call


class Counted:
    """A source of pictures that counts how far it was read."""

    def __init__(self, paths):
        self.paths = list(paths)
        self.read = 0

    def __iter__(self):
        for path in self.paths:
            self.read += 1
            yield Source(str(path), Path(path).name, "file")


@pytest.fixture
def pictures(picture):
    def make(count):
        for i in range(count):
            picture(f"{i:03}.png", (8 + i % 5, 6), i % 8)
        return Counted(f"{i:03}.png" for i in range(count))

    return make


@pytest.mark.parametrize("workers", [1, 4])
def test_order(segment, pictures, monkeypatch, workers):
    real = image_io.decode_image

    def uneven(data, path, **more):
        # The earlier, the slower.
        time.sleep(0.02 if path < "005" else 0)
        return real(data, path, **more)

    monkeypatch.setattr(image_io, "decode_image", uneven)
    sources = pictures(20)
    outcomes = list(segment(sources, workers=workers))
    assert [o.path for o in outcomes] == sources.paths
    assert {o.status for o in outcomes} == {"ok"}
    assert [o.outputs for o in outcomes] == [(f"out/{p}",) for p in sources.paths]
    assert all(Path(o.outputs[0]).is_file() for o in outcomes)
    assert all(o.elapsed_ms > 0 for o in outcomes)


def test_sources_are_taken_only_as_they_are_worked_on(segment, pictures):
    sources = pictures(60)
    outcomes = segment(sources)
    assert sources.read == 0
    for done, _ in enumerate(outcomes, 1):
        assert sources.read <= done + AHEAD
    assert done == 60


def test_workers_run_at_once(segment, pictures, monkeypatch):
    # Passes only where three images are decoded at the same time.
    barrier = threading.Barrier(WORKERS, timeout=20)
    real = image_io.decode_image

    def meet(data, path, **more):
        barrier.wait()
        return real(data, path, **more)

    monkeypatch.setattr(image_io, "decode_image", meet)
    assert {o.status for o in segment(pictures(WORKERS * 2))} == {"ok"}


def test_closing_early_stops(segment, pictures):
    sources = pictures(60)
    outcomes = segment(sources)
    next(outcomes)
    outcomes.close()
    assert sources.read <= 1 + AHEAD
    assert len(list(Path("out").iterdir())) <= 1 + AHEAD
    assert not list(Path("out").glob(".*"))
    assert not [t for t in threading.enumerate() if t.name.startswith("segcli")]


def test_errors_are_outcomes(segment, pictures):
    sources = pictures(6)
    Path("002.png").write_text("damaged")
    Path("004.png").unlink()
    outcomes = list(segment(sources))
    assert [o.status for o in outcomes] == ["ok", "ok", "error", "ok", "error", "ok"]
    assert [o.error.code for o in outcomes if o.error] == ["decode", "missing"]
    assert isinstance(outcomes[2].error, ImageDecodeError)
    assert outcomes[2].outputs == ()
    assert len(list(Path("out").iterdir())) == 4


def test_fail_fast(segment, pictures):
    sources = pictures(60)
    Path("002.png").write_text("damaged")
    outcomes = list(segment(sources, fail_fast=True))
    assert [o.status for o in outcomes] == ["ok", "ok", "error"]
    assert sources.read <= 3 + AHEAD


def test_fail_fast_at_the_very_end(segment, pictures):
    sources = pictures(3)
    Path("001.png").write_text("damaged")
    assert [o.status for o in segment(sources, fail_fast=True)] == ["ok", "error"]


def test_bug_in_a_worker_ends_the_run(segment, pictures, monkeypatch):
    def broken(data, path, **more):
        raise ZeroDivisionError

    monkeypatch.setattr(image_io, "decode_image", broken)
    with pytest.raises(ZeroDivisionError):
        list(segment(pictures(60)))
    assert not [t for t in threading.enumerate() if t.name.startswith("segcli")]


def test_error_of_the_sources_ends_the_run(segment, pictures):
    def failing():
        yield from pictures(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(segment(failing()))


def test_collision_goes_to_the_first_whatever_the_speed(segment, picture):
    picture("a.png", (400, 400)), picture("sub/a.png", (8, 6))
    sources = [Source("a.png", "a.png", "list"), Source("sub/a.png", "a.png", "list")]
    outcomes = list(segment(sources))
    assert [o.status for o in outcomes] == ["ok", "error"]
    assert outcomes[1].error.code == "collision"
    assert outcomes[0].size_hw == (400, 400)


def test_skip_existing_reads_nothing(segment, pictures, monkeypatch):
    sources = pictures(4)
    list(segment(sources))
    monkeypatch.setattr(storage, "read_bytes", None)
    outcomes = list(segment(sources, skip_existing=True))
    assert {o.status for o in outcomes} == {"skipped"}
    assert outcomes[0].outputs == ("out/000.png",)
    assert outcomes[0].size_hw is None


def test_skip_existing_wants_every_format(segment, pictures):
    sources = pictures(2)
    list(segment(sources))
    Path("out/001.color.png").write_bytes(b"")
    outcomes = list(segment(sources, (Format.MASK, Format.COLOR), skip_existing=True))
    assert [o.status for o in outcomes] == ["ok", "skipped"]


@pytest.mark.parametrize("folder", ["out", "memory://pipeline/out"])
def test_an_output_that_comes_during_the_work_is_left(segment, pictures, folder, monkeypatch):
    # As if it had not been there when it was asked for before the work.
    monkeypatch.setattr(jobs, "refuse_existing", lambda targets: None)
    (source,) = pictures(1)
    target = f"{folder}/000.png"
    storage.write_whole(target, b"another run's")
    (outcome,) = segment([source], folder=folder, no_clobber=True)
    assert outcome.error.code == "exists"
    assert storage.read_bytes(target) == b"another run's"


def test_leftovers_of_a_killed_run_go(segment, pictures):
    Path("out").mkdir()
    Path("out/.000.png.0123.segcli-part").touch()
    Path("out/.other").touch()
    list(segment(pictures(2)))
    assert sorted(p.name for p in Path("out").iterdir()) == [".other", "000.png", "001.png"]


def test_no_sources(segment):
    assert list(segment([])) == []


def test_classify(tiny_model, pictures):
    model = Model.open(tiny_model(task="classification", palette=()), device="cpu")
    sources = pictures(9)
    Path("003.png").unlink()
    outcomes = list(
        run_images(sources, model, ClassifyJob(2), RunOptions(workers=WORKERS), stdin=io.BytesIO())
    )
    assert [o.path for o in outcomes] == sources.paths
    assert outcomes[3].error.code == "missing"
    assert {len(o.labels) for o in outcomes if o.labels} == {2}
    assert outcomes[0].labels[0].name == "blue"


@pytest.fixture
def loading(tiny_model):
    """A model whose session opens, or fails to, only when it is told."""
    from concurrent.futures import Future

    from segcli.onnx_file import read_card

    path, opening = tiny_model(), Future()
    return Model(path, read_card(path), opening), opening


def run_with(model, sources):
    return run_images(
        sources,
        model,
        SegmentJob(plan=OutputPlan("folder", "out", (Format.MASK,))),
        RunOptions(workers=2),
        stdin=io.BytesIO(),
    )


def test_images_are_decoded_while_the_model_loads(loading, model, pictures, monkeypatch):
    waiting, opening = loading
    decoded = threading.Semaphore(0)
    real = image_io.decode_image

    def noted(data, path, **more):
        decoded.release()
        return real(data, path, **more)

    monkeypatch.setattr(image_io, "decode_image", noted)

    def open_late():
        assert decoded.acquire(timeout=10)
        time.sleep(1)
        opening.set_result(model.session)

    opener = threading.Thread(target=open_late)
    opener.start()
    outcomes = list(run_with(waiting, pictures(3)))
    opener.join()
    assert [o.status for o in outcomes] == ["ok"] * 3
    assert {o.provider for o in outcomes} == {model.provider}
    # The wait is not the images' own.
    assert all(o.elapsed_ms < 1000 for o in outcomes)


def test_a_model_that_cannot_be_loaded_comes_before_what_images_say(loading, pictures):
    from segcli.errors import DeviceError

    waiting, opening = loading
    opening.set_exception(DeviceError("no such device"))
    Path("bad.jpg").write_bytes(b"no image")
    sources = [Source("bad.jpg", "bad.jpg", "file"), *pictures(2)]
    with pytest.raises(DeviceError):
        next(run_with(waiting, sources))
    assert not list(Path("out").glob("*.png"))


def test_what_waits_for_the_model_is_dropped_on_an_interrupt(loading, pictures, next_interrupted):
    waiting, opening = loading
    sources = pictures(2)
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        next_interrupted(run_with(waiting, sources))
    # Nor is the model waited for.
    assert time.perf_counter() - start < 5
    assert not opening.done()
    assert not list(Path("out").glob("*.png"))
    assert not [t for t in threading.enumerate() if t.name.startswith("segcli")]
