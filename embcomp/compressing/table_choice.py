"""Which tensors of a checkpoint are embedding tables, and what they are called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from embcomp.compressing.found_tensors import FLOATS, CheckedRows, FoundTensor, TensorSource
from embcomp.errors import ConfigError, DataError
from embcomp.layers.row_sources import RowSource
from embcomp.tables.specs import TableSpec

_NAMES = re.compile(r"emb|(^|[._/])(wte|lookup|tables?)([._/]|$)", re.IGNORECASE)
_NO_NAMES = re.compile(
    r"optim|momentum|exp_avg|position|(^|[._/])(wpe|pos_emb)|proj|norm|layers?[._/]\d",
    re.IGNORECASE,
)
_LEAST_ROWS = 128
_SUFFIXES = (".weight", ".weights", ".embedding")
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class ChosenTable:
    """A tensor that is taken for a table.

    Args:
        spec: the table.
        tensor: what it is made from.
        scale: the tensor that its rows are multiplied by, where a quantised one has such.
    """

    spec: TableSpec
    tensor: FoundTensor
    scale: FoundTensor | None = None

    def rows(self) -> RowSource:
        """(num_embeddings, embedding_dim) float32 rows; those with NaN are refused when read."""
        return CheckedRows(self.tensor.name, self.tensor.open(), self._scale())

    def _scale(self) -> Tensor | None:
        if self.scale is None:
            return None
        rows, shape = self.tensor.shape[0], self.scale.shape
        if shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise DataError(
                f"{self.tensor.name} has scales of shape {shape} in {self.scale.name}; expected one, "
                f"or one for each of its {rows:,} rows. Save it in bf16"
            )
        if self.scale.dtype not in FLOATS:
            raise DataError(f"{self.scale.name}: expected scales, got {self.scale.dtype}")
        return _all_of(self.scale).float().reshape(-1, 1)


def choose_tables(source: TensorSource, include: str | None) -> list[ChosenTable]:
    """The tables of a checkpoint.

    Args:
        source: the checkpoint.
        include: a regular expression, found anywhere in the names of the tensors to take; None
            takes what is named as embeddings are, or the only candidate.

    Raises:
        ConfigError: the expression is none.
        DataError: there is no table; the text says what was found.
    """
    held = {tensor.name: tensor for tensor in source.tensors}
    scales = {_scale_of(tensor, held) for tensor in source.tensors if _can_be_table(tensor)}
    able = [tensor for tensor in source.tensors if _can_be_table(tensor) and tensor not in scales]
    if include is not None:
        try:
            wanted: Callable[[str], object] = re.compile(include).search
        except re.error as error:
            raise ConfigError(f"--include: {include!r} is no regular expression: {error}") from None
        tensors = [tensor for tensor in able if wanted(tensor.name)]
    elif len(able) == 1 and len(source.tensors) == 1:
        tensors = able
    else:
        tensors = [tensor for tensor in able if _looks_like_table(tensor)]
    if not tensors:
        said = (
            "no table was found" if include is None else f"--include {include!r} matches no table"
        )
        way_out = "" if include is None and not able else "; name tables with --include REGEX"
        raise DataError(
            f"{source.path} ({source.layout}): {said} among {len(source.tensors)} tensor(s); "
            f"two axes of numbers have: {_shown(able)}{way_out}"
        )
    return [
        ChosenTable(spec=_spec(name, tensor), tensor=tensor, scale=_scale_of(tensor, held))
        for name, tensor in _named(tensors).items()
    ]


def _can_be_table(tensor: FoundTensor) -> bool:
    return len(tensor.shape) == 2 and min(tensor.shape) > 0 and tensor.dtype in FLOATS


def _looks_like_table(tensor: FoundTensor) -> bool:
    rows, columns = tensor.shape
    named = _NAMES.search(tensor.name) and not _NO_NAMES.search(tensor.name)
    return bool(named) and rows >= max(_LEAST_ROWS, 2 * columns)


def _shown(tensors: Sequence[FoundTensor]) -> str:
    named = sorted(tensors, key=lambda each: -each.nbytes)
    shown = ", ".join(map(str, named[:_SHOWN]))
    return (shown or "none") + (f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else "")


def _named(tensors: Sequence[FoundTensor]) -> dict[str, FoundTensor]:
    """Tensors by the tables' names: the last part of a tensor's that tells it from the others."""
    parts = {each.name: _stem(each.name).split(".") for each in tensors}
    length = 1
    while length < max(map(len, parts.values())):
        names = Counter("_".join(part[-length:]) for part in parts.values())
        if max(names.values()) == 1:
            break
        length += 1
    found = {"_".join(parts[each.name][-length:]): each for each in tensors}
    if len(found) < len(tensors):
        names = Counter("_".join(part[-length:]) for part in parts.values())
        twice = next(name for name, count in names.items() if count > 1)
        raise DataError(f"two tensors would be table {twice!r}; take one of them with --include")
    return found


def _stem(name: str) -> str:
    for suffix in _SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix)
    return name


def _spec(name: str, tensor: FoundTensor) -> TableSpec:
    rows, columns = tensor.shape
    return TableSpec(name=name, num_embeddings=rows, embedding_dim=columns, feature_names=(name,))


def _scale_of(tensor: FoundTensor, held: Mapping[str, FoundTensor]) -> FoundTensor | None:
    """The scales of an 8-bit tensor, as the programs that write such call them."""
    if tensor.dtype.itemsize > 1:
        return None
    stem = _stem(tensor.name)
    names = (f"{tensor.name}_scale", f"{tensor.name}_scale_inv", f"{stem}.scale", f"{stem}_scale")
    return next((held[name] for name in names if name in held), None)


def _all_of(tensor: FoundTensor) -> Tensor:
    """A small tensor."""
    rows = tensor.open()
    return rows.whole() if tensor.shape else rows.read(0, 1).reshape(1)


def source_bytes(tables: Sequence[ChosenTable]) -> int:
    """What the tables take as they are stored."""
    return sum(table.tensor.nbytes for table in tables)
