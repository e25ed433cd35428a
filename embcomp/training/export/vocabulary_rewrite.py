"""Drops pruned ids from the vocabulary itself, so that an artefact needs no record of them.

A pruning method leaves tables whose dropped ids share one row, and a bitmap that says which they
are. Here the ids that are left are numbered anew instead, in their old order: 0 stays the missing
value, 1 the unseen one, and kept values follow from 2. A dropped value is an unseen one from now
on: it is not in the vocabulary, so the encoder gives it id 1. The row of id 1 stands for all of them
and becomes the mean of what they had, weighted by how often each occurs in the train split.

Rows of data without a dropped or unseen value are therefore scored as before; the others change.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.backends.base import BackendConfig, MethodState
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.group_states import GroupState
from embcomp.collection.plan import ResolvedPlan
from embcomp.collection.sourced import SourcedTables
from embcomp.data_pipelines.frequencies import id_counts
from embcomp.data_pipelines.schema import FIRST_ID, UNSEEN_ID, DatasetInfo
from embcomp.errors import ConfigError
from embcomp.layers.block_work import rows_averaged
from embcomp.layers.followed_ids import taken
from embcomp.layers.kept_ids import KeptIds
from embcomp.layers.row_sources import ComputedRows, RowSource, as_rows
from embcomp.serving.artefact_folder import RewrittenDataset
from embcomp.training.export.renumbered_vocabulary import RenumberedVocabulary

_CHUNK = 1 << 16  # ids that are looked at together


@dataclass(frozen=True, kw_only=True)
class Renumbering:
    """New ids of one feature, in 1.25 bits for each old one.

    Attributes:
        stays: the old ids that keep a row of their own, and those for missing and unseen values.
        weights: (old num_embeddings,) float64, what each old id counts in the row of id 1; zero
            for ids that keep a row of their own.
    """

    stays: KeptIds
    weights: RowSource

    @classmethod
    def of(cls, pruned: RowSource, counts: Tensor | None) -> Renumbering:
        """Number the ids that are left.

        Args:
            pruned: (num_embeddings,) bool.
            counts: (num_embeddings,) occurrences in the train split; None weighs all ids equally.
        """

        def is_left(start: int, stop: int) -> Tensor:
            return ~pruned.read(start, stop) | (torch.arange(start, stop) < FIRST_ID)

        stays = KeptIds.of(ComputedRows(pruned.shape, torch.bool, is_left, of=[pruned]))
        return cls(stays=stays, weights=_weights(stays, counts))

    @property
    def size(self) -> int:
        """How many ids are left."""
        return len(self.stays)

    @property
    def dropped(self) -> int:
        """How many values leave the vocabulary."""
        return self.stays.num_ids - self.size

    def new_ids(self, old: Tensor) -> Tensor:
        """(n,) int64 the new ids of old ones."""
        places = self.stays.places(old.long())
        return torch.where(places < 0, UNSEEN_ID, places)


def _weights(stays: KeptIds, counts: Tensor | None) -> RowSource:
    """What ids count in the row of those that leave; all of these alike where none occurs."""

    def merged(start: int, stop: int) -> Tensor:
        return ~stays.mask(start, stop) | (torch.arange(start, stop) == UNSEEN_ID)

    def occurs(start: int, stop: int) -> Tensor:
        found = torch.ones(stop - start) if counts is None else counts[start:stop]
        return torch.where(merged(start, stop), found.double(), 0.0)

    def own(start: int, stop: int) -> Tensor:
        return occurs(start, stop) if traffic else merged(start, stop).double()

    ranges = list(_ranges(stays.num_ids))
    traffic = sum(float(occurs(*each).sum()) for each in ranges)
    total = traffic or sum(float(own(*each).sum()) for each in ranges)
    return ComputedRows((stays.num_ids,), torch.float64, lambda a, b: own(a, b) / total)


def _ranges(count: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """A model and a dataset without the pruned ids.

    Attributes:
        model: the network around renumbered tables.
        dataset: what changes in the dataset's description and vocabularies.
        features: the renumbering of each feature that has one.
    """

    model: nn.Module
    dataset: RewrittenDataset
    features: Mapping[str, Renumbering]

    def encode(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """A batch of old ids as the new encoder would have made it."""
        values = sparse.values().clone()
        for key, low, high in _spans(sparse):
            if key in self.features:
                values[low:high] = self.features[key].new_ids(values[low:high]).to(values.dtype)
        return KeyedJaggedTensor(
            keys=sparse.keys(),
            values=values,
            lengths=sparse.lengths(),
            stride=sparse.stride(),
            length_per_key=sparse.length_per_key(),
        )

    def unchanged(self, sparse: KeyedJaggedTensor) -> Tensor:
        """(B,) bool: rows of a batch of old ids without a dropped or unseen value."""
        stays = torch.ones(sparse.stride(), dtype=torch.bool)
        lengths = sparse.lengths().view(len(sparse.keys()), -1).long()
        for n, (key, low, high) in enumerate(_spans(sparse)):
            if key in self.features:
                changed = self.features[key].new_ids(sparse.values()[low:high]) == UNSEEN_ID
                rows = torch.arange(len(stays)).repeat_interleave(lengths[n])
                stays[rows[changed]] = False
        return stays


def _spans(sparse: KeyedJaggedTensor) -> list[tuple[str, int, int]]:
    ends = sparse.offset_per_key()
    return list(zip(sparse.keys(), ends[:-1], ends[1:]))


def rewrite_vocabulary(model: nn.Module, info: DatasetInfo) -> Rewrite:
    """Renumber the features whose tables lost rows.

    Args:
        model: unsharded, of `embcomp.models`.
        info: its dataset, with vocabularies.

    Raises:
        ConfigError: nothing was pruned, or a feature's other tables do not store a row per id.
    """
    children = dict(model.named_children())
    main = children.get("tables")
    if not isinstance(main, (CompressedEmbeddingBagCollection, SourcedTables)):
        raise ConfigError("--rewrite-vocabulary: the model has no embedding tables")
    main = main.compact()
    counts = {name: torch.from_numpy(count) for name, count in id_counts(info).items()}
    pruned: dict[str, Tensor | RowSource] = {}
    for each in main.states():
        pruned |= each.form.config.pruned_ids(each.tables, each.form)
    if not pruned:
        raise ConfigError(
            "--rewrite-vocabulary: no table has pruned rows, so there is nothing to drop"
        )
    features = {
        name: Renumbering.of(as_rows(mask), counts.get(name)) for name, mask in pruned.items()
    }
    _check_vocabularies(info, features)
    rewritten = copy.copy(model)
    rewritten._modules = dict(model._modules)
    rewritten.add_module("tables", renumbered(main, features))
    first_order = children.get("first_order_tables")
    if isinstance(first_order, (CompressedEmbeddingBagCollection, SourcedTables)):
        rewritten.add_module("first_order_tables", renumbered(first_order.compact(), features))
    return Rewrite(model=rewritten, dataset=_dataset(info, features, counts), features=features)


def _check_vocabularies(info: DatasetInfo, features: Mapping[str, Renumbering]) -> None:
    for feature in info.categorical:
        if feature.name in features and not feature.vocabulary:
            raise ConfigError(
                f"--rewrite-vocabulary: feature {feature.name!r} has no vocabulary to rewrite"
            )


def renumbered(
    collection: CompressedEmbeddingBagCollection | SourcedTables,
    features: Mapping[str, Renumbering],
) -> SourcedTables:
    """A compacted collection for the new ids; its rows are read from the old ones.

    Args:
        collection: of serving forms.
        features: the renumbering of single tables, by name.
    """
    configs = [
        dataclasses.replace(config, num_embeddings=features[config.name].size)
        if config.name in features
        else config
        for config in collection.embedding_bag_configs()
    ]
    specs = {
        spec.name: dataclasses.replace(spec, num_embeddings=config.num_embeddings)
        for spec, config in zip(collection.plan.tables, configs)
    }
    forms = [_renumbered_form(each, features) for each in collection.states()]
    moved = [
        GroupState(tables=[specs[t.name] for t in each.tables], form=each.form) for each in forms
    ]
    methods: dict[str, BackendConfig] = {
        table.name: each.form.config for each in moved for table in each.tables
    }
    return SourcedTables.of_states(configs, ResolvedPlan(tuple(specs.values()), methods), moved)


def _renumbered_form(each: GroupState, features: Mapping[str, Renumbering]) -> GroupState:
    config, form = each.form.config, each.form
    own = [table for table in each.tables if table.name in features]
    if not own:
        return each
    try:
        places = config.rows_by_id(each.tables, form)
    except ConfigError:
        raise ConfigError(
            f"--rewrite-vocabulary: {', '.join(t.name for t in own)} are also held by "
            f"{config.name}, whose rows follow from the old ids; export without it"
        ) from None
    tensors: dict[str, Tensor | RowSource] = {}
    for table in each.tables:
        rows, place = form.rows(table.name), as_rows(places[table.name])
        renumbering = features.get(table.name)
        if renumbering is None:
            tensors[f"rows.{table.name}"] = rows
            continue
        tensors[f"rows.{table.name}"] = _moved(rows, place, renumbering)
    whole = MethodState.of(config.without_pruning(each.tables), tensors)
    return GroupState(tables=each.tables, form=whole)


def _moved(rows: RowSource, place: RowSource, renumbering: Renumbering) -> RowSource:
    """A table's rows in the order of the new ids, the mean of what is dropped in that of id 1."""
    unseen = _mean_row(rows, place, renumbering.weights)

    def read(start: int, stop: int) -> Tensor:
        found = taken(rows, _of_rising(place, renumbering.stays.ids(start, stop)))
        if start <= UNSEEN_ID < stop:
            found[UNSEEN_ID - start] = unseen
        return found

    return ComputedRows((renumbering.size, rows.shape[1]), rows.dtype, read, of=[rows])


def _of_rising(numbers: RowSource, ids: Tensor) -> Tensor:
    """What numbers are of some ids, which rise; read in ranges, whatever lies between them."""
    found, done = [numbers.read(0, 0)], 0
    while done < len(ids):
        first = int(ids[done])
        end = int(torch.searchsorted(ids, first + _CHUNK))
        own = ids[done:end]
        found.append(numbers.read(first, int(own[-1]) + 1)[own - first])
        done = end
    return torch.cat(found)


def _mean_row(rows: RowSource, place: RowSource, weights: RowSource) -> Tensor:
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for ids, own in _weighted(weights, rows_averaged(rows)):
        total += own @ taken(rows, _of_rising(place, ids)).double()
    return total.to(rows.dtype)


def _weighted(weights: RowSource, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The ids that weigh something and what they weigh, so many at a time."""
    ids = torch.empty(0, dtype=torch.int64)
    own = torch.empty(0, dtype=torch.float64)
    for start, stop in _ranges(len(weights)):
        found = weights.read(start, stop)
        places = found.nonzero()[:, 0]
        ids, own = torch.cat([ids, places + start]), torch.cat([own, found[places]])
        while len(ids) >= at_once:
            yield ids[:at_once], own[:at_once]
            ids, own = ids[at_once:], own[at_once:]
    if len(ids):
        yield ids, own


def _dataset(
    info: DatasetInfo, features: Mapping[str, Renumbering], counts: Mapping[str, Tensor]
) -> RewrittenDataset:
    changed = info.model_copy(deep=True)
    vocabularies: dict[str, Callable[[Path], None]] = {}
    for feature in changed.categorical:
        renumbering = features.get(feature.name)
        if renumbering is None:
            continue
        vocabulary = RenumberedVocabulary(info.folder / feature.vocabulary, renumbering.new_ids)
        vocabularies[feature.name] = vocabulary.write
        values, size = vocabulary.values(), renumbering.size
        if feature.room is not None:
            # Both at once, as each alone would contradict the other.
            feature.__dict__.update(num_embeddings=size, room=size - FIRST_ID - values)
        else:
            feature.num_embeddings = size
        feature.frequency_quantiles = _quantiles(
            feature.frequency_quantiles, counts[feature.name], renumbering
        )
        for split in changed.splits.values():
            split.unseen_rate.pop(feature.name, None)  # it rose, by what nobody has counted
    return RewrittenDataset(info=changed, vocabularies=vocabularies)


def _quantiles(old: Mapping[str, int], counts: Tensor, renumbering: Renumbering) -> dict[str, int]:
    """For each share, the first new id up to which so much of the traffic goes."""
    stays = renumbering.stays
    total = left = 0
    for start, stop in _ranges(stays.num_ids):
        own = counts[start:stop].to(torch.int64)
        total += int(own.sum())
        left += int(own[~stays.mask(start, stop)].sum())
    found, before = dict.fromkeys(old, 0), 0
    for start, stop in _ranges(stays.num_ids):
        own = counts[start:stop].to(torch.int64)[stays.mask(start, stop)]
        if start <= UNSEEN_ID < stop:
            own[UNSEEN_ID - start] += left
        reached = own.cumsum(0) + before
        shares = (reached.double() / max(1, total)).numpy()
        for share in old:
            found[share] += int(np.searchsorted(shares, float(share)))
        before += int(own.sum())
    return {share: min(renumbering.size - 1, place) for share, place in found.items()}
