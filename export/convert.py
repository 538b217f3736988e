"""A checkpoint -> one self-describing .onnx file.

The model is built, filled, folded, traced with dynamic axes, given its ModelCard, compared with
the PyTorch reference, and only then put in place. The same checkpoint gives the same bytes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import nn

import segcli
from segcli.artifact import MIN_IMAGE_SIZE, ModelCard, Preprocessing, Rgb, Task
from segcli.errors import CheckpointError, ExportError
from segcli.export import agreement, hf_config, hf_processor, precision, timm_config, verify
from segcli.export.by_shapes import NetworkConfig
from segcli.export.checkpoints import Weights, find_weights, load_strict, read_weights
from segcli.export.fold import fold
from segcli.export.half import store_as_fp16
from segcli.export.layers import ChosenLayers, features_module
from segcli.export.mobilenet_v2 import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ForSemanticSegmentation,
)
from segcli.export.segformer import (
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)
from segcli.export.trace import OPSET, trace
from segcli.labels import Labels, dataset_palette
from segcli.onnx_file import seal

_MODULES: dict[tuple[str, Task], Any] = {
    ("segformer", "segmentation"): SegformerForSemanticSegmentation,
    ("segformer", "classification"): SegformerForImageClassification,
    ("mobilenet_v2", "segmentation"): MobileNetV2ForSemanticSegmentation,
    ("mobilenet_v2", "classification"): MobileNetV2ForImageClassification,
}


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export.

    Attributes:
        checkpoint: A Hugging Face folder or a weight file of any known kind.
        name: The model's name in its card and its records.
        source: Where the weights came from, for the card.
        revision: The hub commit, or "".
        license: Licence of the weights, as far as known.
        license_note: What it means for a user.
        task: Overrides the task that the head tells.
        variant: For weight files without a config.json.
        labels: Class names, and colours where the file has them.
        layers: Outputs of ``features``, by name; empty takes all that have no number of a block.
        size_hw: A fixed input size, or None for dynamic height and width.
        num_classes: How many classes the head must have, where that is known.
        storage: ``fp16`` halves the file; the graph still computes in fp32.
        precision: What the graph computes in.
        verify_images: Image files on which a lower precision has to agree with fp32.
        min_agreement: How far, or None for the default of ``precision``.
    """

    checkpoint: Path
    name: str
    source: str
    revision: str = ""
    license: str = "unknown"
    license_note: str = ""
    task: Task | None = None
    variant: str | None = None
    labels: Labels | None = None
    layers: tuple[str, ...] = ()
    size_hw: tuple[int, int] | None = None
    num_classes: int | None = None
    storage: Literal["fp32", "fp16"] = "fp32"
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    verify_images: tuple[str, ...] = ()
    min_agreement: float | None = None


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        card: The file's card, verification figures included.
        data: The file's bytes.
        sha256: Digest of ``data``.
        parameters: Count of the checkpoint's weights, unused ones included.
        notes: What the reader should know, one sentence each.
    """

    card: ModelCard
    data: bytes
    sha256: str
    parameters: int
    notes: tuple[str, ...]


def build_module(network: NetworkConfig, task: Task, layers: Sequence[str] = ()) -> nn.Module:
    """Returns the reference module in eval mode, with random weights."""
    if task == "features":
        return features_module(network, layers).eval()
    family = "mobilenet_v2" if isinstance(network, MobileNetV2Config) else "segformer"
    module: nn.Module = _MODULES[family, task](network).eval()
    return module


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: tensors, and what its configs say."""

    weights: Weights
    config: hf_config.ModelConfig
    preprocessing: Preprocessing
    reduce_labels: bool
    notes: tuple[str, ...]


def export_model(request: ExportRequest) -> ExportReport:
    """Returns the .onnx of a checkpoint; writes nothing.

    Raises:
        CheckpointError: The checkpoint cannot be honoured.
        ExportError: The graph does not reproduce the reference, or a lower precision does not
            agree with it.
        UsageError: A lower precision has no image to be verified with, or one cannot be read.
    """
    _check_size(request.size_hw)
    if request.precision != "fp32":
        agreement.require_images(request.verify_images, request.precision)
    checkpoint = read_checkpoint(request)
    with torch.no_grad():
        reference = reference_module(checkpoint, request.layers)
        folded = build_module(checkpoint.config.network, checkpoint.config.task, request.layers)
        folded.load_state_dict(reference.state_dict())
        folds = fold(folded)
        if request.layers:
            reference, folded = (ChosenLayers(m, request.layers) for m in (reference, folded))
        proto = full = trace(folded, request.size_hw)
        verification = verify.compare(proto, reference, request.size_hw, verify.TOLERANCE)
        if request.precision != "fp32":
            proto = precision.lower(full, request.precision, request.storage)
        elif request.storage == "fp16":
            store_as_fp16(proto)
            try:
                rounded = verify.compare(proto, reference, request.size_hw, verify.FP16_TOLERANCE)
            except ExportError as error:
                hint = "these weights do not survive rounding to fp16: leave --weights at fp32"
                raise ExportError(str(error), hint=hint) from error
            verification["fp16_max_rel_diff"] = rounded["max_rel_diff"]
    card = _card(request, checkpoint, proto, folds, verification)
    if request.precision != "fp32":
        verification["precision"] = agreement.check(
            full, proto, request.precision, card, request.verify_images, request.min_agreement
        )
    onnx.helper.set_model_props(proto, card.to_metadata())
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph of {request.name!r} is not valid ONNX: {error}") from error
    data = seal(proto.SerializeToString(deterministic=True))
    parameters = sum(p.numel() for p in reference.parameters())
    return ExportReport(card, data, hashlib.sha256(data).hexdigest(), parameters, checkpoint.notes)


def read_checkpoint(request: ExportRequest) -> Checkpoint:
    """Returns a request's checkpoint, its configs honoured.

    Raises:
        CheckpointError: It cannot be.
    """
    weights = read_weights(find_weights(request.checkpoint))
    folder = weights.path.parent
    raw_config = hf_config.read_json(folder / "config.json")
    processor = weights.processor
    if timm_config.is_timm(raw_config):
        assert raw_config is not None
        raw_config, processor = timm_config.translate(raw_config)
    config = hf_config.resolve(
        raw_config,
        weights.state,
        family=weights.family,
        task=request.task,
        variant=request.variant,
        labels=request.labels.names if request.labels else None,
        own=weights.config,
    )
    found = config.network.num_labels
    if config.class_names and request.num_classes not in (None, found):
        raise CheckpointError(
            f"{request.source} has {found} classes, expected {request.num_classes}"
        )
    if config.network.num_channels != 3:
        raise CheckpointError(
            f"config.json says num_channels {config.network.num_channels}, expected 3: "
            "segcli reads RGB pictures"
        )
    preprocessing, reduce_labels, notes = hf_processor.preprocessing(
        hf_config.read_json(folder / "preprocessor_config.json") or processor,
        weights.family,
        config.task,
    )
    if request.size_hw:
        preprocessing = _at_fixed_size(preprocessing, request.size_hw)
    return Checkpoint(
        weights, config, preprocessing, reduce_labels, (*weights.notes, *config.notes, *notes)
    )


def reference_module(checkpoint: Checkpoint, layers: Sequence[str] = ()) -> nn.Module:
    """Returns the module with the checkpoint's weights, as the papers have it."""
    weights, config = checkpoint.weights, checkpoint.config
    state = weights.state
    if config.task == "features":
        # A checkpoint with a head may give its features: the head is then left out on purpose.
        state = {k: v for k, v in state.items() if k.startswith(f"{weights.family}.")}
    module = build_module(config.network, config.task, layers)
    load_strict(module, state, weights.path)
    return module


def _card(
    request: ExportRequest,
    checkpoint: Checkpoint,
    proto: onnx.ModelProto,
    folds: tuple[str, ...],
    verification: dict[str, Any],
) -> ModelCard:
    weights, config = checkpoint.weights, checkpoint.config
    names = config.class_names
    palette: tuple[Rgb, ...] = ()
    if config.task == "segmentation":
        if config.activation == "sigmoid":
            # One logit says foreground: its map has two values.
            names = ("background", *names)
        own = request.labels.palette if request.labels else None
        palette = own if own and len(own) == len(names) else dataset_palette(names)
    return ModelCard(
        name=request.name,
        task=config.task,
        family=weights.family,
        variant=config.variant,
        class_names=names,
        palette=palette,
        preprocessing=checkpoint.preprocessing,
        activation=config.activation,
        align_corners=weights.align_corners,
        ignore_index=config.ignore_index,
        reduce_labels=checkpoint.reduce_labels,
        output_names=tuple(o.name for o in proto.graph.output),
        source=request.source,
        revision=request.revision,
        weights_sha256=weights.sha256,
        license=request.license,
        license_note=request.license_note,
        opset=OPSET,
        folds=folds,
        storage="fp16" if request.precision == "fp16" else request.storage,
        precision=request.precision,
        versions={
            "segcli": segcli.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
        },
        verification=verification,
    )


def _check_size(size_hw: tuple[int, int] | None) -> None:
    if size_hw and min(size_hw) < MIN_IMAGE_SIZE:
        raise CheckpointError(
            f"--image-size {size_hw[0]}x{size_hw[1]} is too small, expected at least "
            f"{MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}"
        )


def _at_fixed_size(record: Preprocessing, size_hw: tuple[int, int]) -> Preprocessing:
    """Returns the preprocessing that ends at a fixed input size.

    A cropping processor keeps its proportion of shorter side to crop; any other squashes.
    """
    if record.resize == "shortest_edge" and record.crop_hw:
        assert record.shortest_edge is not None
        edge = round(record.shortest_edge * max(size_hw) / min(record.crop_hw))
        return replace(record, shortest_edge=edge, crop_hw=size_hw)
    return replace(record, resize="squash", size_hw=size_hw, shortest_edge=None, crop_hw=None)
