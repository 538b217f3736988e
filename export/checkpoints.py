"""Weight files -> a state dict under the hub's names, and its strict loading into a model.

Reads Hugging Face folders, single ``.safetensors``, ``.bin``, ``.pth`` and ``.pt`` files; never
runs code from one. Knows the hub's transformers-4 names (kept as they are), the names that
transformers 5 uses in memory, and those of the original NVlabs SegFormer.
"""

import hashlib
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from segcli.errors import CheckpointError

StateDict = dict[str, Tensor]

# In the order in which transformers itself prefers them.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TORCH_SUFFIXES = (".bin", ".pth", ".pt")


@dataclass(frozen=True)
class Weights:
    """A weight file as read.

    Attributes:
        path: The file.
        state: float32 tensors under hub names, prefixed with ``segformer.`` or
            ``mobilenet_v2.`` also where a bare encoder's file leaves that out.
        sha256: Digest of the file's bytes.
        family: ``segformer`` or ``mobilenet_v2``, by the names found.
        notes: What the reader should know, one sentence each.
    """

    path: Path
    state: StateDict
    sha256: str
    family: str
    notes: tuple[str, ...]


def find_weights(path: Path) -> Path:
    """Returns the weight file that ``path`` is or that lies in the folder ``path``.

    Raises:
        CheckpointError: There is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {str(path)!r}")
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    found = sorted(p.name for p in path.iterdir())[:10]
    raise CheckpointError(
        f"no weights in {str(path)!r}: found {', '.join(found) or 'nothing'}, "
        f"expected {' or '.join(WEIGHT_FILES)}",
        hint="name the weight file itself",
    )


def read_weights(path: Path) -> Weights:
    """Returns the tensors of one weight file.

    Raises:
        CheckpointError: The file is damaged, holds anything but tensors, or is of no known family.
    """
    raw = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    state, notes = hub_names(raw, str(path))
    if any(k.startswith("segformer.") for k in state):
        family = "segformer"
    elif any(k.startswith("mobilenet_v2.") for k in state):
        family = "mobilenet_v2"
    else:
        shown = ", ".join(list(state)[:4])
        raise CheckpointError(
            f"{str(path)!r} is neither a SegFormer nor a MobileNetV2: its tensors are {shown}, …"
        )
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"tensor {name} of {str(path)!r} has values that are not finite")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Weights(path, state, digest, family, tuple(notes))


def load_strict(model: nn.Module, state: StateDict, path: Path) -> None:
    """Fills ``model`` with ``state``, every tensor exactly once.

    Raises:
        CheckpointError: Tensors are missing, left over or of another shape; lists them.
    """
    wanted = model.state_dict()
    # Old files were saved before PyTorch counted batches; no inference reads the counter.
    counters = {k for k in wanted if k.endswith("num_batches_tracked")}
    missing = [k for k in wanted if k not in state and k not in counters]
    unexpected = [k for k in state if k not in wanted]
    misshapen = [
        f"{k} is {_shape(state[k])}, expected {_shape(wanted[k])}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the tensors of {str(path)!r} do not fit {type(model).__name__}: {'; '.join(problems)}"
        )
    model.load_state_dict({**{k: wanted[k] for k in counters}, **state}, strict=True)


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


def _is_safetensors(path: Path) -> bool:
    if path.suffix in TORCH_SUFFIXES:
        return False
    if path.suffix == ".safetensors":
        return True
    raise CheckpointError(
        f"{str(path)!r} has the suffix {path.suffix!r}, expected .safetensors, "
        f"{', '.join(TORCH_SUFFIXES)} or a Hugging Face folder"
    )


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        raw = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error}") from error
    return _as_float(raw, path)


def _read_torch(path: Path) -> StateDict:
    _refuse_zip_bomb(path)
    try:
        # mmap=False: a file that is cut off is then an error here and not a bus error later.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on other pickle protocols, which either load or fail
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"refused to load {str(path)!r}: it is no plain file of tensors",
            hint="a checkpoint may hold tensors only: what else a pickle says would run as code",
        ) from error
    except Exception as error:  # the unpickler meets damaged bytes with whatever they lead to
        raise CheckpointError(f"cannot read {str(path)!r}: {_first_line(error)}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(raw, dict) and isinstance(raw.get(wrapper), dict):
            raw = raw[wrapper]
    return _as_float(raw, path)


def _refuse_zip_bomb(path: Path) -> None:
    """Raises CheckpointError where the members of a zip claim more bytes than the file has.

    PyTorch stores members as they are, but its reader would inflate others, into memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # of the older format, or damaged: torch.load says which
    _refuse_claim(claimed, path, factor=1)


def _refuse_claim(claimed: int, path: Path, *, factor: int) -> None:
    size = path.stat().st_size
    if claimed > size * factor:
        raise CheckpointError(
            f"{str(path)!r} claims {claimed} bytes of tensors, but the file has {size}",
            hint="save the state dict anew with torch.save or safetensors",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _as_float(raw: object, path: Path) -> StateDict:
    if not isinstance(raw, dict) or not raw:
        raise CheckpointError(f"{str(path)!r} holds no state dict but {type(raw).__name__}")
    # A tensor may repeat its storage without end, or share it; a few times is honest.
    tensors = [t for t in raw.values() if isinstance(t, Tensor)]
    _refuse_claim(sum(t.numel() * t.element_size() for t in tensors), path, factor=4)
    state = {}
    for name, tensor in raw.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{str(path)!r} holds {name!r} of type {type(tensor).__name__}, expected tensors"
            )
        counter = name.endswith("num_batches_tracked")
        plain = tensor.is_floating_point() and not tensor.is_quantized and not tensor.is_sparse
        plain = plain and tensor.device.type == "cpu"
        if not plain and not counter:
            raise CheckpointError(
                f"tensor {name} of {str(path)!r} is {tensor.dtype}, expected plain floats"
            )
        state[name] = tensor if counter else tensor.float()
    return state


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
