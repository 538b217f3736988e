import io
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from segcli.errors import DeviceError, UsageError
from segcli.inputs import open_sources
from segcli.jobs import ClassifyJob
from segcli.onnx_file import read_card
from segcli.ray_cluster import RayOptions
from segcli.ray_engine import RayModel
from segcli.reading import RunOptions


def test_without_ray(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    path = tiny_model()
    with pytest.raises(UsageError, match="which is not installed") as failed:
        RayModel(path, read_card(path), RayOptions(), print)
    assert failed.value.hint == "pip install 'segcli[ray]'"


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
        assert Path("5.png").exists() is False
