import subprocess
import sys
from pathlib import Path

import pytest

from segcli.errors import ModelNotFound, RegistryError
from segcli.labels import DATASETS, dataset_labels
from segcli.registry import Figure, load_registry

ENTRY = {
    "family": "segformer",
    "variant": "b0",
    "task": "segmentation",
    "source": "me/mine",
    "license": "{name: MIT}",
}


def entry(**changes):
    """One model as YAML text; a change to None leaves the key out."""
    keys = {**ENTRY, **changes}
    return "".join(f"    {k}: {v}\n" for k, v in keys.items() if v is not None)


def registry_text(body=None, name="mine", top="schema: 1\n"):
    return f"{top}models:\n  {name}:\n{entry() if body is None else body}"


@pytest.fixture
def load(tmp_path):
    def load(content):
        path = tmp_path / "own.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_registry(path)

    return load


def test_the_built_in_names():
    assert load_registry().names() == (
        "segformer-b0-camvid",
        *(f"segformer-b{i}" for i in range(6)),
        "segformer-b0-cityscapes",
        "segformer-b0-cityscapes-512-1024",
        "segformer-b0-cityscapes-640-1280",
        "segformer-b0-cityscapes-768-768",
        *(f"segformer-b{i}-cityscapes" for i in range(1, 6)),
        *(f"mit-b{i}" for i in range(6)),
        "mobilenet-v2",
        "mobilenet-v2-1.4",
        "mobilenet-v2-0.75-160",
        "mobilenet-v2-0.35-96",
        "deeplabv3-mobilenet-v2",
    )


def test_a_registry_is_a_collection_of_specs():
    registry = load_registry()
    assert len(registry) == len(list(registry)) == 27
    assert [spec.name for spec in registry] == list(registry.names())
    assert "segformer-b2" in registry
    assert "segformer-b9" not in registry


def test_one_spec_in_full():
    spec = load_registry().get("segformer-b5")
    assert (spec.family, spec.variant, spec.task) == ("segformer", "b5", "segmentation")
    assert spec.source == "nvidia/segformer-b5-finetuned-ade-640-640"
    assert (spec.revision, spec.dataset, spec.num_labels) == ("main", "ade20k", 150)
    assert (spec.parameters, spec.size_bytes) == (84_708_694, 339_000_000)
    assert spec.license == "NVIDIA Source Code License for SegFormer"
    assert spec.license_url.startswith("https://github.com/NVlabs/SegFormer")
    assert "non-commercial" in spec.license_note
    assert (spec.embedded, spec.checkpoint) == (None, None)
    paper = "SegFormer paper (arXiv 2105.15203), table 1a"
    assert spec.figures[0] == Figure(
        "mIoU", 51.0, "ADE20K val, single scale, short side 640", paper
    )


def test_every_hub_repository_occurs_once():
    hub = [s.source for s in load_registry() if s.embedded is None]
    assert len(set(hub)) == len(hub) == 26
    assert {s.split("/")[0] for s in hub} == {"nvidia", "google"}


def test_only_the_camvid_model_is_embedded():
    (spec,) = (s for s in load_registry() if s.embedded)
    assert (spec.name, spec.embedded) == (
        "segformer-b0-camvid",
        "segformer-b0-camvid.onnx",
    )
    assert (spec.license, spec.revision) == ("MIT", "")
    assert "CamVid" in spec.license_note
    assert [f.value for f in spec.figures] == [52.65, 42.28]


def test_every_spec_is_complete():
    for spec in load_registry():
        assert spec.license
        assert spec.license_url.startswith("https://")
        assert spec.license_note
        assert spec.parameters > 1_000_000
        assert spec.figures
        for figure in spec.figures:
            assert 20 < figure.value < 100
            assert figure.protocol
            assert figure.source
        if spec.task == "segmentation":
            assert spec.dataset in DATASETS
            assert spec.num_labels == len(dataset_labels(spec.dataset).names)
        else:
            assert spec.dataset == "imagenet"
            assert spec.num_labels == (1000 if spec.family == "segformer" else 1001)


def test_the_mit_classifiers_have_their_published_parameters():
    registry = load_registry()
    millions = [round(registry.get(f"mit-b{i}").parameters / 1e6, 2) for i in range(6)]
    assert millions == [3.58, 13.66, 24.71, 44.59, 61.36, 81.96]


def test_one_label_more_costs_one_row_of_the_classifier():
    registry = load_registry()
    for i, width in enumerate([256, 256, 768, 768, 768, 768]):
        ade = registry.get(f"segformer-b{i}").parameters
        city = registry.get(f"segformer-b{i}-cityscapes").parameters
        assert ade - city == (150 - 19) * (width + 1)


@pytest.mark.export
def test_parameters_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    depths = {"b0": [2, 2, 2, 2], "b1": [2, 2, 2, 2], "b2": [3, 4, 6, 3]}
    depths |= {"b3": [3, 4, 18, 3], "b4": [3, 8, 27, 3], "b5": [3, 6, 40, 3]}
    for spec in load_registry():
        if spec.family == "segformer":
            b0, small = spec.variant == "b0", spec.variant in ("b0", "b1")
            config = hf.SegformerConfig(
                num_labels=spec.num_labels,
                depths=depths[spec.variant],
                hidden_sizes=[32, 64, 160, 256] if b0 else [64, 128, 320, 512],
                decoder_hidden_size=256 if small else 768,
            )
            kinds = (
                hf.SegformerForSemanticSegmentation,
                hf.SegformerForImageClassification,
            )
        else:
            config = hf.MobileNetV2Config(
                num_labels=spec.num_labels, depth_multiplier=float(spec.variant)
            )
            kinds = (
                hf.MobileNetV2ForSemanticSegmentation,
                hf.MobileNetV2ForImageClassification,
            )
        with torch.device("meta"):
            model = kinds[spec.task == "classification"](config)
        assert sum(p.numel() for p in model.parameters()) == spec.parameters, spec.name


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("segformer-b9", "segformer-b"),
        ("Segformer-B2", "segformer-b2,"),
        ("mobilenetv2", "mobilenet-v2,"),
        ("deeplab", "deeplabv3-mobilenet-v2"),
    ],
)
def test_an_unknown_name_lists_the_nearest_three(name, near):
    with pytest.raises(ModelNotFound) as caught:
        load_registry().get(name)
    message = str(caught.value)
    assert message.startswith(f"unknown model {name!r}; the nearest names are ")
    assert near in message
    assert message.count(",") == 2
    assert "segcli models list" in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["", "???", "x" * 1_000_000, "a\nb"])
def test_nonsense_too_lists_three_on_one_short_line(name):
    with pytest.raises(ModelNotFound) as caught:
        load_registry().get(name)
    message = str(caught.value)
    assert message.count(",") == 2
    assert len(message) < 300
    assert "\n" not in message


def test_a_file_of_ones_own_adds_at_the_end(load):
    registry = load(registry_text())
    assert registry.names() == (*load_registry().names(), "mine")
    spec = registry.get("mine")
    assert (spec.source, spec.revision, spec.license) == ("me/mine", "main", "MIT")
    assert (spec.license_url, spec.license_note, spec.dataset) == ("", "", "")
    assert spec.num_labels is spec.parameters is spec.size_bytes is None
    assert spec.figures == ()
    assert "mine" not in load_registry()


def test_a_file_of_ones_own_replaces_by_name_in_place(load):
    body = entry(variant="b2", revision="refs/pr/2", license="nvidia-segformer")
    registry = load(registry_text(body, "segformer-b2"))
    assert registry.names() == load_registry().names()
    spec = registry.get("segformer-b2")
    assert (spec.source, spec.revision) == ("me/mine", "refs/pr/2")
    assert spec.license.startswith("NVIDIA")
    assert load_registry().get("segformer-b2").source.startswith("nvidia/")


def test_own_licenses_are_known_by_key_and_leave_the_built_in_entries_alone(load):
    top = (
        "schema: 1\nlicenses:\n"
        "  nvidia-segformer: {name: Another, url: https://example.org, note: ask first}\n"
    )
    registry = load(registry_text(entry(license="nvidia-segformer"), top=top))
    spec = registry.get("mine")
    assert (spec.license, spec.license_url) == ("Another", "https://example.org")
    assert spec.license_note == "ask first"
    assert registry.get("segformer-b0").license.startswith("NVIDIA")


def test_local_checkpoints_are_relative_to_the_file(load, tmp_path, monkeypatch):
    spec = load(registry_text(entry(source=None, checkpoint="runs/best"))).get("mine")
    assert spec.checkpoint == tmp_path / "runs/best"
    assert (spec.source, spec.revision) == (str(tmp_path / "runs/best"), "")
    spec = load(registry_text(entry(source=None, checkpoint="/abs/x.pth"))).get("mine")
    assert spec.checkpoint == Path("/abs/x.pth")
    monkeypatch.setenv("HOME", "/home/me")
    spec = load(registry_text(entry(source=None, checkpoint="~/x"))).get("mine")
    assert spec.checkpoint == Path("/home/me/x")


@pytest.mark.parametrize("variant", ["1.0", '"1.0"', '"0.35"', "0.5"])
def test_depth_multipliers_with_and_without_quotes(load, variant):
    body = entry(family="mobilenet_v2", variant=variant, task="classification")
    assert load(registry_text(body)).get("mine").variant == variant.strip('"')


def test_all_optional_keys(load):
    body = entry(
        dataset="mine",
        num_labels=3,
        parameters=3_700_000,
        download_mb=14.8,
        figures="[{metric: mIoU, value: 50, protocol: mine, source: me}]",
    )
    spec = load(registry_text(body).replace("schema", "\ufeffschema")).get("mine")
    assert (spec.dataset, spec.num_labels) == ("mine", 3)
    assert (spec.parameters, spec.size_bytes) == (3_700_000, 14_800_000)
    assert spec.figures == (Figure("mIoU", 50.0, "mine", "me"),)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"family": None}, ["'family' is missing"]),
        ({"variant": None}, ["'variant' is missing"]),
        ({"task": None}, ["'task' is missing"]),
        ({"license": None}, ["'license' is missing"]),
        ({"source": None}, ["neither", "'source' and 'checkpoint'"]),
        ({"checkpoint": "x"}, ["source and checkpoint", "one of"]),
        ({"colour": "red"}, ["unknown key 'colour'", "family, variant"]),
        ({"embedded": "x.onnx"}, ["unknown key 'embedded'"]),
        ({"family": "resnet"}, ["'family'", "'resnet'", "segformer or mobilenet_v2"]),
        ({"family": "[segformer]"}, ["'family'", "['segformer']"]),
        ({"task": "detection"}, ["'task'", "'detection'", "segmentation or"]),
        ({"task": "features"}, ["'task'", "'features'"]),
        ({"variant": "b6"}, ["'variant'", "'b6'", "b0, b1"]),
        ({"variant": "0"}, ["'variant'", "found 0"]),
        ({"family": "mobilenet_v2"}, ["'variant'", "'b0'", "depth multiplier"]),
        ({"family": "mobilenet_v2", "variant": ".nan"}, ["found nan", "multiplier"]),
        ({"family": "mobilenet_v2", "variant": '"0.0"'}, ["'0.0'", "multiplier"]),
        ({"source": "mine"}, ["'source'", "'mine'", "owner/name"]),
        ({"source": "../mine"}, ["'source'", "owner/name"]),
        ({"source": "a/b/c"}, ["'source'", "owner/name"]),
        ({"source": "12"}, ["'source'", "found 12", "text, in quotes"]),
        ({"source": ""}, ["'source'", "found None"]),
        ({"source": None, "checkpoint": '" "'}, ["'checkpoint'", "' '"]),
        ({"source": None, "checkpoint": '"a\\0b"'}, ["'checkpoint'", "x00"]),
        ({"source": None, "checkpoint": "~no-such-user/x"}, ["'checkpoint'", "home"]),
        ({"source": None, "checkpoint": "x", "revision": "a"}, ["'revision'", "'a'"]),
        ({"revision": "1234567"}, ["'revision'", "1234567", "in quotes"]),
        ({"revision": '""'}, ["'revision'", "''"]),
        ({"dataset": "2012-01-01"}, ["'dataset'", "datetime.date", "text"]),
        ({"dataset": "2012-99-01"}, ["own.yaml", "month must be in 1..12"]),
        ({"license": "gpl"}, ["'license'", "'gpl'", "nvidia-segformer"]),
        ({"license": "[a]"}, ["'license'", "['a']"]),
        ({"license": "{url: x}"}, ["'license'", "'name' is missing"]),
        ({"license": "{name: x, text: y}"}, ["'license'", "unknown key 'text'"]),
        ({"license": "{name: 3}"}, ["'license'", "'name'", "found 3"]),
        ({"num_labels": "0"}, ["'num_labels'", "found 0", "whole number"]),
        ({"num_labels": "true"}, ["'num_labels'", "found True"]),
        ({"num_labels": "1.5"}, ["'num_labels'", "found 1.5"]),
        ({"num_labels": ""}, ["'num_labels'", "found None"]),
        ({"parameters": "3.7M"}, ["'parameters'", "'3.7M'"]),
        ({"parameters": f"0x{'f' * 9000}"}, ["'parameters'", "whole number"]),
        ({"parameters": "9" * 9000}, ["own.yaml", "digits"]),
        ({"download_mb": "-1"}, ["'download_mb'", "found -1", "positive"]),
        ({"download_mb": ".inf"}, ["'download_mb'", "found inf"]),
        ({"figures": "0.5"}, ["'figures'", "found 0.5", "a list"]),
        ({"figures": "[0.5]"}, ["figure 1", "found 0.5", "a mapping"]),
        (
            {"figures": "[{metric: m, value: 101, protocol: p, source: s}]"},
            ["figure 1", "'value'", "101", "per cent"],
        ),
        (
            {"figures": "[{metric: m, protocol: p, source: s}]"},
            ["figure 1", "'value' is missing"],
        ),
        ({"figures": "[{metric: m, value: 5, source: s}]"}, ["'protocol' is missing"]),
        ({"figures": "[{metric: m, val: 5}]"}, ["figure 1", "unknown key 'val'"]),
    ],
)
def test_what_is_wrong_in_an_entry_is_named(load, changes, parts):
    with pytest.raises(RegistryError) as caught:
        load(registry_text(entry(**changes)))
    message = str(caught.value)
    assert "own.yaml" in message
    assert "'mine'" in message or "own.yaml" in parts
    assert all(part in message for part in parts), message
    assert len(message) < 500


GOOD = registry_text()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["found None", "expected a mapping"]),
        ("[1]", ["found [1]", "expected a mapping"]),
        ("models: {}\n", ["'schema' is missing"]),
        ("schema: 1\n", ["'models' is missing"]),
        ("schema: 2\nmodels: {}\n", ["'schema'", "found 2", "expected 1"]),
        ("schema: 1\nmodels: []\n", ["'models'", "found []", "a mapping"]),
        ("schema: 1\nmodels:\n  x:\n", ["'x'", "found None", "a mapping"]),
        ("schema: 1\nmodels: {}\nextra: 1\n", ["unknown key 'extra'"]),
        ("schema: 1\nmodels: {}\nlicenses: 3\n", ["'licenses'", "found 3"]),
        ("schema: 1\nmodels: {}\nlicenses: {k: MIT}\n", ["license 'k'", "found 'MIT'"]),
        (registry_text(name="7"), ["key 7", "expected text"]),
        (registry_text(name="a/b"), ["name 'a/b'"]),
        (registry_text(name="-m"), ["name '-m'"]),
        (registry_text(name="x.ONNX"), ["name 'x.ONNX'"]),
        (registry_text(name='""'), ["name ''"]),
        (GOOD + "    task: segmentation\n", ["line 9", "'task' occurs twice"]),
        (GOOD + "  mine: {}\n", ["line 9", "'mine' occurs twice"]),
        (GOOD + "   task: x\n", ["line 9"]),
        (GOOD + "\tx\n", ["line 9"]),
        (GOOD + "    ? [a]\n    : b\n", ["line 9", "unhashable"]),
        (GOOD + "    x: !!map y\n", ["line 9", "mapping"]),
        (GOOD + "    x: !!python/name:os.system\n", ["line 9", "python/name"]),
        (GOOD + "---\nschema: 1\n", ["line 9"]),
        (GOOD.encode("utf-16"), ["line 1", "0xff", "UTF-8"]),
        (GOOD.encode() + b"# \xe9\n", ["line 9", "0xe9", "UTF-8"]),
        (GOOD + "# \x00\n", ["own.yaml"]),
        ("a: &a [x]\nb: *a\n", ["line 2", "an alias"]),
        ("[" * 100_000, ["line 1", "nesting"]),
        ("- " * 100_000, ["line 1", "nesting"]),
        ("#" * (1 << 20) + "\n" + GOOD, ["larger than 1 MiB"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named(load, content, parts):
    with pytest.raises(RegistryError) as caught:
        load(content)
    message = str(caught.value)
    assert all(part in message for part in ["own.yaml", *parts]), message
    assert len(message) < 500


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path, Path("a\0b")):
        with pytest.raises(RegistryError, match="cannot read registry file") as caught:
            load_registry(path)
        assert "SEGCLI_REGISTRY" in caught.value.hint


def test_names_come_without_anything_heavy():
    code = (
        "import sys; from segcli.registry import load_registry; load_registry().names()\n"
        "heavy = {'numpy', 'cv2', 'onnxruntime', 'torch', 'huggingface_hub', 'rich'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
