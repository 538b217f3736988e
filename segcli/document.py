"""The JSON document of one segmented image: its classes, each with its mask.

What ``-f json`` writes; ``segcli/data/segmentation.schema.json`` describes it. Built from arrays
and records, written elsewhere.
"""

from collections.abc import Sequence
from typing import Any

from segcli.coco import encode_rle, trace_polygons
from segcli.results import ClassMap, ClassShare

DOCUMENT_SCHEMA = 1


def segmentation_document(
    class_map: ClassMap, classes: Sequence[ClassShare], model: str, *, polygons: bool = False
) -> dict[str, Any]:
    """Returns what ``json.dumps`` takes: shares, RLE masks and, if asked for, polygons.

    A class that is not among ``classes`` is left out, so ``--classes`` is a shorter list.

    Args:
        class_map: (H, W) class ids.
        classes: The classes to describe, in the order wanted.
        model: The name in the model's own card.
        polygons: Adds the outlines of ``trace_polygons`` to every class.
    """
    class_ids = [share.class_id for share in classes]
    strings = encode_rle(class_map, class_ids)
    rings = trace_polygons(class_map, class_ids) if polygons else None
    size_hw = list(class_map.shape)
    entries = []
    for share in classes:
        entry = share.to_dict()
        entry["rle"] = {"size": size_hw, "counts": strings[share.class_id]}
        if rings is not None:
            entry["polygons"] = [ring.tolist() for ring in rings[share.class_id]]
        entries.append(entry)
    return {"schema": DOCUMENT_SCHEMA, "size": size_hw, "model": model, "classes": entries}
