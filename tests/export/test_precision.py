"""fp16 and int8 graphs: what is computed in what, and the same bytes each time."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from segcli.errors import ExportError
from segcli.export.fold import fold
from segcli.export.precision import lower
from segcli.export.segformer import SegformerConfig, SegformerForSemanticSegmentation
from segcli.export.trace import trace
from segcli.session import Session


@pytest.fixture(scope="module")
def transformer(make_graph):
    """Patches, normalised tokens, fused attention and a softmax, resized."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    tokens = {"q": draw(16, 16), "k": draw(16, 16), "v": draw(16, 16), "out": draw(16, 300)}
    return make_graph(
        [
            ("Conv", ["pixel_values", "patches"], ["map"], {"strides": [4, 4]}),
            ("Shape", ["map"], ["size"], {"start": 2}),
            ("Reshape", ["map", "flat"], ["rows"], {}),
            ("Transpose", ["rows"], ["tokens"], {"perm": [0, 2, 1]}),
            ("LayerNormalization", ["tokens", "gamma", "beta"], ["normed"], {}),
            *(("MatMul", ["normed", w], [f"x{w}"], {}) for w in "qkv"),
            (
                *("MultiHeadAttention", ["xq", "xk", "xv"], ["mixed"]),
                {"domain": "com.microsoft", "num_heads": 2},
            ),
            # Two readers that stay in fp32, of a value whose type onnx does not infer.
            ("LayerNormalization", ["mixed", "gamma", "beta"], ["normed2"], {}),
            ("Softmax", ["mixed"], ["shares"], {}),
            ("Add", ["normed2", "shares"], ["sum"], {}),
            ("MatMul", ["sum", "out"], ["wide"], {}),
            ("Transpose", ["wide"], ["columns"], {"perm": [0, 2, 1]}),
            ("Concat", ["head", "size"], ["shape"], {"axis": 0}),
            ("Reshape", ["columns", "shape"], ["small"], {}),
            ("Resize", ["small", "", "twice"], ["large"], {"mode": "linear"}),
            ("Conv", ["large", "classify", "bias"], ["logits"], {}),
        ],
        {
            "patches": draw(16, 3, 4, 4),
            "flat": np.array([0, 16, -1]),
            "gamma": np.ones(16, np.float32),
            "beta": np.zeros(16, np.float32),
            **tokens,
            "head": np.array([0, 300]),
            "twice": np.array([1, 1, 2, 2], np.float32),
            "classify": draw(2, 300, 1, 1),
            "bias": np.array([3, -3], np.float32),
        },
    )


def makers(proto):
    return {name: node for node in proto.graph.node for name in node.output}


def initializers(proto):
    return {t.name: t for t in proto.graph.initializer}


def cast_to(node):
    return node.attribute[0].i if node.op_type == "Cast" else None


def saved(proto):
    return proto.SerializeToString(deterministic=True)


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_inputs_and_outputs_stay_float32(transformer, kind):
    before = saved(transformer)
    lowered = lower(transformer, kind)
    assert saved(transformer) == before
    onnx.checker.check_model(lowered, full_check=True)
    ends = [*lowered.graph.input, *lowered.graph.output]
    assert [(e.name, e.type.tensor_type.elem_type) for e in ends] == [
        ("pixel_values", TensorProto.FLOAT),
        ("logits", TensorProto.FLOAT),
    ]
    x = np.random.default_rng(1).normal(size=(2, 3, 20, 36)).astype(np.float32)
    [found] = Session(lowered.SerializeToString(), device="cpu").run(x)
    [exact] = Session(transformer.SerializeToString(), device="cpu").run(x)
    assert found.dtype == np.float32
    difference = np.abs(found - exact).max() / np.abs(exact).max()
    assert 0 < difference < {"fp16": 0.01, "int8": 0.1}[kind]
    assert len(saved(lowered)) < {"fp16": 0.75, "int8": 0.9}[kind] * len(before)
    assert (lowered.producer_name, list(lowered.metadata_props)) == ("segcli", [])


def test_fp16_leaves_norms_and_softmax_in_float32(transformer):
    half = lower(transformer, "fp16")
    made, weights = makers(half), initializers(half)
    seen = []
    for node in half.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax", "Resize"):
            seen.append(node.op_type)
            assert cast_to(made[node.input[0]]) == TensorProto.FLOAT
            for name in node.input[1:]:
                assert not name or weights[name].data_type == TensorProto.FLOAT
        elif node.op_type in ("Conv", "MatMul"):
            assert weights[node.input[1]].data_type == TensorProto.FLOAT16
            assert cast_to(made[node.input[0]]) in (None, TensorProto.FLOAT16)
        elif node.op_type == "MultiHeadAttention":
            seen.append(node.op_type)
            assert {made[name].op_type for name in node.input} == {"MatMul"}
    assert sorted(seen) == sorted(
        ["LayerNormalization"] * 2 + ["Softmax", "Resize", "MultiHeadAttention"]
    )


def test_int8_quantises_matrices_and_what_can_be_one(transformer):
    quantised = lower(transformer, "int8")
    weights = initializers(quantised)
    operators = [node.op_type for node in quantised.graph.node]
    assert operators.count("MatMulInteger") == 5
    assert operators.count("Conv") == 1
    assert "MatMul" not in operators
    assert "ConvInteger" not in operators
    for name in ("q", "k", "v", "out", "logits/matrix"):
        values = numpy_helper.to_array(weights[f"{name}_quantized"])
        assert values.dtype == np.int8
        # Each column uses its own seven bits.
        assert set(np.abs(values.astype(int)).max(0)) <= {63, 64}
    assert weights["patches"].data_type == TensorProto.FLOAT
    assert "classify" not in weights


def test_int8_rounds_the_other_weights_but_no_scale(transformer):
    quantised = lower(transformer, "int8", "fp16")
    onnx.checker.check_model(quantised, full_check=True)
    weights = initializers(quantised)
    assert "patches" not in weights
    assert weights["patches_fp16"].data_type == TensorProto.FLOAT16
    # 300 values, as many as half.py rounds.
    assert weights["out_scale"].data_type == TensorProto.FLOAT
    assert weights["out_scale"].dims == [300]
    assert len(saved(quantised)) < len(saved(lower(transformer, "int8")))
    assert saved(lower(transformer, "fp16", "fp16")) == saved(lower(transformer, "fp16"))


@pytest.mark.parametrize(
    ("shape", "attributes", "shifted"),
    [
        ((16, 16, 1, 1), {}, True),
        ((16, 16, 1, 1), {"strides": [1, 2]}, False),
        ((16, 16, 1, 1), {"pads": [0, 1, 0, 0]}, False),
        ((16, 8, 1, 1), {"group": 2}, False),
        ((16, 16, 1, 2), {}, False),
    ],
)
def test_only_a_plain_1x1_convolution_is_a_matrix(make_graph, shape, attributes, shifted):
    rng = np.random.default_rng(0)
    weights = {
        "first": rng.normal(size=(16, 3, 3, 3)).astype(np.float32),
        "second": rng.normal(size=shape).astype(np.float32),
        "gamma": np.ones(1, np.float32),
        "matrix": np.eye(1, dtype=np.float32),
    }
    graph = make_graph(
        [
            ("Conv", ["pixel_values", "first"], ["x"], {}),
            ("Conv", ["x", "second"], ["y"], attributes),
            ("Transpose", ["y"], ["z"], {"perm": [0, 2, 3, 1]}),
            ("ReduceMean", ["z"], ["mean"], {}),
            ("LayerNormalization", ["mean", "gamma"], ["zero"], {}),
            ("MatMul", ["zero", "matrix"], ["still"], {}),
            ("Add", ["y", "still"], ["logits"], {}),
        ],
        weights,
    )
    quantised = lower(graph, "int8")
    operators = [node.op_type for node in quantised.graph.node]
    assert operators.count("MatMulInteger") == 1 + shifted
    x = rng.normal(size=(2, 3, 9, 12)).astype(np.float32)
    [found] = Session(quantised.SerializeToString(), device="cpu").run(x)
    [exact] = Session(graph.SerializeToString(), device="cpu").run(x)
    assert found.shape == exact.shape
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_int8_of_convolutions_only_is_refused(affine):
    with pytest.raises(ExportError, match="int8 has nothing to quantise") as caught:
        lower(affine(np.eye(3), [0, 0, 0]), "int8")
    assert "--precision fp16" in caught.value.hint


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_the_bytes_are_the_same_in_each_process(transformer, kind, tmp_path):
    onnx.save(transformer, tmp_path / "full.onnx")
    code = (
        "import hashlib, logging, onnx, sys\nfrom segcli.export.precision import lower\n"
        "lowered = lower(onnx.load('full.onnx'), sys.argv[1])\n"
        "data = lowered.SerializeToString(deterministic=True)\n"
        "assert logging.getLogger().handlers == []\n"
        "print(hashlib.sha256(data).hexdigest())\n"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, kind],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == hashlib.sha256(saved(lower(transformer, kind))).hexdigest()
        assert done.stderr == ""
    assert [p.name for p in tmp_path.iterdir()] == ["full.onnx"]


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_a_traced_segformer_is_lowered(randomize, tiny_segformer, kind):
    """With the operators that only a traced one has, and their further outputs."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in tiny_segformer.items()}
    model = randomize(SegformerForSemanticSegmentation(SegformerConfig(**fields))).eval()
    fold(model)
    proto = trace(model)
    read = {n for node in proto.graph.node for n in node.input}
    assert any(n in read for node in proto.graph.node if node.domain for n in node.output[1:])
    x = np.random.default_rng(0).standard_normal((2, 3, 64, 96), np.float32)
    [expected] = Session(saved(proto), device="cpu").run(x)
    [found] = Session(saved(lower(proto, kind, "fp32")), device="cpu").run(x)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_a_converter_that_fails_is_an_export_error(transformer, monkeypatch, kind):
    def fail(*args, **kwargs):
        raise RuntimeError("unable to find data type")

    monkeypatch.setattr("onnxruntime.transformers.float16.convert_float_to_float16", fail)
    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", fail)
    with pytest.raises(ExportError, match="unable to find data type"):
        lower(transformer, kind, "fp32")
