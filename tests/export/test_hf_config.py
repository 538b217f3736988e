"""Every field of a config.json is honoured, has no effect, or is refused by name."""

import dataclasses
import json
import re

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from segcli.errors import CheckpointError
from segcli.export.hf_config import read_json, resolve
from segcli.export.mobilenet_v2 import (
    MobileNetV2Config,
    MobileNetV2Features,
    MobileNetV2ForImageClassification,
    MobileNetV2ForSemanticSegmentation,
)
from segcli.export.segformer import (
    VARIANTS,
    SegformerConfig,
    SegformerFeatures,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

pytestmark = pytest.mark.export

MODULES = {
    ("segformer", "segmentation"): (SegformerForSemanticSegmentation, SegformerConfig),
    ("segformer", "classification"): (SegformerForImageClassification, SegformerConfig),
    ("segformer", "features"): (SegformerFeatures, SegformerConfig),
    ("mobilenet_v2", "segmentation"): (MobileNetV2ForSemanticSegmentation, MobileNetV2Config),
    ("mobilenet_v2", "classification"): (MobileNetV2ForImageClassification, MobileNetV2Config),
    ("mobilenet_v2", "features"): (MobileNetV2Features, MobileNetV2Config),
}
THEIRS = {
    "segformer": transformers.SegformerConfig,
    "mobilenet_v2": transformers.MobileNetV2Config,
}


def shapes(family, task, config=None, **values):
    """A state dict without data: only names and shapes matter here."""
    module, kind = MODULES[family, task]
    with torch.device("meta"):
        return module(config or kind(**values)).state_dict()


def raw_config(family, num_labels=7, **changes):
    config = THEIRS[family](num_labels=num_labels)
    return json.loads(config.to_json_string(use_diff=False)) | changes


def resolved(family, task="classification", num_labels=7, **changes):
    raw = raw_config(family, num_labels, **changes)
    return resolve(raw, shapes(family, task, num_labels=num_labels), family=family)


# A value other than the default for every field that transformers' own config classes write.
COMMON_NO_EFFECT = {
    "transformers_version": "4.12.0.dev0",
    "architectures": ["AnyModel"],
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "dtype": "float16",
    "_name_or_path": "/somewhere/else",
    "initializer_range": 0.5,
    "classifier_dropout_prob": 0.9,
}
COMMON_REFUSED = {
    "model_type": "bert",
    "chunk_size_feed_forward": 2,
    "is_encoder_decoder": True,
    "problem_type": "guessing",
    "id2label": {"1": "no class 0"},
    "label2id": {"LABEL_0": 1},
}
# Honoured outside the network; its own test is below.
COMMON_ELSEWHERE = {"semantic_loss_ignore_index"}
FIELDS = {
    "segformer": {
        "honoured": {
            "num_channels": 4,
            "num_encoder_blocks": 3,
            "depths": [3, 3, 3, 3],
            "sr_ratios": [4, 4, 2, 1],
            "hidden_sizes": [64, 128, 320, 512],
            "patch_sizes": [5, 3, 3, 3],
            "strides": [2, 2, 2, 2],
            "num_attention_heads": [2, 2, 5, 8],
            "mlp_ratios": [4, 4, 4, 2.5],
            "hidden_act": "relu",
            "decoder_hidden_size": 768,
            "reshape_last_stage": False,
        },
        "no_effect": {
            **COMMON_NO_EFFECT,
            "hidden_dropout_prob": 0.5,
            "attention_probs_dropout_prob": 0.5,
            "drop_path_rate": 0.9,
            "layer_norm_eps": 1e-5,
        },
        "refused": COMMON_REFUSED,
    },
    "mobilenet_v2": {
        "honoured": {
            "num_channels": 4,
            "depth_multiplier": 1.4,
            "depth_divisible_by": 16,
            "min_depth": 16,
            "expand_ratio": 4.5,
            "output_stride": 16,
            "first_layer_is_expansion": False,
            "finegrained_output": False,
            "hidden_act": "relu",
            "tf_padding": False,
            "layer_norm_eps": 1e-5,
        },
        "no_effect": {**COMMON_NO_EFFECT, "image_size": 96},
        "refused": COMMON_REFUSED,
    },
}
FAMILIES = pytest.mark.parametrize("family", FIELDS)
# With three stages the lists must have three entries.
STAGES = {
    name: [1, 1, 1]
    for name in (
        *("depths", "sr_ratios", "hidden_sizes", "patch_sizes", "strides"),
        *("num_attention_heads", "mlp_ratios"),
    )
}


def cases(kind):
    return [
        pytest.param(family, name, value, id=f"{family}-{name}")
        for family, kinds in FIELDS.items()
        for name, value in kinds[kind].items()
    ]


@FAMILIES
def test_every_field_that_transformers_writes_is_accounted_for(family):
    written = THEIRS[family]().to_dict().keys()
    kinds = FIELDS[family]
    ours = [*kinds["honoured"], *kinds["no_effect"], *kinds["refused"], *COMMON_ELSEWHERE]
    assert sorted(ours) == sorted(written)


@FAMILIES
def test_what_transformers_writes_needs_no_note(family):
    assert resolved(family).notes == ()
    # And as a file on disk, which leaves out what is at its default.
    raw = json.loads(THEIRS[family](num_labels=7).to_json_string(use_diff=True))
    found = resolve(raw, shapes(family, "classification", num_labels=7), family=family)
    assert found == resolved(family)


@pytest.mark.parametrize(("family", "name", "value"), cases("honoured"))
def test_a_field_with_an_effect_is_honoured(family, name, value):
    more = STAGES if name == "num_encoder_blocks" else {}
    found = resolved(family, **{**more, name: value})
    expected = tuple(value) if isinstance(value, list) else value
    assert getattr(found.network, name) == expected
    assert getattr(resolved(family).network, name) != expected
    assert found.notes == ()


@FAMILIES
def test_every_field_of_our_network_is_honoured(family):
    kind = MODULES[family, "features"][1]
    fields = {f.name for f in dataclasses.fields(kind)} - {"num_labels", "image_size"}
    assert fields == FIELDS[family]["honoured"].keys()


@pytest.mark.parametrize(("family", "name", "value"), cases("no_effect"))
def test_a_field_without_an_effect_changes_nothing(family, name, value):
    found, base = resolved(family, **{name: value}), resolved(family)
    if name == "image_size":
        assert found.network.image_size == value
        found = dataclasses.replace(found, network=base.network)
    assert found == base


@pytest.mark.parametrize(("family", "name", "value"), cases("refused"))
def test_a_field_that_means_another_network_is_refused_by_name(family, name, value):
    with pytest.raises(CheckpointError, match=name):
        resolved(family, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pruned_heads", {"1": [0]}),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("torchscript", True),
        ("quantization_config", {"load_in_4bit": True}),
    ],
)
@FAMILIES
def test_fields_of_transformers_4_that_mean_another_network_are_refused(family, name, value):
    with pytest.raises(CheckpointError, match=f"{name} .* this is another network"):
        resolved(family, **{name: value})


OLD = {
    "_commit_hash": "abc",
    "torch_dtype": "float32",
    "use_cache": True,
    "finetuning_task": None,
    "pruned_heads": {},
    "is_decoder": False,
    "add_cross_attention": False,
    "torchscript": False,
    "image_size": 224,
}


@FAMILIES
def test_harmless_fields_of_transformers_4_need_no_note(family):
    found = resolved(family, **OLD, dropout=0.1)
    assert found.notes == ()


def test_what_nvidia_s_files_have_needs_no_note():
    found = resolved(
        "segformer", downsampling_rates=[1, 4, 8, 16], num_hidden_layers=4, reshape_last_stage=True
    )
    assert found.notes == ()


def test_the_other_name_of_num_encoder_blocks():
    raw = raw_config("segformer", **STAGES)
    del raw["num_encoder_blocks"]
    raw["num_hidden_layers"] = 3
    state = shapes("segformer", "classification", num_labels=7)
    assert resolve(raw, state, family="segformer").network.num_encoder_blocks == 3
    raw = raw_config("mobilenet_v2", num_hidden_layers=3)
    state = shapes("mobilenet_v2", "classification", num_labels=7)
    assert resolve(raw, state, family="mobilenet_v2").notes == (
        "config.json says 'num_hidden_layers', which is no field of mobilenet_v2: not used",
    )


@FAMILIES
def test_an_unknown_field_is_noted(family):
    assert resolved(family, num_wheels=4).notes == (
        f"config.json says 'num_wheels', which is no field of {family}: not used",
    )


def test_layer_norm_eps():
    assert resolved("segformer", layer_norm_eps=0.1).notes == (
        "layer_norm_eps 0.1 has no effect, as in the reference, which uses 1e-05",
    )
    for value in (1e-6, 1e-5):
        assert resolved("segformer", layer_norm_eps=value).notes == ()
    assert resolved("mobilenet_v2", layer_norm_eps=0.1).network.layer_norm_eps == 0.1


BAD_TYPES = {
    "segformer": {
        "num_channels": ["3", None, True, 3.5, [3], 0],
        "depths": [2, "2222", None, [2, 2, 2, "2"], [2, 2, 2, True], [2, 2], [2, 2, 2, 0.5], {}],
        "mlp_ratios": [4, [4, 4, 4, None], [4, 4, 4, 0]],
        "hidden_act": [None, 3, ["gelu"], "swish"],
        "reshape_last_stage": [None, 1, "true"],
        "decoder_hidden_size": [None, -1, 2.5],
        "num_encoder_blocks": [None, 5, "4", 4.0],
    },
    "mobilenet_v2": {
        "num_channels": ["3", None, True, 3.5, [3], 0],
        "depth_multiplier": [None, "1.0", 0, [1.0], float("nan")],
        "tf_padding": [None, 1, "true"],
        "hidden_act": [None, 3, ["relu6"], "swish"],
        "output_stride": [None, 4, "8", 8.0],
        "layer_norm_eps": [None, 0, "0.001"],
    },
}


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [(f, n, v) for f, names in BAD_TYPES.items() for n, values in names.items() for v in values],
)
def test_a_value_of_the_wrong_kind_is_named(family, name, value):
    with pytest.raises(CheckpointError, match=name):
        resolved(family, **{name: value})


@pytest.mark.parametrize("value", [255, 0, -100])
@FAMILIES
def test_the_ignore_index(family, value):
    found = resolved(family, "segmentation", semantic_loss_ignore_index=value)
    assert found.ignore_index == value


@pytest.mark.parametrize("value", ["255", None, 2.5, True, [255]])
def test_a_bad_ignore_index_is_refused(value):
    with pytest.raises(CheckpointError, match="semantic_loss_ignore_index"):
        resolved("segformer", "segmentation", semantic_loss_ignore_index=value)


def test_the_ignore_index_is_255_where_the_file_is_silent():
    raw = raw_config("segformer")
    del raw["semantic_loss_ignore_index"]
    state = shapes("segformer", "segmentation", num_labels=7)
    assert resolve(raw, state, family="segformer").ignore_index == 255


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "expected"),
    [
        (None, 7, "softmax"),
        (None, 1, "sigmoid"),
        ("single_label_classification", 7, "softmax"),
        ("single_label_classification", 1, "sigmoid"),
        ("multi_label_classification", 7, "sigmoid"),
        ("multi_label_classification", 1, "sigmoid"),
        ("regression", 7, "identity"),
        ("regression", 1, "identity"),
    ],
)
@FAMILIES
def test_the_activation_of_a_classifier(family, problem_type, num_labels, expected):
    found = resolved(family, num_labels=num_labels, problem_type=problem_type)
    assert found.activation == expected
    segmenter = resolved(family, "segmentation", num_labels=num_labels, problem_type=problem_type)
    assert segmenter.activation == ("sigmoid" if num_labels == 1 else "softmax")


@pytest.mark.parametrize("value", ["guessing", 3, [], {}, ["regression"], True])
def test_a_bad_problem_type_is_refused(value):
    with pytest.raises(CheckpointError, match="problem_type"):
        resolved("segformer", problem_type=value)


def test_class_names_are_in_id_order():
    names = {str(i): f"class {i}" for i in (3, 0, 6, 1, 5, 2, 4)}
    found = resolved("segformer", id2label=names, label2id={})
    assert found.class_names == tuple(f"class {i}" for i in range(7))


@pytest.mark.parametrize(
    ("id2label", "label2id", "expected"),
    [
        ({"0": "a", "2": "b"}, {}, r"not 0\.\.1 without a gap"),
        ({"1": "a", "2": "b"}, {}, r"not 0\.\.1 without a gap"),
        ({"-1": "a", "0": "b"}, {}, "without a gap"),
        ({"zero": "a"}, {}, "id2label key that is no number"),
        (["a", "b"], {}, "says id2label .* expected an object"),
        ("a", {}, "expected an object"),
        ({"0": "a", "1": "b"}, {}, "names 2 classes, the weights have 7"),
        ({str(i): f"n{i}" for i in range(8)}, {}, "names 8 classes, the weights have 7"),
        ({str(i): f"n{i}" for i in range(7)}, {"n3": 4}, "contradicts itself: label2id puts 'n3'"),
        ({str(i): f"n{i}" for i in range(7)}, {"n3": "4"}, "contradicts itself"),
        ({str(i): f"n{i}" for i in range(7)}, {"n3": [3]}, "contradicts itself"),
        ({str(i): f"n{i}" for i in range(7)}, {"n3": None}, "contradicts itself"),
    ],
)
@FAMILIES
def test_class_names_that_cannot_be_are_refused(family, id2label, label2id, expected):
    with pytest.raises(CheckpointError, match=expected):
        resolved(family, id2label=id2label, label2id=label2id)


@pytest.mark.parametrize(
    "label2id",
    [
        {f"n{i}": i for i in range(7)},
        {f"n{i}": str(i) for i in range(7)},  # as the tutorials' scripts write it
        {"another name": 3},
        None,
        {},
    ],
    ids=str,
)
def test_a_label2id_that_agrees_is_no_fault(label2id):
    names = {str(i): f"n{i}" for i in range(7)}
    found = resolved("segformer", id2label=names, label2id=label2id)
    assert found.class_names == tuple(names.values())
    assert found.notes == ()


def test_a_name_may_occur_twice():
    # ImageNet has two cranes: label2id can hold one of them.
    names = {**{str(i): f"n{i}" for i in range(7)}, "2": "crane", "5": "crane"}
    assert resolved("segformer", id2label=names, label2id={"crane": 5}).class_names[2] == "crane"


@pytest.mark.parametrize("id2label", [None, {}])
def test_a_checkpoint_without_names(id2label):
    found = resolved("segformer", id2label=id2label)
    assert found.class_names == tuple(f"LABEL_{i}" for i in range(7))
    assert found.notes == ("the checkpoint names no classes: they are called LABEL_0, LABEL_1, …",)


@pytest.mark.parametrize("value", [8, "7", None, 7.0, True])
@pytest.mark.parametrize("id2label", [None, {str(i): f"n{i}" for i in range(7)}])
def test_num_labels_must_be_that_of_the_weights(value, id2label):
    with pytest.raises(CheckpointError, match=re.escape(f"says num_labels {value!r}")):
        resolve(
            raw_config("segformer") | {"id2label": id2label, "num_labels": value},
            shapes("segformer", "classification", num_labels=7),
            family="segformer",
        )


def test_a_thousand_names_for_a_thousand_and_one_classes():
    names = {str(i): f"n{i}" for i in range(1000)}
    raw = raw_config("mobilenet_v2") | {"id2label": names, "label2id": {}}
    state = shapes("mobilenet_v2", "classification", num_labels=1001)
    found = resolve(raw, state, family="mobilenet_v2")
    assert found.class_names[:3] == ("background", "n0", "n1")
    assert len(found.class_names) == 1001
    assert found.network.num_labels == 1001
    assert found.notes == (
        "1000 names in config.json for 1001 classes: class 0 is called background",
    )
    # The same with names of one's own; and with all 1001 nothing is added.
    found = resolve(raw, state, family="mobilenet_v2", labels=[f"m{i}" for i in range(1000)])
    assert found.class_names[:2] == ("background", "m0")
    full = [f"m{i}" for i in range(1001)]
    assert resolve(raw, state, family="mobilenet_v2", labels=full).class_names == tuple(full)
    # SegFormer's classifiers have 1000 outputs, none of which stands for nothing.
    state = shapes("segformer", "classification", num_labels=1001)
    with pytest.raises(CheckpointError, match="names 1000 classes, the weights have 1001"):
        resolve(raw | {"model_type": "segformer"}, state, family="segformer")


def test_labels_replace_the_names_of_the_config():
    state = shapes("segformer", "segmentation", num_labels=7)
    raw = raw_config("segformer")
    found = resolve(raw, state, family="segformer", labels=list("abcdefg"))
    assert found.class_names == tuple("abcdefg")
    with pytest.raises(CheckpointError, match="labels file names 2 classes, the weights have 7"):
        resolve(raw, state, family="segformer", labels=["a", "b"])


@pytest.mark.parametrize(("family", "task"), MODULES)
def test_the_head_tells_the_task(family, task):
    found = resolve(raw_config(family), shapes(family, task, num_labels=7), family=family)
    assert found.task == task
    assert len(found.class_names) == (0 if task == "features" else 7)


@FAMILIES
def test_a_head_may_be_left_out_but_not_made_up(family):
    for task in ("segmentation", "classification"):
        state = shapes(family, task, num_labels=7)
        assert resolve(raw_config(family), state, family=family, task="features").task == "features"
    state = shapes(family, "classification", num_labels=7)
    with pytest.raises(CheckpointError, match="no segmentation head") as caught:
        resolve(raw_config(family), state, family=family, task="segmentation")
    assert caught.value.hint == "it is a checkpoint for classification"


@pytest.mark.parametrize("task", ["segmentation", "classification", "features"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_segformers_are_recognised_by_their_shapes(variant, task):
    config = dataclasses.replace(VARIANTS[variant], num_labels=7)
    found = resolve(None, shapes("segformer", task, config), family="segformer")
    assert found.variant == variant
    assert dataclasses.replace(found.network, num_labels=7) == config
    assert found.notes[0] == f"no config.json: recognised as SegFormer-{variant.upper()}"
    # The config of the same network says the same variant.
    raw = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in dataclasses.asdict(config).items()
        if k != "num_labels"
    }
    assert resolve(raw, shapes("segformer", task, config), family="segformer").variant == variant


@pytest.mark.parametrize("task", ["segmentation", "classification", "features"])
@pytest.mark.parametrize(
    ("multiplier", "name"),
    [(0.35, "0.35"), (0.5, "0.5"), (0.75, "0.75"), (1.0, "1.0"), (1.3, "1.3"), (1.4, "1.4")],
)
def test_mobilenets_are_recognised_by_their_shapes(multiplier, name, task):
    config = MobileNetV2Config(depth_multiplier=multiplier, num_labels=7)
    found = resolve(None, shapes("mobilenet_v2", task, config), family="mobilenet_v2")
    assert found.variant == name
    assert found.network.depth_multiplier == multiplier
    assert found.network.output_stride == (8 if task == "segmentation" else 32)
    note = f"no config.json: recognised as MobileNetV2 {multiplier:g} with TensorFlow's padding"
    assert found.notes[0].removesuffix(", output stride 8 assumed") == note


def test_another_network_needs_its_config():
    config = SegformerConfig(depths=(1, 1, 1, 1))
    state = shapes("segformer", "features", config)
    with pytest.raises(CheckpointError, match=r"depths \[1, 1, 1, 1\]") as caught:
        resolve(None, state, family="segformer")
    assert "--variant" in caught.value.hint
    state = shapes("mobilenet_v2", "features", MobileNetV2Config(depth_multiplier=0.6))
    with pytest.raises(CheckpointError, match="no depth multiplier"):
        resolve(None, state, family="mobilenet_v2")
    raw = {"depths": [1, 1, 1, 1]}
    state = shapes("segformer", "features", config)
    assert resolve(raw, state, family="segformer").variant == "custom"


def test_a_variant_may_be_named():
    state = shapes("segformer", "features", SegformerConfig(depths=(1, 1, 1, 1)))
    found = resolve(None, state, family="segformer", variant="b3")
    assert found.variant == "b3"
    state = shapes("mobilenet_v2", "features")
    found = resolve(None, state, family="mobilenet_v2", variant="0.6")
    assert found.network.depth_multiplier == 0.6


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("segformer", "b6"),
        ("segformer", "B0"),
        ("segformer", "1.0"),
        ("mobilenet_v2", "b0"),
        ("mobilenet_v2", "nan"),
        ("mobilenet_v2", "-1"),
    ],
)
def test_a_variant_that_is_none_is_refused(family, variant):
    with pytest.raises(CheckpointError, match=r"variant|depth_multiplier"):
        resolve(None, shapes(family, "features"), family=family, variant=variant)


@FAMILIES
def test_a_variant_is_for_files_without_a_config(family):
    with pytest.raises(CheckpointError, match="--variant is for files without"):
        resolve(raw_config(family), shapes(family, "features"), family=family, variant="b0")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b"[" * 200_000, "not readable JSON"),
        (b"[1]", "is a JSON list, expected an object"),
        (b"null", "is a JSON NoneType, expected an object"),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_a_config_that_is_no_object_is_refused(tmp_path, content, expected):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=expected):
        read_json(path)


def test_a_config_is_read_or_missing(tmp_path):
    path = tmp_path / "config.json"
    assert read_json(path) is None
    path.write_text('{"depths": [1]}')
    assert read_json(path) == {"depths": [1]}
    with pytest.raises(CheckpointError, match="not readable"):
        read_json(tmp_path)


def test_a_config_without_end_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="at most 16777216 bytes"):
        read_json(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="at most 16777216 bytes"):
        read_json(path)
