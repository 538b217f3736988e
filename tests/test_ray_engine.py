import io
import os
import platform
import re
import signal
import sys
import time
import types
from pathlib import Path

import pytest

from segcli import __version__, ray_engine
from segcli.errors import DeviceError, OutputError, UsageError
from segcli.formats import Format
from segcli.inputs import Source, open_sources
from segcli.jobs import ClassifyJob, SegmentJob
from segcli.onnx_file import read_card
from segcli.ray_cluster import RayOptions
from segcli.ray_engine import RayModel
from segcli.ray_worker import Worker
from segcli.reading import RunOptions
from segcli.writers import OutputPlan


def test_without_ray(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    path = tiny_model()
    with pytest.raises(UsageError, match="which is not installed") as failed:
        RayModel(path, read_card(path), RayOptions(), print)
    assert failed.value.hint == "pip install 'segcli[ray]'"


def classify(model, names, options=None):
    sources = open_sources(names, stdin=io.BytesIO())
    options = options or RunOptions()
    return list(model.run_images(sources, ClassifyJob(1), options, stdin=io.BytesIO()))


class TestCluster:
    @pytest.fixture(autouse=True)
    def _ray(self, tmp_path, monkeypatch):
        pytest.importorskip("ray")
        monkeypatch.chdir(tmp_path)

    def test_no_such_cluster(self, tiny_model):
        path = tiny_model()
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(DeviceError, match=r"Ray cluster '127.0.0.1:1' cannot be reached"):
            RayModel(path, read_card(path), RayOptions(address="127.0.0.1:1"), print)
        assert signal.getsignal(signal.SIGTERM) is handler

    def test_a_model_that_no_worker_can_load(self, tiny_model):
        path = tiny_model()
        with pytest.raises(DeviceError, match=re.escape("'nonsense'")):
            RayModel(
                path, read_card(path), RayOptions(workers=1, threads=1, device="nonsense"), print
            )

    def test_an_image_that_kills_its_worker_is_that_images_error(self, tiny_model, picture):
        """As a decoder that crashes, or one image too many for the memory, would."""

        class Deadly(ClassifyJob):
            def finish(self, answer, image, blank, card, *, small):
                if "bad" in blank.path:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().finish(answer, image, blank, card, small=small)

        names = [f"{i}.png" for i in range(12)]
        names[5] = "bad.png"
        for name in names:
            picture(name)
        path = tiny_model(task="classification", palette=())
        model = RayModel(path, read_card(path), RayOptions(workers=1, threads=1), print)
        outcomes = list(
            model.run_images(
                open_sources(names, stdin=io.BytesIO()),
                Deadly(1),
                # Those that share a batch with it are done as well.
                RunOptions(batch_size=3),
                stdin=io.BytesIO(),
            )
        )
        assert [o.path for o in outcomes] == names
        assert [o.path for o in outcomes if o.status != "ok"] == ["bad.png"]
        assert outcomes[5].error.code == "inference"
        assert "'bad.png': its worker died 3 times" in str(outcomes[5].error)
        assert outcomes[6].provider == "CPUExecutionProvider"

    def test_files_of_a_worker_that_died_are_not_taken_for_somebody_elses(
        self, tiny_model, picture
    ):
        class Dying(SegmentJob):
            def finish(self, answer, image, blank, card, *, small):
                outcome = super().finish(answer, image, blank, card, small=small)
                if not Path("died").exists():
                    Path("died").touch()
                    # As if killed while it wrote the second.
                    Path(blank.outputs[1]).rename("out/.a.color.png.0123456789ab.segcli-part")
                    os.kill(os.getpid(), signal.SIGKILL)
                return outcome

        names = ["a.png", "b.png", "c.png"]
        for name in names:
            picture(name)
        Path("out").mkdir()
        Path("out/b.color.png").write_bytes(b"somebody else's")
        path = tiny_model()
        told = []
        model = RayModel(path, read_card(path), RayOptions(workers=1, threads=1), told.append)
        plan = OutputPlan("folder", "out/", (Format.MASK, Format.COLOR))
        outcomes = list(
            model.run_images(
                open_sources(names, stdin=io.BytesIO()),
                Dying(plan=plan, no_clobber=True),
                RunOptions(batch_size=3),
                stdin=io.BytesIO(),
            )
        )
        assert Path("died").exists()
        assert told == [
            f"warning: a worker on {platform.node()!r} died: its images are tried again"
        ]
        assert [o.status for o in outcomes] == ["ok", "error", "ok"]
        assert outcomes[1].error.code == "exists"
        assert Path("out/b.color.png").read_bytes() == b"somebody else's"
        assert sorted(p.name for p in Path("out").iterdir()) == sorted(
            ["a.png", "a.color.png", "b.color.png", "c.png", "c.color.png"]
        )

    def test_a_worker_that_dies_while_it_loads_the_model_is_started_again(
        self, tiny_model, picture, monkeypatch
    ):
        # A worker is in the current folder only once it has loaded the model.
        died = Path("died").absolute()

        class Dying(Worker):
            def start(self, shipped):
                try:
                    died.touch(exist_ok=False)
                except FileExistsError:
                    return super().start(shipped)
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(ray_engine, "Worker", Dying)
        picture("a.png")
        path = tiny_model(task="classification", palette=())
        model = RayModel(path, read_card(path), RayOptions(workers=1, threads=1), print)
        outcomes = classify(model, ["a.png"])
        assert [o.status for o in outcomes] == ["ok"]
        assert died.is_file()

    def test_machines_without_segcli(self, tiny_model, monkeypatch):
        class Elsewhere(Worker):
            pass

        # Which Ray then sends by its name.
        module = types.ModuleType("only_here")
        module.Elsewhere = Elsewhere
        Elsewhere.__module__, Elsewhere.__qualname__ = "only_here", "Elsewhere"
        monkeypatch.setitem(sys.modules, "only_here", module)
        monkeypatch.setattr(ray_engine, "Worker", Elsewhere)
        path = tiny_model()
        start = time.monotonic()
        with pytest.raises(DeviceError, match="No module named 'only_here'") as failed:
            RayModel(path, read_card(path), RayOptions(workers=2, threads=1), print)
        assert "segcli" in failed.value.hint
        assert time.monotonic() - start < 60

    def test_a_late_worker_of_another_version_is_left_out(self, tiny_model, picture, monkeypatch):
        class Mixed(Worker):
            def start(self, shipped):
                started = super().start(shipped)
                try:
                    Path("first").touch(exist_ok=False)
                except FileExistsError:
                    return started._replace(version="0.0.1")
                return started

        monkeypatch.setattr(ray_engine, "Worker", Mixed)
        path, told = tiny_model(task="classification", palette=()), []
        model = RayModel(path, read_card(path), RayOptions(workers=2, threads=1), told.append)

        def names():
            deadline = time.monotonic() + 60
            yield "a.png"
            while not told and time.monotonic() < deadline:
                time.sleep(0.01)
                yield "a.png"

        picture("a.png")
        sources = (Source(name, name, "list") for name in names())
        outcomes = list(model.run_images(sources, ClassifyJob(1), RunOptions(), stdin=io.BytesIO()))
        assert {o.status for o in outcomes} == {"ok"}
        assert told == [
            f"warning: a worker is left out: a worker runs segcli 0.0.1, this is {__version__}"
        ]

    def test_an_error_that_ends_a_run_says_what_it_says_here(
        self, tiny_model, picture, monkeypatch
    ):
        class Refusing(ClassifyJob):
            def finish(self, answer, image, blank, card, *, small):
                raise OutputError("the bucket is gone", hint="make another")

        picture("a.png")
        path = tiny_model(task="classification", palette=())
        model = RayModel(path, read_card(path), RayOptions(workers=1, threads=1), print)
        sources = open_sources(["a.png"], stdin=io.BytesIO())
        with pytest.raises(OutputError) as failed:
            list(model.run_images(sources, Refusing(1), RunOptions(), stdin=io.BytesIO()))
        assert str(failed.value) == "the bucket is gone"
        assert failed.value.hint == "make another"

    def test_a_run_without_workers_is_stopped_at_once(self, tiny_model, picture, monkeypatch):
        started = Path("started").absolute()

        class Gone(Worker):
            def start(self, shipped):
                if started.exists():
                    time.sleep(100)
                started.touch()
                return super().start(shipped)

            def attempt(self, *args):
                os.kill(os.getpid(), signal.SIGKILL)

        class Alarm(Exception):
            pass

        def ring(number, frame):
            raise Alarm

        monkeypatch.setattr(ray_engine, "Worker", Gone)
        picture("a.png")
        path = tiny_model(task="classification", palette=())
        model = RayModel(path, read_card(path), RayOptions(workers=1, threads=1), print)
        handler = signal.signal(signal.SIGALRM, ring)
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 4)
        try:
            with pytest.raises(Alarm):
                # More of them wait than there are workers, each group for all of its images.
                classify(model, [f"{i}.png" for i in range(50)], RunOptions(batch_size=8))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        assert 4 <= time.monotonic() - start < 30
