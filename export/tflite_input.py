"""The input of a TFLite graph -> the fields of a ``preprocessor_config.json``.

A graph fixes its input's size and, where that is quantised, which real value a pixel stands for.
The rest is as in the hub's checkpoints of the same networks.
"""

from typing import Any

from segcli.artifact import MIN_IMAGE_SIZE
from segcli.export.tflite_graph import Graph

# Shortest edge minus crop in all of google/mobilenet_v2_*.
_MARGIN = 32


def processor_of(graph: Graph, *, is_segmenter: bool) -> tuple[dict[str, Any], list[str]]:
    """Returns the processor's fields, and notes.

    Args:
        graph: With one input, (1, H, W, 3).
        is_segmenter: Whether it gives class maps: then no margin is cropped.
    """
    notes: list[str] = []
    config: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    tensor = graph.tensors[graph.inputs[0]]
    size = tensor.signature[1:3]
    if len(size) != 2 or min(size) < MIN_IMAGE_SIZE:
        notes.append("the graph fixes no input size: the processor's defaults are used")
    elif size[0] == size[1]:
        edge = size[0] if is_segmenter else size[0] + _MARGIN
        config |= {
            "size": {"shortest_edge": edge},
            "crop_size": {"height": size[0], "width": size[1]},
        }
    else:
        config |= {"size": {"height": size[0], "width": size[1]}, "do_center_crop": False}

    # Where pixels come as floats, the first operator may still quantise them.
    first = [op.outputs[0] for op in graph.operators if op.inputs[:1] == graph.inputs]
    ranges = [graph.tensors[i].range for i in (*graph.inputs, *first[:1])]
    low, high = next((found for found in ranges if found), (0.0, 0.0))
    step = (high - low) / 255
    if low == high:
        notes.append("the graph takes floats: pixels from -1 to 1 are assumed, as in Google's own")
    elif abs(low + 1) > step or abs(high - 1) > step:
        config |= {"image_mean": [-low / (high - low)] * 3, "image_std": [1 / (high - low)] * 3}
    return config, notes
