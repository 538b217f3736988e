import json
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("args", [("models",), ("models", "list")])
def test_list(segcli, args):
    ran = segcli(*args)
    assert (ran.code, ran.err) == (0, "")
    rows = {row[0]: row for row in (line.split("\t") for line in ran.out.splitlines())}
    assert {"segformer-b0-camvid", "segformer-b2", "mobilenet-v2"} <= set(rows)
    assert {len(row) for row in rows.values()} == {8}
    assert rows["segformer-b0-camvid"][6] == "embedded"
    assert rows["segformer-b2"][1] == "segmentation"
    assert rows["segformer-b2"][6] == "not here"


def test_list_json(segcli):
    found = {m["name"]: m for m in json.loads(segcli("models", "list", "--json").out)}
    assert found["segformer-b2"]["source"].startswith("nvidia/")
    assert found["segformer-b2"]["license_note"]
    assert found["segformer-b0-camvid"]["here"] == "embedded"


def test_list_with_own_registry(segcli, cached_model, tiny_model):
    cached_model("mine", tiny_model())
    ran = segcli("models", "list", "--registry", "own.yaml")
    [row] = [line.split("\t") for line in ran.out.splitlines() if line.startswith("mine\t")]
    assert row[6:] == ["cached", "MIT"]


def test_registry_that_is_broken(segcli):
    Path("own.yaml").write_text("schema: 1\nmodels: {x: {family: resnet}}\n")
    ran = segcli("models", "list", "--registry", "own.yaml")
    assert ran.code == 3
    assert ran.err.count("\n") <= 2
    assert segcli("models", "list", "--registry", "none.yaml").code == 3


def test_show_name(segcli):
    ran = segcli("models", "show", "segformer-b2")
    assert ran.code == 0
    assert "name: segformer-b2\n" in ran.out
    assert "here: not here" in ran.out
    assert "mIoU" in ran.out


def test_show_embedded_has_its_card(segcli):
    ran = segcli("models", "show", "segformer-b0-camvid", "--json")
    shown = json.loads(ran.out)
    assert shown["card"]["class_names"][0] == "sky"
    assert shown["bytes"] == Path(shown["file"]).stat().st_size


def test_show_file(segcli, tiny_model):
    path = tiny_model(class_names=("a\x1b[31m", "b", "c"))
    ran = segcli("models", "show", path)
    assert "task: segmentation" in ran.out
    assert "#c80000 #00c800 #0000c8" in ran.out
    assert "\x1b" not in ran.out
    shown = json.loads(segcli("models", "show", path, "--json").out)
    assert shown["card"]["name"] == "tiny"


def test_show_unknown(segcli, tiny_model):
    assert segcli("models", "show", "segformer-b9").code == 3
    assert segcli("models", "show", "none.onnx").code == 3
    assert segcli("models", "show", tiny_model(with_card=False)).code == 3


@pytest.mark.parametrize("action", ["pull", "rm"])
def test_no_name(segcli, action):
    ran = segcli("models", action)
    assert ran.code in (2, 3)
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("action", ["pull", "rm", "verify"])
def test_unknown_name(segcli, action):
    ran = segcli("models", action, "nonsense")
    assert ran.code == 3
    assert "the nearest names are" in ran.err


def test_pull_of_embedded_is_its_path(segcli):
    ran = segcli("models", "pull", "segformer-b0-camvid", "--offline")
    assert ran.code == 0
    assert Path(ran.out.strip()).is_file()


def test_pull_offline(segcli):
    ran = segcli("models", "pull", "segformer-b0", "--offline")
    assert ran.code == 3
    assert "--offline forbids" in ran.err


def test_rm(segcli, cached_model, tiny_model):
    path = cached_model("mine", tiny_model())
    ran = segcli("models", "rm", "mine", "--registry", "own.yaml")
    assert (ran.code, ran.out) == (0, f"{path}\n")
    assert not path.exists()
    assert not path.with_suffix(".json").exists()
    ran = segcli("models", "rm", "mine", "--registry", "own.yaml")
    assert ran.code == 3
    assert "not in the cache" in ran.err


def test_rm_of_embedded(segcli):
    ran = segcli("models", "rm", "segformer-b0-camvid")
    assert ran.code == 3
    assert "part of the package" in ran.err


def test_verify(segcli, cached_model, tiny_model):
    path = cached_model("mine", tiny_model())
    ran = segcli("models", "verify", "--registry", "own.yaml")
    assert (ran.code, ran.out) == (0, "segformer-b0-camvid\tok\nmine\tok\n")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ran = segcli("models", "verify", "mine", "--registry", "own.yaml")
    assert ran.code == 3
    assert ran.out.startswith(f"mine\tdamaged: {str(path)!r} is not the file that was exported")
    assert "'segcli models rm mine && segcli models pull mine' makes it anew" in ran.out
    assert segcli("models", "verify", "segformer-b2").out == "segformer-b2\tabsent\n"


def test_verify_of_a_model_that_strangers_can_write(segcli, cached_model, tiny_model):
    path = cached_model("mine", tiny_model())
    path.chmod(0o666)
    ran = segcli("models", "verify", "mine", "--registry", "own.yaml")
    assert ran.code == 3
    assert ran.out == (
        f"mine\tnot trusted: {str(path)!r} can be written by every user; "
        f"mend it with 'chmod o-w {path}'\n"
    )
