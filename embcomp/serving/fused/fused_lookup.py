"""A collection's look-ups in one call: what stands between a batch and the compiled code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.collection.groups import Group, TableFeature
from embcomp.serving.fused.library import library
from embcomp.serving.fused.program import FEATURE, HEADER, STEP, make_program, step_bytes
from embcomp.serving.serving_rows import HeldTable

_RAGGED = 2


class FusedLookup:
    """Looks up every (table, feature) of a collection at once, on the CPU.

    Calls may come from many threads at the same time; they hold no lock of the interpreter.

    Args:
        groups: the collection's methods, loaded, which all say what they do.
        tables: their physical tables.
        declared: the (table, feature) pairs in the order of the output.

    Raises:
        MissingKernelError: there is no compiled code on this machine.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        tables: Mapping[str, HeldTable],
        declared: Sequence[TableFeature],
    ) -> None:
        built = library()
        assert built.embcomp_step_bytes() == STEP.itemsize
        assert built.embcomp_feature_bytes() == FEATURE.itemsize
        assert built.embcomp_program_bytes() == HEADER.itemsize
        self._lookup = built.embcomp_lookup
        self._sources = list(dict.fromkeys(instance.feature for instance in declared))
        self._program = program = make_program(groups, tables, self._sources)
        place = {instance.key: n for n, instance in enumerate(program.instances)}
        self._features = program.features[[place[instance.key] for instance in declared]]
        widths = self._features["dim"].astype(np.int64)
        self._features["out"] = np.cumsum(widths) - widths
        self._total = int(widths.sum())
        self._bound: dict[tuple[str, ...], _Bound | None] = {}
        self._last: tuple[list[str], _Bound | None] = ([], None)

    def pooled(self, features: KeyedJaggedTensor, *, is_weighted: bool) -> Tensor | None:
        """(B, sum of embedding_dims) float32; None for what the modules must answer or refuse."""
        bound = self._bind(features)
        if bound is None:
            return None
        values, batch = _ids(features), features.stride()
        out = torch.empty((batch, self._total), dtype=torch.float32)
        if not is_weighted:
            lengths = features.lengths()
            if lengths.dtype is torch.int32 and lengths.numel() == values.numel():
                held = lengths if lengths.is_contiguous() else lengths.contiguous()
                done = self._call(bound.whole, values, batch, out, lengths=held)
                if done != _RAGGED:
                    return out if done else None
        weights = features.weights_or_none() if is_weighted else None
        if is_weighted and (weights is None or weights.dtype != torch.float32):
            return None
        factors = None if weights is None else weights.contiguous()
        offsets = features.offsets().to(torch.int64).contiguous()
        done = self._call(bound.whole, values, batch, out, offsets=offsets, weights=factors)
        return out if done else None

    def _call(
        self,
        program: int,
        ids: Tensor,
        batch: int,
        out: Tensor,
        *,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> int:
        """What the compiled code says; tensors are contiguous and live until it returns."""
        found: int = self._lookup(
            program,
            ids.data_ptr(),
            None if lengths is None else lengths.data_ptr(),
            None if offsets is None else offsets.data_ptr(),
            None if weights is None else weights.data_ptr(),
            batch,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return found

    def bytes_of_a_row(self) -> int:
        """Bytes of rows, codes and bitmaps that one id for each feature reads."""
        steps = self._program.steps
        spans = [range(f["first"], f["first"] + f["count"]) for f in self._features]
        return sum(step_bytes(steps[n]) for span in spans for n in span)

    def unpooled(self, features: KeyedJaggedTensor) -> list[Tensor] | None:
        """For each (table, feature), (its ids, embedding_dim) float32; None as for `pooled`."""
        bound = self._bind(features)
        if bound is None:
            return None
        values, offsets, found = _ids(features), features.offset_per_key(), []
        for header, dim, key in bound.alone:
            own = values[offsets[key] : offsets[key + 1]]
            out = torch.empty(len(own), dim)
            if not self._call(header, own, len(own), out):
                return None
            found.append(out)
        return found

    def _bind(self, features: KeyedJaggedTensor) -> _Bound | None:
        """The programs for batches of these keys; None where a feature is missing."""
        if features.variable_stride_per_key() or features.inverse_indices_or_none() is not None:
            return None
        keys = features.keys()
        if keys == self._last[0]:  # most batches come with the keys of the one before
            return self._last[1]
        asked = tuple(keys)
        if asked not in self._bound:
            here = set(self._sources) <= set(asked)
            self._bound[asked] = self._bound_to(asked) if here else None
        self._last = list(keys), self._bound[asked]
        return self._bound[asked]

    def _bound_to(self, keys: Sequence[str]) -> _Bound:
        places = np.array([keys.index(name) for name in self._sources], dtype=np.int64)
        whole = self._header(self._features, places, self._total)
        alone, held = [], [self._features, places, whole]
        nowhere = np.zeros(len(places), dtype=np.int64)
        for n, dim in enumerate(self._features["dim"].tolist()):
            one = self._features[n : n + 1].copy()
            key = int(places[one["source"][0]])
            one["out"] = 0
            header = self._header(one, nowhere, dim)
            held += [one, nowhere, header]
            alone.append((_address(header), dim, key))
        return _Bound(whole=_address(whole), alone=alone, held=held)

    def _header(self, features: np.ndarray, places: np.ndarray, stride: int) -> np.ndarray:
        header = np.zeros(1, dtype=HEADER)
        steps = self._program.steps
        header["features"], header["steps"] = _address(features), _address(steps)
        header["places"], header["num_sources"] = _address(places), len(places)
        header["num_features"], header["num_steps"] = len(features), len(steps)
        header["widest"], header["stride"] = self._program.widest, stride
        return header


@dataclass(frozen=True, kw_only=True)
class _Bound:
    """Programs for batches whose keys come in one order.

    Args:
        whole: the address of that of all features.
        alone: for each (table, feature) the address of its own, its width, and its key's place.
        held: what the addresses are of.
    """

    whole: int
    alone: Sequence[tuple[int, int, int]]
    held: Sequence[np.ndarray]


def _ids(features: KeyedJaggedTensor) -> Tensor:
    values = features.values()
    if values.dtype is torch.int64 and values.is_contiguous():
        return values
    return values.to(torch.int64).contiguous()


def _address(array: np.ndarray) -> int:
    return int(array.ctypes.data)
