"""The one interface behind which every compression method stands.

A method is three things: a **route** from ids to the ids of physical rows, **physical tables** that
TorchRec holds, shards and trains, and a **combine** from looked-up rows to embeddings. It serves a
group of logical tables at once, so that the number of kernels does not grow with their number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from embcomp.backends.stages import Stage
from embcomp.errors import BudgetError, ConfigError
from embcomp.io.constraints import Constrained
from embcomp.io.lazy_names import warn_renamed
from embcomp.layers.block_work import IN_MEMORY, Work
from embcomp.layers.followed_ids import FollowedIds, RowMove
from embcomp.layers.row_sources import MemoryRows, RowSource
from embcomp.tables.budget import parse_budget
from embcomp.tables.footprint import Footprint, footprint_of
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The parts of a method, built for one group of tables; the collection registers them.

    Args:
        physical_tables: what TorchRec holds. Bags are summed there.
        keys: the physical look-ups, in the order in which `combine` wants their columns.
        route: module from the group's features, one key for each (table, feature) in order, to
            the physical look-ups, always the same keys in the same order. It holds no parameters
            and no buffers but learnt ones (`embcomp.layers.constant_tensors`,
            `embcomp.layers.learned_buffers`), and never touches the weights.
        combine: module from looked-up rows `(B, sum of physical dims)` to embeddings
            `(B, sum of logical dims)`, one for each (table, feature) in order. One that has `each`
            (`rows_by_key.CombinesEach`) takes features of different lengths without padding.
        needs_unpooled_rows: True when `combine` is not linear in the rows, so that it must see them one by
            one, before bags are pooled.
        ids_per_value: how many physical ids `route` makes of one id within one key.
        needs_context: True when `combine` is called with the rows and a `lookup_context.LookupContext`, which
            knows the logical ids and the samples that they were looked up for. Only with
            `needs_unpooled_rows`.
        skips_negative_ids: True when `route` gives a negative id where an id has no row under a key: nothing
            is looked up there, and zeros stand for it. Of several `ids_per_value` each may be negative.
        sees_every_row: True when what `combine` draws or learns in training depends on how often a batch has
            a value. Bags that rows share are then repeated before they are looked up, in training.
    """

    physical_tables: Sequence[PhysicalTable]
    keys: Sequence[str]
    route: nn.Module
    combine: nn.Module
    needs_unpooled_rows: bool = False
    ids_per_value: int = 1
    needs_context: bool = False
    skips_negative_ids: bool = False
    sees_every_row: bool = False


@dataclass(frozen=True, kw_only=True)
class BackendConfig(Constrained, ABC):
    """What a method needs to know about a group of tables that share it.

    What a setting may be is said in its annotation (`embcomp.io.constraints`).

    Args:
        budget: serving bytes for the group, as `"64MiB"`, a number of bytes, or a share of the
            full tables as `"10%"`. The method's size follows from it.
    """

    budget: str | int | None = None

    name: ClassVar[str]
    """The method's name in a configuration file."""
    size_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that fix the method's size, one of which may be given, or a budget."""
    learns_size: ClassVar[bool] = False
    """Whether the serving form is found by training, so that its predicted bytes are a bound."""
    approximates: ClassVar[bool] = False
    """Whether `approximate` makes it of trained full tables."""
    compresses: ClassVar[bool] = True
    """Whether it stores tables in another way than they are; only the full table does not."""
    hashes_ids: ClassVar[bool] = False
    """Whether its size does not depend on how many ids there are, so that these may be hashes of values."""
    hashes_small: ClassVar[bool] = False
    """Whether the method could hash small tables too, where `collisionless` keeps them full."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            parse_budget(self.budget)
        given = [key for key in (*self.size_fields, "budget") if self.__dict__[key] is not None]
        if len(given) > 1:
            raise ConfigError(
                f"{self.name}: expected one of {self._size_choices}; got {' and '.join(given)}"
            )

    @classmethod
    def owner(cls) -> str:
        """What errors begin with: the method's name."""
        return f"{cls.name}: "

    @property
    def _size_choices(self) -> str:
        return ", ".join((*self.size_fields, "budget"))

    @property
    def size(self) -> dict[str, float | int]:
        """The size field that is given, or nothing where the size is still open."""
        given = {key: self.__dict__[key] for key in self.size_fields}
        return {key: value for key, value in given.items() if value is not None}

    def require_size(self) -> None:
        """Raise a ConfigError where the size is still open."""
        if self.size_fields and not self.size:
            raise ConfigError(
                f"{self.name}: the size is open; give one of {self._size_choices}, "
                "or give the plan a budget"
            )

    def with_size(self, **size: float) -> Self:
        """This configuration with one size field set, in place of any other and of the budget."""
        cleared: dict[str, object] = dict.fromkeys((*self.size_fields, "budget"))
        return replace(self, **(cleared | size))  # type: ignore[arg-type]

    def named_tables(self) -> Sequence[str]:
        """Names of tables in the method's settings; there must be such tables."""
        return ()

    def for_tables(self, tables: Sequence[TableSpec]) -> Self:
        """This configuration without its settings for single tables other than these.

        Such settings are mappings by a table's name.
        """
        names = {table.name for table in tables}
        cut: dict[str, Any] = {
            entry.name: {name: value for name, value in given.items() if name in names}
            for entry in fields(self)
            if isinstance(given := self.__dict__[entry.name], Mapping)
            and all(isinstance(name, str) for name in given)
            and not names.issuperset(given)
        }
        return replace(self, **cut) if cut else self

    def missing(self) -> str | None:
        """What training needs that is not installed, and the way out; None where nothing is missing."""
        return None

    @abstractmethod
    def keeps_full(self, table: TableSpec) -> bool:
        """Whether compressing this table would not shrink it, so that it stays as it is."""

    @abstractmethod
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        """The physical tables for tables that are compressed. Nothing is allocated."""

    @abstractmethod
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        """The method's parts for tables that are compressed. Nothing big is allocated."""

    @abstractmethod
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        """The largest configuration of at most `budget` serving bytes; None if there is none."""

    @abstractmethod
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        """The configuration of the fewest serving bytes that the method can reach."""

    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        """What the method stores beside its physical tables, for tables that are compressed."""
        return Footprint()

    def stores_together(self, tables: Sequence[TableSpec]) -> bool:
        """Whether these tables share what is stored, so that it is not what each would store alone.

        Args:
            tables: some of a group, those that stay full included.
        """
        if len(tables) < 2:
            return False
        alone = [_stored(self.for_tables([table]), [table]) for table in tables]
        apart = sorted(tensor for each in alone for tensor in each)
        names = {name for name, *_ in apart}
        return len(names) < len(apart) or apart != sorted(_stored(self.for_tables(tables), tables))

    def joins(self, tables: Sequence[TableSpec]) -> bool:
        """Whether what is drawn or stored depends on the order of these tables, so that it is that of names.

        The parts of other methods have tables as declared, and no keys need be permuted.
        """
        return True

    def columns(self, table: TableSpec) -> int | None:
        """Columns of a table's rows, where these, padded by zeros, are the embeddings.

        None where embeddings are made in another way, or where training decides on the columns. A
        method that answers also has `with_widths`.
        """
        return None

    def holds_whole(self, table: TableSpec) -> bool:
        """Whether row i of the physical table of a table's own name belongs to id i, at full width.

        Such a table is stored as TorchRec stores it, whatever else the method learns beside it.
        """
        return self.columns(table) == table.embedding_dim and not self.is_pruned(table)

    def is_pruned(self, table: TableSpec) -> bool:
        """Whether some of a table's ids are to have no row of their own."""
        return False

    def with_widths(self, widths: Mapping[str, int]) -> BackendConfig:
        """The method that stores a row of so many columns for each id of some tables.

        Args:
            widths: columns by table.

        Raises:
            ConfigError: for a method whose tables are not described by columns.
        """
        raise ConfigError(
            f"{self.name}: {', '.join(widths)} cannot be stored as rows of so many columns; "
            "low_dim rows can"
        )

    def codeword_count(self, table: TableSpec, tables: Sequence[TableSpec]) -> int | None:
        """Codewords that a table's ids may name; None where rows are not made of codewords.

        Args:
            table: one of `tables`.
            tables: the group, without those that stay full.
        """
        return None

    @property
    def is_serving_form(self) -> bool:
        """Whether `compact` has nothing to do, so that what is trained is what is served."""
        return type(self).compact is BackendConfig.compact

    def stages(self) -> tuple[Stage, ...]:
        """The method's life; most methods are trained once, and that is all."""
        return (Stage(name="train"),)

    def first_method(self) -> BackendConfig:
        """The method that holds the tables in the first stage."""
        return self

    def training_forms(self, tables: Sequence[TableSpec]) -> tuple[BackendConfig, ...]:
        """The methods that hold the tables in training, one after another, as far as is known.

        Where training finds a form, one that takes no less stands for it.

        Args:
            tables: the group, without those that stay full.
        """
        first = self.first_method()
        return (self,) if first == self else (first, self)

    @property
    def needs_ranked_ids(self) -> bool:
        """Whether ids must be ranked by frequency, the most frequent first: see `check_ids`."""
        return False

    def check_ids(self, tables: Sequence[TableSpec], counts: Mapping[str, Tensor]) -> None:
        """Raise a ConfigError where ids that must be ranked by frequency are not.

        Args:
            tables: the group, without those that stay full.
            counts: for each table, (num_embeddings,) how often each id occurs; nothing is checked
                of tables that nobody counted.
        """

    def check_vocabularies(self, tables: Sequence[TableSpec], digests: Mapping[str, str]) -> None:
        """Raise a ConfigError where what the method was given is for ids that mean other values.

        Args:
            tables: the group, without those that stay full.
            digests: for each table that has a vocabulary, the SHA-256 of its file.
        """

    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        """The form in which a stage after the first begins.

        Args:
            stage: one of `stages()`, not the first.
            tables: the group, without those that stay full.
            past: what earlier stages left.
        """
        return past.before

    def fit_rows(
        self, tables: Sequence[TableSpec], budget: int, past: StageInputs
    ) -> BackendConfig:
        """The configuration within a budget that approximates these rows best, as far as is known.

        Args:
            tables: the whole group, those that will stay full included.
            budget: serving bytes.
            past: the full tables, and what else is known of them.

        Raises:
            BudgetError: when even the smallest configuration is larger; the text names it.
        """
        return self.fit_budget(tables, budget)

    def approximate(self, tables: Sequence[TableSpec], past: StageInputs) -> MethodState:
        """The best approximation of full tables, in the serving form, without any training.

        Args:
            tables: the group, without those that stay full.
            past: the full tables, and what else is known of them.

        Raises:
            ConfigError: for a method whose rows only training finds.
        """
        raise ConfigError(f"{self.name}: its rows cannot be made of those of trained full tables")

    def search(
        self, stage: Stage, tables: Sequence[TableSpec], context: SearchContext
    ) -> Mapping[str, Any]:
        """Run a stage of the kind `search`; what it finds, as JSON values."""
        raise NotImplementedError(f"{self.name} has no search stage")

    def structure_optimizer(
        self, stage: Stage, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Optimizer | None:
        """What updates the parameters of `combine`; None leaves them to the dense optimizer."""
        return None

    def slice_columns(
        self, tables: Sequence[TableSpec], form: MethodState, widths: Mapping[str, int]
    ) -> MethodState:
        """Trained tables cut to fewer columns, where every prefix of a row was trained to serve.

        Args:
            tables: the group, without those that stay full.
            form: a form of this method.
            widths: columns by table; tables that are not named stay as they are.

        Raises:
            ConfigError: for a table or a width that is not there, or a method that cannot.
        """
        raise ConfigError(
            f"{self.name}: {', '.join(widths)} cannot be cut to fewer columns, as its rows were not "
            "trained for that; matryoshka rows are, unless a budget has already cut them"
        )

    def slice_form(
        self, tables: Sequence[TableSpec], form: MethodState, widths: Mapping[str, int]
    ) -> MethodState:
        """The old name of `slice_columns`."""
        warn_renamed("slice_form", "slice_columns")
        return self.slice_columns(tables, form, widths)

    def pruned_ids(
        self, tables: Sequence[TableSpec], form: MethodState
    ) -> Mapping[str, Tensor | RowSource]:
        """For tables that lost rows, (num_embeddings,) bool which ids did; for `embcomp inspect`.

        Args:
            tables: the group, without those that stay full.
            form: a form of this method; its rows may be missing.
        """
        return {}

    def rows_by_id(
        self, tables: Sequence[TableSpec], form: MethodState
    ) -> Mapping[str, Tensor | RowSource]:
        """For each table, (num_embeddings,) int64 the row of `rows.<table>` that an id looks up.

        It is asked where ids are to be numbered anew, which takes rows that can be moved.

        Args:
            tables: the group, without those that stay full.
            form: a form of this method.

        Raises:
            ConfigError: for a method that computes rows from ids.
        """
        raise ConfigError(
            f"{self.name}: the rows of {', '.join(table.name for table in tables)} follow from "
            "their ids, which cannot be numbered anew; those of full and low_dim tables can"
        )

    def without_pruning(self, tables: Sequence[TableSpec]) -> BackendConfig:
        """The method for these tables once all ids that are left have a row of their own.

        Args:
            tables: the group, without those that stay full.
        """
        return self

    @property
    def needs_same_numbers(self) -> bool:
        """Whether rows follow from ids, so that a later run needs values to keep their numbers."""
        return False

    @classmethod
    def can_follow(cls) -> bool:
        """Whether `follow_ids` is answered."""
        return cls.follow_ids is not BackendConfig.follow_ids

    def follow_ids(self, past: FollowInputs) -> FollowedForm:
        """What an earlier run's form becomes where ids are those of another dataset.

        Args:
            past: that form, and where today's ids come from. Where `needs_same_numbers`, all values that
                were known before have the numbers that they had.

        Raises:
            ConfigError: for a method whose rows cannot follow.
        """
        raise ConfigError(
            f"{self.name}: the rows of {', '.join(table.name for table in past.tables)} cannot follow "
            "their values into another dataset; train them anew, or take another method"
        )

    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """The serving form: the same answers from nothing but what must be resident for them.

        Args:
            tables: the group, without those that stay full.
            form: a form of this method; rows are read by range, and long results left to `form.work`.
        """
        return form

    def footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        """Exact bytes for these tables, those that stay full included. Nothing is allocated.

        Raises:
            ConfigError: when the size is still open.
        """
        self.require_size()
        small = [table for table in tables if not self.keeps_full(table)]
        total = footprint_of(full_table(table) for table in tables if self.keeps_full(table))
        if small:
            total += footprint_of(self.physical_tables(small)) + self.dense_footprint(small)
        return total

    def fit_budget(self, tables: Sequence[TableSpec], budget: str | int) -> Self:
        """The largest configuration of this method whose serving bytes stay within a budget.

        Args:
            tables: the whole group, those that will stay full included.
            budget: bytes, or a share of what the full tables take.

        Raises:
            BudgetError: when even the smallest configuration is larger; the text names it.
        """
        full = sum(table.full_bytes for table in tables)
        allowed = parse_budget(budget, full_bytes=full)
        found = self.largest_within(tables, allowed)
        if found is None:
            smallest = self.smallest(tables)
            floor = smallest.footprint(tables).serve_bytes
            raise BudgetError(
                f"{self.name}: {len(tables)} table(s) of {full:,} bytes cannot be held in "
                f"{allowed:,} bytes; the smallest {self.name} reaches is {floor:,} bytes.",
                self.way_out(tables),
            )
        return found

    def way_out(self, tables: Sequence[TableSpec]) -> str:
        """What to change when a budget is below the method's floor."""
        kept = [table for table in tables if self.smallest(tables).keeps_full(table)]
        out = "Raise the budget, or choose a method with a lower floor (hash, unified)."
        if kept:
            size = sum(table.full_bytes for table in kept)
            out += f" {len(kept)} small table(s) stay full and take {size:,} of these bytes"
            out += "; a lower collisionless would hash them too." if self.hashes_small else "."
        return out


@dataclass(frozen=True, kw_only=True)
class MethodState:
    """A method at one moment of its life, with the tensors of its group of tables.

    Args:
        config: the method that holds the tables now.
        tensors: `rows.<physical table>` (true width), and what is in the state dicts of the
            method's own modules as `route.<name>` and `combine.<name>`. An empty mapping
            stands for fresh weights. There may be more than the method asked for.
        sources: those of them that are not in memory, but read by range.
        work: makes what is as long as a table when this form becomes another, outside stages.
        counts: for each table, (num_embeddings,) how often each id occurs, as `compact` was told;
            empty where nobody counted.
    """

    config: BackendConfig
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    sources: Mapping[str, RowSource] = field(default_factory=dict)
    work: Work = IN_MEMORY
    counts: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, config: BackendConfig, tensors: Mapping[str, Tensor | RowSource]) -> Self:
        """A form of tensors, each in memory or not."""
        rows = {name: each for name, each in tensors.items() if isinstance(each, RowSource)}
        inside = {name: each.tensor for name, each in rows.items() if isinstance(each, MemoryRows)}
        inside |= {name: each for name, each in tensors.items() if isinstance(each, Tensor)}
        outside = {name: each for name, each in rows.items() if name not in inside}
        return cls(config=config, tensors=inside, sources=outside)

    def rows(self, table: str) -> RowSource:
        """(rows, true width) of a physical table."""
        return self.source(f"rows.{table}")

    def source(self, name: str) -> RowSource:
        """A tensor, in memory or not, to be read by range."""
        return self.sources[name] if name in self.sources else MemoryRows(self.tensors[name])

    def in_memory(self) -> Self:
        """The same with every tensor in memory."""
        if not self.sources:
            return self
        read = {name: source.whole() for name, source in self.sources.items()}
        return replace(self, tensors={**self.tensors, **read}, sources={})


@dataclass(frozen=True, kw_only=True)
class FollowInputs:
    """What a method may look at when an earlier run's form goes on with the ids of another dataset.

    Args:
        tables: the group today.
        before: the earlier run's form of the method; what is long is read by range.
        tables_before: the group then; the same names in the same order.
        ids: by table, where its ids come from; as long as vocabularies, so read by range.
        work: does what is to be done for every block of rows, on all ranks together. Every rank
            calls `follow_ids` and makes the same calls.
    """

    tables: Sequence[TableSpec]
    before: MethodState
    tables_before: Sequence[TableSpec]
    ids: Mapping[str, FollowedIds]
    work: Work = IN_MEMORY


@dataclass(frozen=True, kw_only=True)
class FollowedForm:
    """A form whose rows come from an earlier one.

    Args:
        config: the method that holds the tables now.
        moves: by physical table, where its rows come from; those not named are as they were.
        tensors: those of `route` and `combine` that are not as they were, as in `MethodState`.
    """

    config: BackendConfig
    moves: Mapping[str, RowMove] = field(default_factory=dict)
    tensors: Mapping[str, Tensor | RowSource] = field(default_factory=dict)

    @classmethod
    def with_row_of_each_id(cls, config: BackendConfig, past: FollowInputs) -> Self:
        """The form of a method whose tables have a row for each id."""
        moves = {table.name: RowMove.of_ids(past.ids[table.name]) for table in past.tables}
        return cls(config=config, moves=moves)


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """What a method may look at when it begins a stage.

    Args:
        before: the form that the stage before left; rows are read by range.
        initial: the form of the first stage as it was before its first step, rows read by range.
        counts: for each table, (num_embeddings,) how often each id occurs in the training rows;
            empty where nobody counted.
        results: what earlier `search` stages found, by stage.
        seed: the run's seed.
        work: does what is to be done for every block of rows, on all ranks together. Every rank
            calls `start_stage` and makes the same calls.
    """

    before: MethodState
    initial: Callable[[], MethodState]
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0
    work: Work = IN_MEMORY


class SearchContext(Protocol):
    """What a `search` stage works with; the same on every rank."""

    @property
    def form(self) -> MethodState:
        """The form that the stage before left; rows are read by range."""

    @property
    def work(self) -> Work:
        """Does what is to be done for every block of rows, on all ranks together."""

    @property
    def combine(self) -> nn.Module:
        """The method's own `combine` inside the (sharded) model that `evaluate` runs."""

    @property
    def counts(self) -> Mapping[str, Tensor]:
        """How often each id of each table occurs in the training rows."""

    @property
    def seed(self) -> int:
        """The run's seed."""

    def shared(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Large tensors that one rank makes and all ranks read, in a host's memory once.

        Args:
            name: unique in the stage.
            make: called on one rank alone; it evaluates nothing.
        """

    def evaluate(self, rows: int | None = None) -> float:
        """Score the model as it is now on search-validation rows; more is better.

        Args:
            rows: the first so many rows; all of them when None.
        """

    def load(self) -> dict[str, Any] | None:
        """What `save` was last given, after an interruption; None at the beginning."""

    def save(self, progress: Mapping[str, Any]) -> None:
        """Keep JSON values that the search can go on from."""

    def say(self, text: str) -> None:
        """A line for people."""


def _stored(config: BackendConfig, tables: Sequence[TableSpec]) -> list[tuple[str, int, int, int]]:
    """What a method stores for tables: tensors by name, rows, columns and bytes of an element."""
    tensors = config.footprint(tables).tensors
    return [(each.name, each.rows, each.columns, each.itemsize) for each in tensors]


def full_table(table: TableSpec) -> PhysicalTable:
    """The physical table of an uncompressed logical one: the same name, rows and width."""
    return PhysicalTable(
        name=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        lookups=tuple(LookupKey(table.name, feature) for feature in table.feature_names),
        init_fn=table.init_fn or UniformInit(*table.init_bounds),
        data_type=table.data_type,
    )
