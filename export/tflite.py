"""A TFLite MobileNetV2, classifier or DeepLab -> hub names, dequantised.

The operators are followed from the input on, by what feeds what; names of tensors, which differ by
converter, say nothing here. Whatever is not the network of ``export/mobilenet_v2.py`` is refused
with the operator that differs. Batch norm is folded in such files, so each is an identity plus the
bias. What the activations were quantised to is dropped: the result is what the file rounds.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segcli.errors import CheckpointError
from segcli.export.by_shapes import depth_multiplier
from segcli.export.mobilenet_v2 import C_N_S, HEAD_EPS, LAST_CHANNELS, MobileNetV2Config
from segcli.export.state_dict import Reading, StateDict
from segcli.export.tflite_graph import Graph, Operator, UnlikeError, constant, read_graph
from segcli.export.tflite_input import processor_of
from segcli.export.tflite_layer import FUSED, Layer, read_layer

BLOCKS = sum(n for _, n, _ in C_N_S) - 1  # the first row's is the stem's
_EPS = MobileNetV2Config.layer_norm_eps
_REQUANTIZE = ("QUANTIZE", "DEQUANTIZE")
_POOL = ("AVERAGE_POOL_2D", "MEAN")
_RESHAPE = ("RESHAPE", "SQUEEZE", *_REQUANTIZE)
# What makes answers of logits; segcli does that itself.
_ANSWER = ("SOFTMAX", "LOGISTIC", "RESIZE_BILINEAR", "ARG_MAX", "CAST", *_RESHAPE)


def read_tflite(path: Path) -> Reading:
    """Returns the tensors of a TFLite MobileNetV2, and what its graph says of the network.

    Raises:
        CheckpointError: The file is damaged, or its graph is another network.
    """
    graph = read_graph(path)
    try:
        return _Walk(graph).reading()
    except UnlikeError as error:
        raise CheckpointError(
            f"{str(path)!r} is no MobileNetV2 that segcli knows: {error}",
            hint="known are its classifiers, and DeepLab with image pooling and no decoder",
        ) from error


class _Walk:
    """One way through a graph: ``at`` is the tensor reached, the rest what was met before it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.at = graph.inputs[0] if graph.inputs else -1
        self.state: StateDict = {}
        # What every layer of the backbone so far leaves possible.
        self.activations = frozenset({"relu", "relu6"})
        self.paddings = frozenset({True, False})
        self.plan: list[tuple[int, int]] = []  # stride and dilation of each block
        self.users: dict[int, list[Operator]] = defaultdict(list)
        for op in graph.operators:
            # The other inputs of most are constants.
            for tensor in set(op.inputs if op.kind in ("ADD", "CONCATENATION") else op.inputs[:1]):
                self.users[tensor].append(op)

    def reading(self) -> Reading:
        graph = self.graph
        if len(graph.inputs) != 1 or len(graph.outputs) != 1:
            raise UnlikeError(f"{len(graph.inputs)} inputs, {len(graph.outputs)} outputs, not 1, 1")
        self._skip(_REQUANTIZE)
        config = self._backbone()
        is_segmenter = any(op.kind in _POOL for op in self.users[self.at])
        config |= self._network()
        multiplier = config["depth_multiplier"]
        if is_segmenter:
            passed = self._deeplab()
            self._put_unused_last(MobileNetV2Config(depth_multiplier=multiplier))
        else:
            passed = self._classifier()
            last = self.state["mobilenet_v2.conv_1x1.convolution.weight"]
            config["finegrained_output"] = len(last) == LAST_CHANNELS
        if "LOGISTIC" in [op.kind for op in passed]:
            config["problem_type"] = "multi_label_classification"
        processor, notes = processor_of(graph, is_segmenter=is_segmenter)
        corners = [op.options["AlignCorners"] for op in passed if op.kind == "RESIZE_BILINEAR"]
        return Reading(self.state, tuple(notes), config, processor, any(corners))

    def _backbone(self) -> dict[str, Any]:
        stem = "mobilenet_v2.conv_stem"
        self._conv(f"{stem}.first_conv", "CONV_2D", stride=2)
        has_expansion = [op.kind for op in self.users[self.at]] == ["CONV_2D"]
        if has_expansion:
            self._conv(f"{stem}.expand_1x1", "CONV_2D")
        self._conv(f"{stem}.conv_3x3", "DEPTHWISE_CONV_2D")
        self._conv(f"{stem}.reduce_1x1", "CONV_2D", activation=None)
        for i in range(BLOCKS):
            name, start = f"mobilenet_v2.layer.{i}", self.at
            expand = self._conv(f"{name}.expand_1x1", "CONV_2D")
            filtering = self._conv(f"{name}.conv_3x3", "DEPTHWISE_CONV_2D", stride=None)
            reduce = self._conv(f"{name}.reduce_1x1", "CONV_2D", activation=None)
            self.plan.append((filtering.stride, filtering.dilation))
            if filtering.stride == 1 and len(reduce.weight) == expand.weight.shape[1]:
                add = self._user("ADD")
                if sorted(add.inputs) != sorted((start, self.at)) or add.options[FUSED]:
                    raise UnlikeError(f"{name} adds something else than its input")
                self.at = add.outputs[0]
        return {"first_layer_is_expansion": not has_expansion}

    def _network(self) -> dict[str, Any]:
        stride = 2 * math.prod(stride for stride, _ in self.plan)
        known = stride in (8, 16, 32)
        if not known or MobileNetV2Config(output_stride=stride).block_strides() != self.plan:
            raise UnlikeError(f"its blocks have strides and dilations {self.plan}")
        return {
            "depth_multiplier": depth_multiplier(self.state),
            "output_stride": stride,
            "hidden_act": "relu6" if "relu6" in self.activations else "relu",
            "tf_padding": True in self.paddings,
        }

    def _classifier(self) -> list[Operator]:
        self._conv("mobilenet_v2.conv_1x1", "CONV_2D")
        self._pool()
        self._skip(_RESHAPE)
        self._conv("classifier", "CONV_2D", "FULLY_CONNECTED", activation=None, eps=None)
        return self._answer()

    def _deeplab(self) -> list[Operator]:
        features, head = self.at, "segmentation_head"
        self._conv(f"{head}.conv_aspp", "CONV_2D", activation="relu", eps=HEAD_EPS)
        self._skip(_REQUANTIZE)
        aspp, self.at = self.at, features
        self._pool()
        self._conv(f"{head}.conv_pool", "CONV_2D", activation="relu", eps=HEAD_EPS)
        # One cell, so whatever its convention this is a broadcast.
        self._skip(("RESIZE_BILINEAR", *_REQUANTIZE))
        concat = self._user("CONCATENATION")
        if concat.inputs != (self.at, aspp) or concat.options[FUSED]:
            raise UnlikeError("its head does not join image pooling and the 1x1 branch, in order")
        self.at = concat.outputs[0]
        self._conv(f"{head}.conv_projection", "CONV_2D", activation="relu", eps=HEAD_EPS)
        self._conv(f"{head}.classifier.convolution", "CONV_2D", activation=None, eps=None)
        return self._answer()

    def _answer(self) -> list[Operator]:
        passed = self._skip(_ANSWER)
        if self.graph.outputs != (self.at,):
            raise UnlikeError(f"after the classifier comes {self._seen()}, expected the output")
        return passed

    def _pool(self) -> None:
        op = self._user(*_POOL)
        shape = self.graph.tensors[self.at].shape
        if op.kind == "MEAN":
            axes = constant(self.graph, op.inputs[1] if len(op.inputs) > 1 else -1)
            is_whole = axes is not None and sorted(axes[1].ravel().tolist()) == [1, 2]
        else:
            is_whole = shape[1:3] == (op.options["FilterHeight"], op.options["FilterWidth"])
        pooled = self.graph.tensors[op.outputs[0]].shape
        if len(shape) != 4 or not is_whole or math.prod(pooled[1:]) != shape[3]:
            raise UnlikeError(f"{op.kind} does not pool the whole map")
        self.at = op.outputs[0]

    def _conv(
        self,
        name: str,
        *kinds: str,
        stride: int | None = 1,
        activation: str | None = "",
        eps: float | None = _EPS,
    ) -> Layer:
        """Takes the one convolution that reads ``at`` as layer ``name``, and goes past it.

        Args:
            name: Under which its tensors go.
            kinds: What it may be.
            stride: What it must be, at dilation 1; None for a block's own.
            activation: What must follow, None for nothing, "" for the backbone's one.
            eps: Of the batch norm, None for a bias in its place.
        """
        pad = next((op for op in self.users[self.at] if op.kind == "PAD" and op.outputs), None)
        if pad:
            self.at = pad.outputs[0]
        op = self._user(*kinds)
        try:
            layer = read_layer(self.graph, op, pad)
        except UnlikeError as error:
            raise UnlikeError(f"{name} {error}") from error
        if stride not in (None, layer.stride) or (stride and layer.dilation != 1):
            raise UnlikeError(f"{name} has stride {layer.stride}, dilation {layer.dilation}")
        if activation == "":
            self.activations &= layer.activations
            self.paddings &= layer.paddings
            if not self.activations or not self.paddings:
                raise UnlikeError(f"{name} has another activation or padding than those before it")
        elif (activation is None and op.options[FUSED]) or (
            activation and activation not in layer.activations
        ):
            raise UnlikeError(f"{name} has another activation than {activation or 'none'}")
        if eps is None and name == "classifier":
            self._put(name, layer.weight.flatten(1), layer.bias, eps)
        else:
            self._put(name, layer.weight, layer.bias, eps)
        self.at = op.outputs[0]
        return layer

    def _put(self, name: str, weight: Tensor, bias: Tensor, eps: float | None) -> None:
        if eps is None:
            self.state |= {f"{name}.weight": weight, f"{name}.bias": bias}
            return
        ones = torch.ones_like(bias)
        self.state |= {
            f"{name}.convolution.weight": weight,
            f"{name}.normalization.weight": ones,
            f"{name}.normalization.bias": bias,
            f"{name}.normalization.running_mean": torch.zeros_like(bias),
            # With its eps this is one: an identity.
            f"{name}.normalization.running_var": ones * (1 - eps),
        }

    def _put_unused_last(self, config: MobileNetV2Config) -> None:
        # A segmenter's graph lacks what the hub's checkpoints have and never compute.
        is_scaled = config.depth_multiplier >= 1
        rows = config.scale_channels(LAST_CHANNELS) if is_scaled else LAST_CHANNELS
        empty = torch.zeros(rows, config.scale_channels(C_N_S[-1][0]), 1, 1)
        self._put("mobilenet_v2.conv_1x1", empty, torch.zeros(rows), _EPS)

    def _skip(self, kinds: Sequence[str]) -> list[Operator]:
        """Goes past operators of some kinds, as long as nothing else reads ``at``."""
        passed: list[Operator] = []
        while len(users := self.users[self.at]) == 1 and users[0].kind in kinds:
            if len(passed) > len(self.graph.operators):
                raise UnlikeError("its operators go round in a circle")
            passed += users
            self.at = self._user(*kinds).outputs[0]
        return passed

    def _user(self, *kinds: str) -> Operator:
        """Returns the one operator of some kinds that reads ``at``."""
        found = [op for op in self.users[self.at] if op.kind in kinds]
        if len(found) != 1 or len(found[0].outputs) != 1:
            done = next(reversed(self.state), "the input").rpartition(".")[0] or "the input"
            raise UnlikeError(f"after {done} comes {self._seen()}, expected {' or '.join(kinds)}")
        return found[0]

    def _seen(self) -> str:
        return ", ".join(op.kind for op in self.users[self.at]) or "nothing"
