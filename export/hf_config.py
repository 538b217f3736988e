"""``config.json`` of the two families -> our own records.

Every field is honoured, known to have no effect on inference, or refused with an error that names
it: the tables below are the whole story. Where there is no config, the variant is recognised by
tensor shapes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from segcli.artifact import Activation, Task
from segcli.errors import CheckpointError
from segcli.export.by_shapes import NetworkConfig, depth_multiplier, recognize, variant_name
from segcli.export.mobilenet_v2 import MobileNetV2Config
from segcli.export.segformer import SegformerConfig
from segcli.export.state_dict import StateDict
from segcli.labels import usual_names

# Fields that are honoured outside the network.
_LABEL_FIELDS = {"id2label", "label2id", "num_labels", "problem_type", "_num_labels"}
# Fields with no effect on what the reference computes at inference.
_NO_EFFECT = {
    *(
        "architectures",
        "model_type",
        "transformers_version",
        "_name_or_path",
        "_commit_hash",
    ),
    *(
        "torch_dtype",
        "dtype",
        "image_size",
        "initializer_range",
        "use_cache",
        "return_dict",
    ),
    *(
        "output_attentions",
        "output_hidden_states",
        "finetuning_task",
        "semantic_loss_ignore_index",
    ),
    # Dropout and drop path are the identity at inference.
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
    *("drop_path_rate", "dropout", "attention_dropout"),
    # Written by old SegFormer conversions; no version of the reference reads it.
    "downsampling_rates",
}
# Fields whose given values change nothing; any other value is another network.
_ONLY: dict[str, tuple[object, ...]] = {
    "pruned_heads": ({}, None),
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "torchscript": (False,),
    "quantization_config": (None,),
}

_ALIASES = {"num_hidden_layers": "num_encoder_blocks"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All that a checkpoint's config says, resolved.

    Attributes:
        task: By the head that the weights carry, or as asked for.
        variant: ``b0`` … ``b5`` or ``custom``; the depth multiplier for MobileNetV2.
        network: The module's own config.
        class_names: One per class, in order; empty for features.
        activation: From logits to scores.
        ignore_index: Label value that ground truth uses for void.
        notes: What the reader should know, one sentence each.
    """

    task: Task
    variant: str
    network: NetworkConfig
    class_names: tuple[str, ...]
    activation: Activation
    ignore_index: int
    notes: tuple[str, ...]


# ImageNet-21k's names take one MB.
_MAX_JSON_BYTES = 1 << 24


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, or None where there is no file.

    Raises:
        CheckpointError: It is not JSON, not an object, or too long to be a configuration.
    """
    # A device or a pipe has no end.
    if path.exists() and not (path.is_file() and path.stat().st_size <= _MAX_JSON_BYTES):
        raise CheckpointError(
            f"{str(path)!r} is not readable JSON: expected a file of at most "
            f"{_MAX_JSON_BYTES} bytes"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{str(path)!r} is a JSON {type(value).__name__}, expected an object")
    return value


def resolve(
    raw: dict[str, Any] | None,
    state: StateDict,
    *,
    family: str,
    task: Task | None = None,
    variant: str | None = None,
    labels: Sequence[str] | None = None,
    own: dict[str, Any] | None = None,
) -> ModelConfig:
    """Returns what ``config.json`` and the tensors say together.

    Args:
        raw: The parsed config.json, or None to go by tensor shapes alone.
        state: The weights, under hub names.
        family: ``segformer`` or ``mobilenet_v2``.
        task: Overrides the task that the head tells; ``features`` drops the head.
        variant: Overrides the variant that shapes tell, where there is no config.
        labels: Class names that replace the config's.
        own: What the weight file itself says, where it is of a kind that no config.json describes:
            of one beside it only the labels count then.

    Raises:
        CheckpointError: A field cannot be honoured; the message names it.
    """
    if task is None:
        task = _task_of_head(state)
    notes: list[str] = []
    if own is not None:
        if "depth_multiplier" not in own:
            own = {**own, "depth_multiplier": depth_multiplier(state, variant)}
            variant = None
        raw = {k: v for k, v in (raw or {}).items() if k in _LABEL_FIELDS} | own
    if raw is None:
        network, notes = recognize(state, family, task, variant)
        raw = {}
    else:
        if raw.get("model_type", family) != family:
            raise CheckpointError(
                f"config.json says model_type {raw['model_type']!r}, the tensors are a {family}"
            )
        if variant is not None:
            source = "has it" if own is None else "says what it is"
            raise CheckpointError(
                f"--variant is for files without a config.json; this one {source}"
            )
        network = _network(raw, family, notes)
    num_labels = _classes_of_head(state, task)
    if num_labels is not None:
        network = replace(network, num_labels=num_labels)
    names: tuple[str, ...] = ()
    if task != "features":
        assert num_labels is not None
        usual = () if own is None else usual_names(task, num_labels)
        names = _class_names(raw, num_labels, family, labels, notes, usual)
    ignore_index = raw.get("semantic_loss_ignore_index", 255)
    if type(ignore_index) is not int:
        raise CheckpointError(
            f"config.json says semantic_loss_ignore_index {ignore_index!r}, expected an integer"
        )
    return ModelConfig(
        task=task,
        variant=variant_name(network),
        network=network,
        class_names=names,
        activation=_activation(raw, task, num_labels),
        ignore_index=ignore_index,
        notes=tuple(notes),
    )


def _task_of_head(state: StateDict) -> Task:
    if any(k.startswith(("decode_head.", "segmentation_head.")) for k in state):
        return "segmentation"
    return "classification" if "classifier.weight" in state else "features"


def _classes_of_head(state: StateDict, task: Task) -> int | None:
    heads = {
        "segmentation": (
            "decode_head.classifier.weight",
            "segmentation_head.classifier.convolution.weight",
        ),
        "classification": ("classifier.weight",),
        "features": (),
    }[task]
    for name in heads:
        if name in state:
            return state[name].shape[0]
    if task == "features":
        return None
    raise CheckpointError(
        f"the checkpoint has no {task} head: {' or '.join(heads)} is missing",
        hint=f"it is a checkpoint for {_task_of_head(state)}",
    )


def _network(raw: dict[str, Any], family: str, notes: list[str]) -> NetworkConfig:
    kind = SegformerConfig if family == "segformer" else MobileNetV2Config
    honoured = {f.name: f.default for f in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if _ALIASES.get(name) in honoured:
            name = _ALIASES[name]
        if name in honoured and name not in _LABEL_FIELDS:
            values[name] = _checked(name, value, honoured[name])
        elif name in _ONLY:
            if value not in _ONLY[name]:
                raise CheckpointError(
                    f"config.json says {name} {value!r}, expected {_ONLY[name][0]!r}: "
                    "this is another network"
                )
        elif name == "layer_norm_eps":
            # See export/segformer.py: the reference never reads it.
            if value not in (1e-6, 1e-5):
                notes.append(
                    f"layer_norm_eps {value!r} has no effect, as in the reference, which uses 1e-05"
                )
        elif name not in _LABEL_FIELDS | _NO_EFFECT:
            notes.append(f"config.json says {name!r}, which is no field of {family}: not used")
    return kind(**values)


def _checked(name: str, value: object, default: object) -> Any:  # noqa: ANN401
    """Returns ``value`` with the type of ``default``, lists as tuples."""
    if isinstance(default, tuple):
        if isinstance(value, list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in value
        ):
            return tuple(value)
        expected = "a list of numbers"
    elif isinstance(default, bool):
        if isinstance(value, bool):
            return value
        expected = "true or false"
    elif isinstance(default, str):
        if isinstance(value, str):
            return value
        expected = "a string"
    else:
        if name == "image_size" or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        expected = "a number"
    raise CheckpointError(f"config.json says {name} {value!r}, expected {expected}")


def _class_names(
    raw: dict[str, Any],
    num_labels: int,
    family: str,
    labels: Sequence[str] | None,
    notes: list[str],
    usual: Sequence[str],
) -> tuple[str, ...]:
    if type(raw.get("num_labels", num_labels)) is not int or (
        raw.get("num_labels", num_labels) != num_labels
    ):
        raise CheckpointError(
            f"config.json says num_labels {raw['num_labels']!r}, the weights have {num_labels}"
        )
    where = "the labels file"
    names: Sequence[str]
    if labels is not None:
        names = labels
    elif raw.get("id2label"):
        where, names = "config.json", _id2label(raw)
    elif usual:
        notes.append(f"the checkpoint names no classes: the usual ones for {num_labels} are taken")
        return tuple(usual)
    else:
        notes.append("the checkpoint names no classes: they are called LABEL_0, LABEL_1, …")
        return tuple(f"LABEL_{i}" for i in range(num_labels))
    if family == "mobilenet_v2" and num_labels == 1001 and len(names) == 1000:
        # TF-Slim's ImageNet models have a class 0 that stands for nothing: without it each
        # answer would carry its neighbour's name.
        names = ("background", *names)
        notes.append(f"1000 names in {where} for 1001 classes: class 0 is called background")
    if len(names) != num_labels:
        raise CheckpointError(
            f"{where} names {len(names)} classes, the weights have {num_labels}",
            hint="give the right names with --labels FILE",
        )
    return tuple(str(n) for n in names)


def _id2label(raw: dict[str, Any]) -> tuple[str, ...]:
    id2label = raw["id2label"]
    if not isinstance(id2label, dict):
        raise CheckpointError(f"config.json says id2label {id2label!r}, expected an object")
    try:
        by_id = {int(k): str(v) for k, v in id2label.items()}
    except ValueError as error:
        raise CheckpointError(
            f"config.json has an id2label key that is no number: {error}"
        ) from None
    if sorted(by_id) != list(range(len(by_id))):
        raise CheckpointError(
            f"the ids of id2label in config.json are not 0..{len(by_id) - 1} without a gap"
        )
    label2id = raw.get("label2id")
    if isinstance(label2id, dict):
        for name, i in label2id.items():
            # The tutorials' scripts write the ids of label2id as strings.
            is_id = isinstance(i, int) or (isinstance(i, str) and i.isdecimal())
            there = by_id.get(int(i)) if is_id else None
            if str(name) in by_id.values() and there != str(name):
                raise CheckpointError(
                    f"config.json contradicts itself: label2id puts {name!r} at {i!r}, "
                    f"id2label has {there!r} there"
                )
    return tuple(by_id[i] for i in range(len(by_id)))


def _activation(raw: dict[str, Any], task: Task, num_labels: int | None) -> Activation:
    problem_type = raw.get("problem_type")
    known = {
        None: None,
        "single_label_classification": "softmax",
        "multi_label_classification": "sigmoid",
        "regression": "identity",
    }
    if not isinstance(problem_type, str | None) or problem_type not in known:
        raise CheckpointError(
            f"config.json says problem_type {problem_type!r}, expected one of "
            f"{', '.join(str(k) for k in known if k)}"
        )
    if task == "segmentation":
        # One channel is trained with binary cross-entropy: a foreground probability.
        return "sigmoid" if num_labels == 1 else "softmax"
    if problem_type == "regression":
        return "identity"
    # The rule of the reference's own pipeline, which comes before `single_label`.
    if problem_type == "multi_label_classification" or num_labels == 1:
        return "sigmoid"
    return "softmax"
