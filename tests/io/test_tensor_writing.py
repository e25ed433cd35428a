"""Safetensors files written by block: the library's own bytes, in one file or several."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from embcomp.io.tensor_checksums import checksum_of
from embcomp.io.tensor_files import DTYPES, files_of_index, tensors_of_file
from embcomp.io.tensor_writing import NewTensor, write_tensors


def some_tensors():
    draw = torch.Generator().manual_seed(0)
    found = {
        f"{dtype}.{name}": torch.randint(0, 2, shape, generator=draw).to(dtype)
        for dtype in DTYPES
        for name, shape in {"b": (7, 3), "a": (), "ä": (0, 4), 'q"': (5,)}.items()
    }
    return {name: found[name] for name in sorted(found, key=hash)}


def new(tensors, rows=2):
    return [
        NewTensor(
            name=name,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            blocks=lambda tensor=tensor: tensor.split(rows) if tensor.dim() else [tensor],
        )
        for name, tensor in tensors.items()
    ]


def test_one_file_has_the_bytes_that_the_library_writes(tmp_path):
    tensors = some_tensors()
    checksums = write_tensors(tmp_path, "m.safetensors", new(tensors), file_bytes=1 << 30)
    wanted = safetensors.torch.save(tensors, metadata={"format": "pt"})
    assert (tmp_path / "m.safetensors").read_bytes() == wanted
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    assert checksums == {name: checksum_of(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("limit", [1, 100, 500])
def test_several_files_hold_each_tensor_once_and_an_index_says_where(tmp_path, limit):
    tensors = some_tensors()
    checksums = write_tensors(tmp_path, "m.safetensors", new(tensors), file_bytes=limit)
    assert checksums == {name: checksum_of(tensor) for name, tensor in tensors.items()}
    places = files_of_index(tmp_path / "m.safetensors.index.json")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and not (tmp_path / "m.safetensors").exists()
    assert files[0].name == f"m-00001-of-{len(files):05d}.safetensors"
    found = {}
    for file in files:
        own = tensors_of_file(file)
        assert sum(each.nbytes for each in own.values()) <= max(limit, 168)
        assert all(places[name] == file.name for name in own)
        loaded = safetensors.torch.load_file(file)
        assert not found.keys() & loaded.keys()
        found |= loaded
    assert found.keys() == tensors.keys() == places.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
