"""Metadata as onnx itself reads it; no external data gets through; no bytes lead to a crash."""

import contextlib
import hashlib

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from segcli.errors import ArtifactError, ModelNotFound
from segcli.onnx_file import check_seal, parse_metadata, read_card, read_metadata, seal


def external(name="w"):
    """A tensor whose bytes lie in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../../etc/passwd"), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def internal(name="w"):
    return numpy_helper.from_array(np.ones(2, np.float32), name)


def sparse(tensor):
    result = onnx.SparseTensorProto(dims=[4])
    result.values.CopyFrom(tensor)
    result.indices.CopyFrom(numpy_helper.from_array(np.array([0, 2]), "i"))
    return result


def model(nodes=(), initializers=(), **metadata):
    graph = helper.make_graph(
        [*nodes, helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        list(initializers),
    )
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    helper.set_model_props(result, metadata)
    return result


def subgraph(tensor, depth=1):
    """An If whose branch holds the tensor, ``depth`` graphs deep."""
    graph = helper.make_graph([], "branch", [], [], [tensor])
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["z"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([node], "branch", [], [])
    return node


def in_sparse_initializer(tensor):
    result = model()
    result.graph.sparse_initializer.append(sparse(tensor))
    return result


def in_function(tensor):
    result = model()
    node = helper.make_node("Constant", [], ["k"], value=tensor)
    result.functions.append(
        helper.make_function("own", "F", [], ["k"], [node], [helper.make_opsetid("", 20)])
    )
    return result


def in_training_info(tensor):
    result = model()
    result.training_info.add().algorithm.initializer.append(tensor)
    return result


def in_attribute(**kinds):
    """A Constant whose attribute has the tensor in one of the fields that can hold one."""

    def make(tensor):
        node = helper.make_node("Constant", [], ["k"])
        attribute = node.attribute.add(name="value")
        for name, wrap in kinds.items():
            if name in ("t", "sparse_tensor"):
                getattr(attribute, name).CopyFrom(wrap(tensor))
            else:
                getattr(attribute, name).append(wrap(tensor))
        return model([node])

    return make


PLACES = {
    "initializer": lambda t: model(initializers=[internal("v"), t]),
    "sparse initializer": in_sparse_initializer,
    "constant": lambda t: model([helper.make_node("Constant", [], ["k"], value=t)]),
    "tensors of an attribute": in_attribute(tensors=lambda t: t),
    "sparse constant": in_attribute(sparse_tensor=sparse),
    "sparse tensors of an attribute": in_attribute(sparse_tensors=sparse),
    "subgraph": lambda t: model([subgraph(t)]),
    "subgraph of a subgraph": lambda t: model([subgraph(t, 3)]),
    "graphs of an attribute": in_attribute(
        graphs=lambda t: helper.make_graph([], "branch", [], [], [t])
    ),
    "function": in_function,
    "training info": in_training_info,
}


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_refused_wherever_it_is(tmp_path, place):
    path = tmp_path / "model.onnx"
    path.write_bytes(PLACES[place](external()).SerializeToString())
    with pytest.raises(ArtifactError, match="keeps weights in another file") as caught:
        read_metadata(path)
    assert str(path) in str(caught.value)
    assert "segcli export" in caught.value.hint
    path.write_bytes(PLACES[place](internal()).SerializeToString())
    assert read_metadata(path) == {}


def test_external_data_behind_a_number_that_wraps_around():
    """Protobuf cuts an enum to 32 bits: 2^32 + 1 is EXTERNAL to ONNX Runtime."""
    tensor = external()
    data = tensor.SerializeToString()
    assert data.count(b"\x70\x01") == 1  # field 14, the value 1
    wrapped = data.replace(b"\x70\x01", b"\x70\x81\x80\x80\x80\x10")
    assert TensorProto.FromString(wrapped).data_location == TensorProto.EXTERNAL
    # Initializer is field 5 of the graph, the graph field 7 of the model.
    inner = b"\x2a" + bytes([len(wrapped)]) + wrapped
    crafted = b"\x3a" + bytes([len(inner)]) + inner
    assert onnx.load_from_string(crafted).graph.initializer[0].data_location == TensorProto.EXTERNAL
    with pytest.raises(ArtifactError, match="another file"):
        parse_metadata(memoryview(crafted), "x")


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"a": "b"},
        {"a": "", "b": "x" * 100_000},
        {"Straße": "日本\n", "segcli.model_card": "{}"},
    ],
    ids=lambda m: str(len(m)),
)
def test_metadata_is_what_onnx_reads(tmp_path, metadata):
    path = tmp_path / "model.onnx"
    onnx.save(model(initializers=[internal()], **metadata), path)
    expected = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert read_metadata(path) == expected == metadata
    assert parse_metadata(memoryview(path.read_bytes()), "x") == metadata


def test_the_card_of_a_model(tiny_model, make_card):
    path = tiny_model()
    assert read_metadata(path) == make_card().to_metadata()


@pytest.mark.parametrize("part", range(50))
def test_a_truncated_file_is_refused(tmp_path, tiny_model, part):
    path = tiny_model()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * part // 50])
    # The graph stands before the metadata: cut between the two, the file is whole, without a card.
    with contextlib.suppress(ArtifactError):
        assert read_metadata(path) == {}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot read"),
        (b"\x00" * 100, "not a complete ONNX file: field number 0"),
        (b"\xff" * 100, "not a complete ONNX file"),
        (b"<html>not found</html>" * 9, "not a complete ONNX file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a complete ONNX file"),
        (b"\x08\x09", "is not an ONNX file: it holds no graph"),
        (b"\x3a\x7f", "it ends at byte 2, within a field of 127 bytes"),
        (b"\x09\x01\x02", "it ends within a number"),
        (b"\x3a" + b"\x80" * 20, "more than ten bytes"),
        (b"\x72\x04\x0a\x02\xff\xff", "not a complete ONNX file"),  # metadata that is no UTF-8
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, expected):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=expected) as caught:
        read_metadata(path)
    assert str(path) in str(caught.value)


def test_places_without_a_file(tmp_path):
    with pytest.raises(ModelNotFound, match="no model file at"):
        read_metadata(tmp_path / "nowhere.onnx")
    with pytest.raises(ArtifactError, match="cannot read"):
        read_metadata(tmp_path)


def nested(levels):
    """Graph in attribute in node in graph, and so on; the innermost holds external data."""
    data = b""
    for _ in range(levels):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # attribute.g, node.attribute, graph.node
            size, length = len(data), b""
            while size > 127:
                length += bytes([size & 127 | 128])
                size >>= 7
            data = tag + length + bytes([size]) + data
    size, length = len(data), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return b"\x3a" + length + bytes([size]) + data


def test_a_file_made_to_exhaust_the_stack_is_refused():
    assert parse_metadata(memoryview(nested(10)), "x") == {}
    for levels in (100, 1000, 5000):
        with pytest.raises(ArtifactError, match="nest too deeply"):
            parse_metadata(memoryview(nested(levels)), "x")


def only_artifact_errors(data):
    with contextlib.suppress(ArtifactError):
        result = parse_metadata(memoryview(data), "x")
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in result.items())


@given(st.binary(max_size=300))
@example(b"\x3a\x00\x72\x00")
def test_no_bytes_lead_to_another_error(data):
    only_artifact_errors(data)


VALID = model([subgraph(internal(), 2)], [internal()], key="value").SerializeToString()


@settings(max_examples=300)
@given(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=6), st.booleans())
def test_no_damage_leads_to_another_error(at, patch, insert):
    only_artifact_errors(VALID[:at] + patch + VALID[at + (0 if insert else len(patch)) :])


@pytest.fixture
def sealed(tiny_model):
    path = tiny_model()
    path.write_bytes(seal(path.read_bytes()))
    return path


def test_a_sealed_file_is_an_onnx_file(sealed):
    model = onnx.load(sealed)
    onnx.checker.check_model(model, full_check=True)
    entry = model.metadata_props[-1]
    body = sealed.read_bytes()[: -len(entry.SerializeToString()) - 2]
    assert (entry.key, entry.value) == ("segcli.sha256", hashlib.sha256(body).hexdigest())
    assert read_card(sealed).name == "tiny"
    check_seal(sealed)


def test_any_flipped_bit_of_a_sealed_file_is_found(sealed):
    data = sealed.read_bytes()
    # In the key's name a flip makes a file without a seal of it, all else is as it was.
    key = data.rindex(b"segcli.sha256")
    for at in {*range(0, len(data), 7), *range(len(data) - 64, len(data))} - {
        *range(key - 6, key + 15)
    }:
        sealed.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(ArtifactError, match="damaged, or was changed"):
            check_seal(sealed)


@pytest.mark.parametrize("change", [lambda d: d + b"\x08\x09", lambda d: b"\x08\x09" + d])
def test_a_sealed_file_with_more_in_it_is_refused(sealed, change):
    sealed.write_bytes(change(sealed.read_bytes()))
    with pytest.raises(ArtifactError, match="changed after its export"):
        check_seal(sealed)


def test_a_file_without_a_seal_passes(tiny_model):
    check_seal(tiny_model())


def test_a_damaged_model_never_reaches_the_runtime(sealed, segcli, picture):
    data = bytearray(sealed.read_bytes())
    # The operator's name: ONNX Runtime would say something else.
    data[data.index(b"Identity")] ^= 1
    sealed.write_bytes(data)
    ran = segcli("segment", picture(), "-m", sealed, "-o", picture().parent / "out.png")
    assert (ran.code, ran.out) == (3, "")
    assert "is damaged, or was changed after its export" in ran.err
