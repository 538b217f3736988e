import json

import pytest

from segcli.labels import read_labels


def test_what_it_writes_export_reads(segcli, tiny_model, tmp_path):
    names = ("red", 'a "b", c', "blå")
    ran = segcli("labels", tiny_model(class_names=names))
    assert ran.code == 0
    path = tmp_path / "labels.csv"
    path.write_text(ran.out, "utf-8")
    found = read_labels(path)
    assert found.names == names
    assert found.palette == ((200, 0, 0), (0, 200, 0), (0, 0, 200))


def test_a_classifier_has_names_alone(segcli, tiny_model):
    model = tiny_model(task="classification", palette=())
    assert segcli("labels", model).out == "red\ngreen\nblue\n"
    found = json.loads(segcli("labels", model, "--json").out)
    assert found[1] == {"class_id": 1, "name": "green", "color": None}


def test_the_embedded_model_is_the_default(segcli):
    lines = segcli("labels").out.splitlines()
    assert lines[:2] == ["id,name,r,g,b", "0,sky,128,128,128"]
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("name", "code"), [("segformer-b5", 3), ("segformer-b9", 3), ("no.onnx", 3)]
)
def test_models_that_are_not_here(segcli, name, code):
    ran = segcli("labels", name)
    assert (ran.code, ran.out) == (code, "")
    assert "hint" in ran.err
