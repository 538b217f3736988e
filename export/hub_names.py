"""Tensor names of every SegFormer and MobileNetV2 in PyTorch -> those of the hub's files.

The hub's transformers-4 names stay as they are; known are also the names that transformers 5 uses
in memory and those of the original NVlabs SegFormer. No value changes but the original's joined
keys and values, which are two tensors here.
"""

import re

from segcli.errors import CheckpointError
from segcli.export.state_dict import StateDict


def hub_names(raw: StateDict, path: str) -> tuple[StateDict, list[str]]:
    """Returns ``raw`` under the hub's transformers-4 names, and notes on what was left out.

    Raises:
        CheckpointError: The names are those of a decode head that computes another function.
    """
    notes: list[str] = []
    if any(".layers.0.0.projection." in f".{k}" for k in raw):
        raise CheckpointError(
            f"{path!r} has the names of mmsegmentation's own SegFormer, whose decode head has a "
            "batch norm and ReLU after each stage's projection: another function",
            hint="use the original NVlabs file or a Hugging Face checkpoint of it",
        )
    if any(re.match(r"(backbone\.)?patch_embed1\.", k) for k in raw):
        raw = _from_original(raw)
        if any(k.startswith("decode_head.conv_seg.") for k in raw):
            notes.append("decode_head.conv_seg, which the original never uses, is left out")
            raw = {k: v for k, v in raw.items() if not k.startswith("decode_head.conv_seg.")}
    state = {}
    for name, tensor in raw.items():
        for pattern, replacement in _V5_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.startswith("encoder."):
            name = f"segformer.{name}"
        elif re.match(r"(conv_stem|layer|conv_1x1)\.", name):
            name = f"mobilenet_v2.{name}"
        state[name] = tensor
    return state, notes


# Names of transformers 5 in memory (a state dict saved with torch.save) -> hub names. The second
# and third rules need the first to have moved the stage number.
_V5_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (
            r"(?:^|(segformer\.))stages\.(\d+)\.patch_embeddings\.",
            r"segformer.encoder.patch_embeddings.\2.",
        ),
        (r"(?:^|(segformer\.))stages\.(\d+)\.blocks\.", r"segformer.encoder.block.\2."),
        (
            r"(?:^|(segformer\.))stages\.(\d+)\.layer_norm\.",
            r"segformer.encoder.layer_norm.\2.",
        ),
        (r"\.attention\.q_proj\.", ".attention.self.query."),
        (r"\.attention\.k_proj\.", ".attention.self.key."),
        (r"\.attention\.v_proj\.", ".attention.self.value."),
        (
            r"\.attention\.sequence_reduction\.sequence_reduction\.",
            ".attention.self.sr.",
        ),
        (
            r"\.attention\.sequence_reduction\.layer_norm\.",
            ".attention.self.layer_norm.",
        ),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".mlp.dense1."),
        (r"\.mlp\.fc2\.", ".mlp.dense2."),
        (r"\.layernorm_before\.", ".layer_norm_1."),
        (r"\.layernorm_after\.", ".layer_norm_2."),
        (r"^decode_head\.linear_projections\.", "decode_head.linear_c."),
    )
)

# Names of github.com/NVlabs/SegFormer (mmseg 0.11) -> hub names; stages count from one there.
_ORIGINAL_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(?:backbone\.)?patch_embed(\d)\.proj\.", "patch_embeddings.{}.proj."),
        (r"^(?:backbone\.)?patch_embed(\d)\.norm\.", "patch_embeddings.{}.layer_norm."),
        (r"^(?:backbone\.)?block(\d)\.", "block.{}."),
        (r"^(?:backbone\.)?norm(\d)\.", "layer_norm.{}."),
    )
)
_ORIGINAL_PARTS = (
    (".attn.q.", ".attention.self.query."),
    (".attn.sr.", ".attention.self.sr."),
    (".attn.norm.", ".attention.self.layer_norm."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".mlp.dense1."),
    (".mlp.fc2.", ".mlp.dense2."),
    (".norm1.", ".layer_norm_1."),
    (".norm2.", ".layer_norm_2."),
)
_ORIGINAL_HEAD = (
    (re.compile(r"^decode_head\.linear_c(\d)\."), "decode_head.linear_c.{}."),
    (re.compile(r"^decode_head\.linear_fuse\.conv\."), "decode_head.linear_fuse."),
    (re.compile(r"^decode_head\.linear_fuse\.bn\."), "decode_head.batch_norm."),
    (re.compile(r"^decode_head\.linear_pred\."), "decode_head.classifier."),
    (re.compile(r"^head\."), "classifier."),
)


def _from_original(raw: StateDict) -> StateDict:
    state: StateDict = {}
    for name, tensor in raw.items():
        for pattern, replacement in (*_ORIGINAL_NAMES, *_ORIGINAL_HEAD):
            if match := pattern.match(name):
                stage = int(match[1]) - 1 if match.groups() else None
                prefix = "" if (pattern, replacement) in _ORIGINAL_HEAD else "segformer.encoder."
                name = prefix + replacement.format(stage) + name[match.end() :]
                break
        for part, replacement in _ORIGINAL_PARTS:
            name = name.replace(part, replacement)
        if ".attn.kv." in name:
            # One matrix in the original: its first half gives the keys, its second the values.
            key, value = tensor.chunk(2)
            state[name.replace(".attn.kv.", ".attention.self.key.")] = key
            state[name.replace(".attn.kv.", ".attention.self.value.")] = value
        else:
            state[name] = tensor
    return state
