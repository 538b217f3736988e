"""PyTorch against ONNX Runtime, before an exported file is put in place."""

from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from segcli.errors import ExportError, InferenceError
from segcli.session import Session

# Relative to the largest absolute value of each reference output. Measured: 5e-7 to 3e-6.
TOLERANCE = 1e-4
# Weights rounded to fp16 carry a relative error of 2^-11 each. Measured on trained weights: 3e-4 to
# 8e-3.
FP16_TOLERANCE = 2e-2

# Landscape, odd on both axes, portrait and the smallest allowed: none is the size that was traced.
SIZES_HW = ((64, 96), (97, 131), (160, 64), (32, 32))
BATCHES = (1, 3)


def compare(
    proto: onnx.ModelProto,
    reference: nn.Module,
    size_hw: tuple[int, int] | None,
    tolerance: float,
) -> dict[str, Any]:
    """Runs both on the same random tensors.

    Args:
        proto: The graph.
        reference: The PyTorch module it was made from, unfolded, in eval mode.
        size_hw: The only size that a graph of fixed size takes, or None.
        tolerance: Largest allowed difference, relative to the output's largest value.

    Returns:
        ``max_rel_diff``, ``tolerance``, ``sizes_hw`` and ``batches``, for the ModelCard.

    Raises:
        ExportError: The outputs differ in number, shape or beyond ``tolerance``.
    """
    session = Session(proto.SerializeToString(), device="cpu", optimize=False)
    sizes = (size_hw,) if size_hw else SIZES_HW
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for height, width in sizes:
        for batch in BATCHES:
            x = torch.randn(batch, 3, height, width, generator=generator)
            where = f"at {height}x{width}, batch {batch}"
            try:
                with torch.inference_mode():
                    expected = reference(x)
                found = session.run(x.numpy())
            except (InferenceError, RuntimeError) as error:
                raise ExportError(f"the model does not run {where}: {error}") from error
            expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
            if [e.shape for e in expected] != [f.shape for f in found]:
                raise ExportError(
                    f"the graph's outputs {where} have shapes {[f.shape for f in found]}, "
                    f"the reference's {[tuple(e.shape) for e in expected]}"
                )
            for ours, theirs in zip(found, expected, strict=True):
                worst = max(worst, relative_difference(ours, theirs.numpy()))
            if not worst <= tolerance:
                raise ExportError(
                    f"the graph differs from PyTorch by {worst:.2g} of the output's scale {where}, "
                    f"allowed is {tolerance:g}: nothing was written"
                )
    return {
        # Two digits: the third depends on the machine, and the file must not.
        "max_rel_diff": float(f"{worst:.0e}"),
        "tolerance": tolerance,
        "sizes_hw": [list(s) for s in sizes],
        "batches": list(BATCHES),
    }


def relative_difference(found: Any, expected: Any) -> float:  # noqa: ANN401
    """Returns the largest absolute difference over the largest absolute value of ``expected``.

    A difference that is not a number counts as infinite.
    """
    scale = float(np.abs(expected).max())
    with np.errstate(invalid="ignore"):  # infinity less itself
        difference = float(np.abs(np.asarray(found) - expected).max())
    if not np.isfinite(difference):
        return float("inf")
    return difference / scale if scale else difference
