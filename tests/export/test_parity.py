"""Our PyTorch, our ONNX and transformers side by side, printed as a table at the end of the run.

Random weights, randomised norm statistics, three sizes of which one is odd. Each row stands for
the whole way: transformers' state dict, strict loading, folding, tracing, ONNX Runtime.
"""

import gc
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from segcli.export.convert import build_module
from segcli.export.fold import fold
from segcli.export.mobilenet_v2 import MobileNetV2Config
from segcli.export.segformer import VARIANTS
from segcli.export.trace import trace
from segcli.session import Session

pytestmark = [pytest.mark.export, pytest.mark.slow]

TOLERANCE = 1e-4
SIZES_HW = ((64, 96), (97, 131), (128, 64))

CASES = [(f"SegFormer-{v.upper()}", t, v) for v in VARIANTS for t in ("Semantic", "Image")]
CASES += [(f"MobileNetV2 {m:g}", "Image", {"depth_multiplier": m}) for m in (0.35, 1.0, 1.4)]
CASES += [(f"DeepLab OS {s}", "Semantic", {"output_stride": s}) for s in (8, 16)]


def _networks(head, what):
    """Returns our config, and transformers' model of the same shape."""
    if isinstance(what, str):
        ours = replace(VARIANTS[what], num_labels=150 if head == "Semantic" else 1000)
        theirs = transformers.SegformerConfig(
            num_labels=ours.num_labels,
            depths=list(ours.depths),
            hidden_sizes=list(ours.hidden_sizes),
            decoder_hidden_size=ours.decoder_hidden_size,
        )
        family = "Segformer"
    else:
        ours = MobileNetV2Config(num_labels=21 if head == "Semantic" else 1001, **what)
        theirs = transformers.MobileNetV2Config(num_labels=ours.num_labels, **what)
        family = "MobileNetV2"
    kind = "SemanticSegmentation" if head == "Semantic" else "ImageClassification"
    return ours, getattr(transformers, f"{family}For{kind}")(theirs)


@pytest.mark.parametrize(("name", "head", "what"), CASES, ids=[f"{n} {h}" for n, h, _ in CASES])
def test_parity(name, head, what, randomize, hub_state, relative, parity_row):
    config, reference = _networks(head, what)
    randomize(reference)
    task = "segmentation" if head == "Semantic" else "classification"
    module = build_module(config, task)
    module.load_state_dict(hub_state(reference), strict=True)
    parameters = sum(p.numel() for p in module.parameters())
    pixels = [torch.randn(2, 3, *size) for size in SIZES_HW]
    theirs = [reference(x).logits.numpy() for x in pixels]
    ours = [module(x).numpy() for x in pixels]
    del reference
    fold(module)
    session = Session(trace(module).SerializeToString(), device="cpu")
    graph = [session.run(x.numpy())[0] for x in pixels]
    del module, session
    gc.collect()

    torch_diff = max(map(relative, ours, theirs))
    graph_to_ours = max(map(relative, graph, ours))
    graph_diff = max(map(relative, graph, theirs))
    parity_row(
        (
            f"{name}, {task}",
            f"{parameters / 1e6:.2f} M",
            *(f"{d:.1e}" for d in (torch_diff, graph_to_ours, graph_diff)),
        )
    )
    assert torch_diff <= TOLERANCE
    assert graph_to_ours <= TOLERANCE
    assert graph_diff <= TOLERANCE
