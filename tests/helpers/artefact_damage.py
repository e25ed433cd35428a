"""Ways to damage an artefact, each with a seed: what a disk, a copy or an editor does to a folder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

Damage = Callable[[Path, random.Random], None]


def flip_a_bit(folder: Path, draw: random.Random) -> None:
    """Of any file, anywhere in it."""
    file = draw.choice(sorted(each for each in folder.rglob("*") if each.is_file()))
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def flip_a_bit_of_a_weight(folder: Path, draw: random.Random) -> None:
    """Where a file is longest, and nothing but a number changes."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[draw.randrange(start, len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut_a_file(folder: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(each for each in folder.rglob("*") if each.is_file()))
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])


def remove_a_file(folder: Path, draw: random.Random) -> None:
    draw.choice(sorted(each for each in folder.rglob("*") if each.is_file())).unlink()


def swap_two_tensors(folder: Path, draw: random.Random) -> None:
    """Of one shape and type where there are such; rows of one table otherwise."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    tensors = safetensors.torch.load_file(file)
    pairs = [
        (a, b)
        for a in tensors
        for b in tensors
        if a < b and tensors[a].shape == tensors[b].shape and tensors[a].dtype == tensors[b].dtype
        if not torch.equal(tensors[a], tensors[b])
    ]
    if pairs:
        a, b = draw.choice(pairs)
        tensors[a], tensors[b] = tensors[b], tensors[a]
    else:
        a = max(tensors, key=lambda name: tensors[name].numel())
        tensors[a] = tensors[a].flip(0)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def insert_nan(folder: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    tensors = safetensors.torch.load_file(file)
    floats = sorted(n for n, t in tensors.items() if t.is_floating_point() and t.numel())
    name = draw.choice(floats)
    flat = tensors[name].clone().reshape(-1)
    flat[draw.randrange(len(flat))] = draw.choice([float("nan"), float("inf"), float("-inf")])
    tensors[name] = flat.reshape(tensors[name].shape)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def edit_the_description(folder: Path, draw: random.Random) -> None:
    """Another number, name, order or type somewhere in `config.json`; or a key less."""
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    places = [
        place for place in _places(content) if place[0] is not content or place[1] != "format"
    ]
    parent, key = draw.choice(places)
    parent[key] = _other(parent[key], draw)
    if draw.random() < 0.15:
        del parent[key]
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _places(node: object) -> list[tuple]:
    found: list[tuple] = []
    items = node.items() if isinstance(node, dict) else enumerate(node)  # type: ignore[arg-type]
    for key, value in items:
        found.append((node, key))
        if isinstance(value, (dict, list)):
            found += _places(value)
    return found


def _other(value: object, draw: random.Random) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return draw.choice([value + 1, value * 2 + 1, -1, 10**30, 0.5, "1"])
    if isinstance(value, str):
        return draw.choice([value + "x", "../" + value, "", 7, None])
    if isinstance(value, list) and len(value) > 1:
        return draw.choice([value[::-1] if value[::-1] != value else value[:1], value[1:], {}])
    return draw.choice([3, "x"])


DAMAGES: dict[str, Damage] = {
    each.__name__: each
    for each in (
        flip_a_bit,
        flip_a_bit_of_a_weight,
        cut_a_file,
        remove_a_file,
        swap_two_tensors,
        insert_nan,
        edit_the_description,
    )
}
