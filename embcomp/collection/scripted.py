"""What TorchScript compiles in the place of `route` and `combine`, where every id has a row of its own.

Routes that hash, and combines that compute, are not written in TorchScript's Python; a program of theirs
is exported by torch.export (`embcomp export --format pt2`).

TorchScript reads the annotations of attributes as they are, so that in this module they are no strings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from typing_extensions import override

from embcomp.collection.groups import Group, TableFeature
from embcomp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PlainLookup:
    """One (table, feature) whose ids are rows of one physical table.

    Args:
        instance: the pair.
        key: what the inner collection calls its look-up.
    """

    instance: TableFeature
    key: str


def plain_lookups(groups: Sequence[Group]) -> list[PlainLookup]:
    """The look-ups of methods that look ids up as they are.

    Raises:
        ConfigError: for any other method, by name.
    """
    found: list[PlainLookup] = []
    for group in groups:
        whole = all(group.config.holds_whole(table) for table in group.tables)
        if not whole or not isinstance(group.backend.combine, nn.Identity):
            names = ", ".join(table.name for table in group.tables)
            raise ConfigError(
                f"TorchScript cannot compile the look-ups of {names}, which {group.config.name} holds, but only "
                "those of full tables; export a program instead (embcomp.save, embcomp export --format pt2)"
            )
        pairs = zip(group.instances, group.backend.keys)
        found += [PlainLookup(instance=instance, key=key) for instance, key in pairs]
    return found


def _most_bags(features: dict[str, JaggedTensor]) -> int:
    most = 0
    for feature in features.values():
        most = max(most, feature.lengths().numel())
    return most


class ScriptedRoute(nn.Module):
    """Picks features by name and refuses ids that are not rows.

    Args:
        lookups: in the order of the look-ups.
        is_weighted: whether ids carry weights.
    """

    _features: list[str]
    _keys: list[str]
    _limits: list[int]

    def __init__(self, lookups: Sequence[PlainLookup], *, is_weighted: bool) -> None:
        super().__init__()
        self._features = [lookup.instance.feature for lookup in lookups]
        self._keys = [lookup.key for lookup in lookups]
        self._limits = [lookup.instance.table.num_embeddings for lookup in lookups]
        self._is_weighted = is_weighted

    def _select(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        found: dict[str, JaggedTensor] = features.to_dict()
        inverse = features.inverse_indices_or_none()
        most = _most_bags(found)
        values: list[Tensor] = []
        lengths: list[Tensor] = []
        weights: list[Tensor] = []
        for n, name in enumerate(self._features):
            if name not in found:
                raise ValueError("expected feature " + name + ", which the batch lacks")
            ids = found[name].values()
            if bool(((ids < 0) | (ids >= self._limits[n])).any()):
                limit = str(self._limits[n])
                raise ValueError("an id of feature " + name + " is not in [0, " + limit + ")")
            values.append(ids)
            own = found[name].lengths()
            if inverse is not None:  # features have numbers of bags of their own
                own = torch.nn.functional.pad(own, [0, most - own.numel()])
            lengths.append(own)
            if self._is_weighted:
                weights.append(found[name].weights())
        return KeyedJaggedTensor(
            keys=self._keys,
            values=torch.cat(values),
            weights=torch.cat(weights) if self._is_weighted else None,
            lengths=torch.cat(lengths),
        )

    def _bags_of_rows(self, features: KeyedJaggedTensor) -> Tensor | None:
        """(look-ups, B) which of its feature's bags each row has; None where it is the row's own."""
        inverse = features.inverse_indices_or_none()
        if inverse is None:
            return None
        names, rows = inverse
        return rows[torch.tensor([names.index(name) for name in self._features])]


class ScriptedPooledRoute(ScriptedRoute):
    """The look-ups of bags that TorchRec pools."""

    @override
    def forward(
        self, features: KeyedJaggedTensor
    ) -> tuple[KeyedJaggedTensor, KeyedJaggedTensor | None, KeyedJaggedTensor]:
        own = self._select(features)
        rows = self._bags_of_rows(features)
        if rows is None:
            return own, None, own
        shared = KeyedJaggedTensor(
            keys=self._keys,
            values=own.values(),
            lengths=own.lengths(),
            inverse_indices=(self._keys, rows),
        )
        return own, None, shared


class ScriptedUnpooledRoute(ScriptedRoute):
    """The look-ups of single ids, as bags of one, the keys padded by empty bags to one stride."""

    @override
    def forward(
        self, features: KeyedJaggedTensor
    ) -> tuple[KeyedJaggedTensor | None, KeyedJaggedTensor, KeyedJaggedTensor]:
        own = self._select(features)
        counts = own.length_per_key()
        stride = max(1, max(counts))
        lengths: list[Tensor] = []
        for count in counts:
            row = torch.arange(stride, device=own.values().device)
            lengths.append((row < count).to(torch.int32))
        ones = KeyedJaggedTensor(keys=self._keys, values=own.values(), lengths=torch.cat(lengths))
        return None, ones, own


class ScriptedPooled(nn.Module):
    """Puts looked-up bags in the order declared, padding cut off, averaged where the table says so.

    Args:
        lookups: in the order of the look-ups.
        instances: the pairs in the order declared.
    """

    _lookups: list[str]
    _keys: list[str]
    _places: list[int]
    _dims: list[int]
    _means: list[bool]

    def __init__(self, lookups: Sequence[PlainLookup], instances: Sequence[TableFeature]) -> None:
        super().__init__()
        places = {lookup.instance.pair: n for n, lookup in enumerate(lookups)}
        self._places = [places[instance.pair] for instance in instances]
        self._lookups = [lookups[place].key for place in self._places]
        self._keys = [instance.key for instance in instances]
        self._dims = [instance.table.embedding_dim for instance in instances]
        self._means = [instance.table.mean_pooling for instance in instances]

    @override
    def forward(
        self,
        pooled: KeyedTensor,
        unpooled: KeyedTensor | None,
        features: KeyedJaggedTensor,
    ) -> KeyedTensor:
        found: dict[str, Tensor] = pooled.to_dict()
        lengths = features.lengths().view(len(features.keys()), -1)  # (look-ups, bags)
        inverse = features.inverse_indices_or_none()
        parts: list[Tensor] = []
        for n, key in enumerate(self._lookups):
            part = found[key].narrow(1, 0, self._dims[n])
            if self._means[n]:
                part = part / lengths[self._places[n]].clamp(min=1).unsqueeze(1)
            if inverse is not None:
                part = part.index_select(0, inverse[1][self._places[n]])
            parts.append(part)
        return KeyedTensor(
            keys=self._keys, length_per_key=self._dims, values=torch.cat(parts, dim=1)
        )


class ScriptedUnpooled(nn.Module):
    """Hands looked-up rows out under the keys declared.

    Args:
        lookups: in the order of the look-ups.
        instances: the pairs in the order declared.
        need_indices: whether the ids go along, as weights.
    """

    _lookups: list[str]
    _keys: list[str]
    _dims: list[int]

    def __init__(
        self,
        lookups: Sequence[PlainLookup],
        instances: Sequence[TableFeature],
        *,
        need_indices: bool,
    ) -> None:
        super().__init__()
        own = {lookup.instance.pair: lookup.key for lookup in lookups}
        self._lookups = [own[instance.pair] for instance in instances]
        self._keys = [instance.key for instance in instances]
        self._dims = [instance.table.embedding_dim for instance in instances]
        self._need_indices = need_indices

    @override
    def forward(
        self,
        pooled: KeyedTensor | None,
        unpooled: KeyedTensor,
        features: KeyedJaggedTensor,
    ) -> dict[str, JaggedTensor]:
        rows: dict[str, Tensor] = unpooled.to_dict()
        bags: dict[str, JaggedTensor] = features.to_dict()
        found: dict[str, JaggedTensor] = {}
        for n, key in enumerate(self._lookups):
            ids = bags[key].values()
            found[self._keys[n]] = JaggedTensor(
                values=rows[key].narrow(1, 0, self._dims[n]).narrow(0, 0, ids.numel()),
                lengths=bags[key].lengths(),
                weights=ids if self._need_indices else None,
            )
        return found


class ScriptedBags(nn.Module):
    """A pooled collection of full tables, for TorchScript.

    Args:
        route: a `ScriptedPooledRoute`.
        rows: TorchRec's collection.
        combine: a `ScriptedPooled`.
    """

    def __init__(self, route: nn.Module, rows: nn.Module, combine: nn.Module) -> None:
        super().__init__()
        self.route, self.rows, self.combine = route, rows, combine

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        x = self.route(features)
        return self.combine(self.rows(x[0]), None, x[2])


class ScriptedRows(nn.Module):
    """An unpooled collection of full tables, for TorchScript.

    Args:
        route: a `ScriptedUnpooledRoute`.
        unpooled_rows: TorchRec's collection.
        combine: a `ScriptedUnpooled`.
    """

    def __init__(self, route: nn.Module, unpooled_rows: nn.Module, combine: nn.Module) -> None:
        super().__init__()
        self.route, self.unpooled_rows, self.combine = route, unpooled_rows, combine

    @override
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        x = self.route(features)
        return self.combine(None, self.unpooled_rows(x[1]), x[2])
