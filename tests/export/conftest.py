"""What the export tests share: random networks, both implementations side by side."""

import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

PARITY = pytest.StashKey[list[tuple[str, ...]]]()

TINY_SEGFORMER = {
    "num_labels": 5,
    "depths": [1, 2, 1, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 3, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "decoder_hidden_size": 24,
}


@pytest.fixture(autouse=True)
def _inference():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def _randomize(model):
    """Gives every layer an output that depends on its input, every norm its own statistics."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                torch.nn.init.normal_(module.bias)
        elif isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="session")
def randomize():
    """Fills a model with weights that leave no layer without an effect."""
    return _randomize


@pytest.fixture(scope="session")
def calibrate():
    """Gives batch norms the statistics of their input, as training does.

    A deep chain of others is chaotic: rounding alone then moves its logits by 1e-4.
    """

    def calibrate(model):
        import torch

        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train()(torch.randn(4, 3, 97, 131))
        assert all(norm.num_batches_tracked == 1 for norm in norms[:-1])
        return model.eval()

    return calibrate


@pytest.fixture(scope="session")
def tiny_segformer():
    """Returns the config.json fields of a SegFormer small enough to export in seconds."""
    return dict(TINY_SEGFORMER)


@pytest.fixture
def hub_state():
    """Returns the state dict of a transformers model under the names of its hub files."""

    def hub_state(model, prefix=""):
        from segcli.export.hub_names import hub_names

        state = {prefix + k: v.clone() for k, v in model.state_dict().items()}
        return hub_names(state, "in memory")[0]

    return hub_state


@pytest.fixture
def ours_like(hub_state):
    """Builds our module for a transformers model, with the same weights, strictly."""

    def ours_like(theirs, ours_class, config, prefix="", **options):
        ours = ours_class(config, **options).eval()
        ours.load_state_dict(hub_state(theirs, prefix), strict=True)
        return ours

    return ours_like


@pytest.fixture(scope="session")
def save_checkpoint(tmp_path_factory):
    """Writes a transformers model as a Hugging Face folder, under the names of the hub."""

    def save_checkpoint(model, processor=None, **changes):
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(config))
        if processor is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder

    return save_checkpoint


def _make_graph(nodes, weights, logits=("n", "k", "y", "x")):
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    graph = helper.make_graph(
        [helper.make_node(*node[:3], name=f"node{i}", **node[3]) for i, node in enumerate(nodes)],
        "test",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, list(logits))],
        tensors,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _affine(scale, shift):
    scale = np.array(scale, np.float32)[:, :, None, None]
    return _make_graph(
        [
            ("Conv", ["pixel_values", "scale"], ["scaled"], {}),
            ("Add", ["scaled", "shift"], ["logits"], {}),
        ],
        {"scale": scale, "shift": np.array(shift, np.float32)[:, None, None]},
    )


@pytest.fixture(scope="session")
def make_graph():
    """Makes a graph of operators: (op_type, inputs, outputs, attributes), and its weights."""
    return _make_graph


@pytest.fixture(scope="session")
def affine():
    """Makes a graph whose logits are a 1x1 convolution of the pixel plus a constant."""
    return _affine


def _relative(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    scale = np.abs(theirs).max()
    assert scale > 0
    return float(np.abs(ours - theirs).max() / scale)


@pytest.fixture(scope="session")
def relative():
    """Returns the largest difference, relative to the largest value of the reference."""
    return _relative


@pytest.fixture
def assert_close():
    """Asserts that two outputs differ by rounding only."""

    def assert_close(ours, theirs, tolerance=1e-5):
        assert _relative(ours, theirs) <= tolerance

    return assert_close


@pytest.fixture
def parity_row(request):
    """Records one row of the parity table, which is printed when all tests have run."""
    return request.config.stash.setdefault(PARITY, []).append


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(PARITY, [])
    if not rows:
        return
    terminalreporter.section("parity: largest difference over the largest logit")
    header = ("model", "parameters", "torch/transformers", "onnx/torch", "onnx/transformers")
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        terminalreporter.line("  ".join(cells))
