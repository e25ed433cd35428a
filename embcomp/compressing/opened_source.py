"""Which layout a source of trained tensors has."""

from __future__ import annotations

import json
from pathlib import Path

from embcomp.compressing.found_tensors import TensorSource
from embcomp.compressing.safetensors_layout import SUFFIX, safetensors_file, safetensors_folder
from embcomp.compressing.torch_layouts import checkpoint_folder, npy_file, torch_file
from embcomp.errors import DataError

LAYOUTS = (
    "a .safetensors file, a folder of them (with model.safetensors.index.json where there are "
    "several), a state dict of torch.save, a folder of torch.distributed.checkpoint, or a .npy file"
)


def open_source(path: Path) -> TensorSource:
    """Look at a checkpoint; of tensors, nothing is read yet.

    Args:
        path: a file or folder of any of `LAYOUTS`.

    Raises:
        DataError: it is not there, none of them, or damaged.
        CheckpointError: the index of a folder of checkpoints cannot be read.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected {LAYOUTS}")
    if path.is_dir():
        return _folder(path)
    if path.name.endswith(".index.json"):
        found = safetensors_folder(path)
        assert found is not None, "it is there"
        return found
    if path.suffix == SUFFIX:
        return safetensors_file(path)
    with path.open("rb") as file:
        head = file.read(6)
    if head == b"\x93NUMPY":
        return npy_file(path)
    if head[:2] in (b"PK", b"\x80\x02"):  # a zip, or a pickle of old
        return torch_file(path)
    raise DataError(f"{path} has an unknown layout; expected {LAYOUTS}")


def _folder(path: Path) -> TensorSource:
    if (path / ".metadata").is_file():
        return checkpoint_folder(path)
    if _is_artefact(path):
        raise DataError(
            f"{path} is an artefact of embcomp, whose tables are compressed already; give the "
            "checkpoint that it was made from"
        )
    found = safetensors_folder(path)
    if found is None:
        names = sorted(each.name for each in path.iterdir())
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise DataError(
            f"{path} has an unknown layout: it holds {shown or 'nothing'}; expected {LAYOUTS}"
        )
    return found


def _is_artefact(path: Path) -> bool:
    try:
        content = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == "embcomp artefact"
