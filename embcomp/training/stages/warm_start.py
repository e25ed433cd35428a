"""A run that begins with what another one learnt on an earlier dataset: rows follow their raw values.

The other run's best weights, in the form in which it ended, are read by range and written to `start/`, in
the order of today's ids; what its optimizers knew goes to `start_optimizer/`. The structure (which rows and
columns are kept, codes, blocks) stays, so that of a method in stages only the last one is trained.
`warm_start.json`, written last, says what became of the rows.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embcomp.backends.base import FollowInputs, MethodState
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.group_states import GroupState
from embcomp.collection.groups import Group
from embcomp.collection.plan import ResolvedPlan
from embcomp.collection.plan_document import plan_to_document
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError
from embcomp.layers.block_work import NamedWork, Work
from embcomp.layers.followed_ids import FollowedIds, RowMove
from embcomp.layers.row_sources import RowSource
from embcomp.tables.specs import by_name
from embcomp.training.checkpoint import checked_by_ranks, read_state
from embcomp.training.distributed.process import Process
from embcomp.training.files.checkpoint_rows import CheckpointTensors
from embcomp.training.files.run_checksums import read_checked, write_checked
from embcomp.training.reporting.console import RunConsole
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.followed_tables import followed_tables
from embcomp.training.stages.handover import handover_memory, work_in
from embcomp.training.stages.left_model import LeftModel, path_of
from embcomp.training.stages.loading import best_checkpoint
from embcomp.training.stages.other_run import check_same_features, check_same_model
from embcomp.training.stages.run_context import RunContext
from embcomp.training.stages.start_files import remove_the_rest, stored_in_pieces, write_index

KEY = "train.warm_start"


@dataclass(kw_only=True)
class _Earlier:
    """The run to begin with.

    Attributes:
        run: the run.
        plan: how its tables are stored at its end; None for a model without any.
    """

    run: RunContext
    plan: ResolvedPlan | None

    @classmethod
    def of(cls, source: str) -> _Earlier:
        """Open a run.

        Raises:
            ConfigError: it is not finished.
        """
        if not RunFolder(Path(source)).report.exists():
            RunFolder(Path(source)).config()  # says it where there is no run at all
            raise ConfigError(f"{KEY}: {source} is not finished; train it first")
        run = RunContext.opened(source)
        return cls(run=run, plan=run.plan_of(run.schedule.trained[-1]))

    @property
    def first_order(self) -> ResolvedPlan | None:
        """How its first-order weights are stored."""
        return self.run.schedule.first_order


def check_warm_start(run: RunContext) -> None:
    """Raise before any training what `train.warm_start` cannot begin with.

    Raises:
        ConfigError: the other run has another model, other features or other tables, is not finished,
            or is of a method whose rows cannot follow their values into this dataset.
    """
    source = run.config.train.warm_start
    if source is None:
        return
    if Path(source).resolve() == run.folder.path.resolve():
        raise ConfigError(f"{KEY}: {source} is this run itself; choose another name for it")
    if run.place(run.schedule.trained[-1]).warm_start.exists():
        return  # it has begun: nothing of the other run is needed any more
    theirs = RunFolder(Path(source)).config()
    check_same_model(KEY, source, theirs, run.config)
    earlier = _Earlier.of(source)
    check_same_features(KEY, source, earlier.run.info, run.info)
    if theirs.tables.embedding_dim != run.config.tables.embedding_dim:
        raise ConfigError(
            f"{KEY}: {source} has an embedding_dim of {theirs.tables.embedding_dim}, this run of "
            f"{run.config.tables.embedding_dim}; both need the same"
        )
    for there, here in (
        (earlier.run.schedule.plan, run.schedule.plan),
        (earlier.first_order, run.schedule.first_order),
    ):
        _check_same_methods(source, there, here)
    memory = handover_memory(run)
    for plan in (earlier.plan, earlier.first_order):
        for method, tables in [] if plan is None else plan.groups:
            if not method.can_follow():
                names = ", ".join(table.name for table in tables)
                raise ConfigError(
                    f"{KEY}: the tables {names} of {source} are held by {method.name}, whose rows "
                    "cannot follow their values into another dataset; leave out the warm start, or "
                    "take another method"
                )
            if method.needs_same_numbers:
                for table in tables:
                    _check_numbers(
                        source, method.name, table.name, earlier.run.info, run.info, memory
                    )


def _check_same_methods(source: str, there: ResolvedPlan | None, here: ResolvedPlan | None) -> None:
    if there is None or here is None:
        return
    for table in here.tables:
        then, now = there.methods[table.name], here.methods[table.name]
        in_stages = type(then) is type(now) and len(now.stages()) > 1
        # What a method in stages ended with is taken as it is, whatever a budget would buy today.
        if in_stages and then.with_size() == now.with_size():
            continue
        if then != now:
            raise ConfigError(
                f"{KEY}: table {table.name!r} is held by {_shown(then)} in {source} and by "
                f"{_shown(now)} here. Give the size of the method itself rather than a budget, or keep "
                "tables at their size (embcomp prepare --extend ... --room 20%)"
            )


def _shown(method: Any) -> str:
    size = ", ".join(f"{key}={value}" for key, value in method.size.items())
    return f"{method.name} ({size})" if size else method.name


def _check_numbers(
    source: str, method: str, name: str, earlier: DatasetInfo, info: DatasetInfo, memory: int
) -> None:
    hashed = [
        each.is_hashed for data in (earlier, info) for each in data.categorical if each.name == name
    ]
    if all(hashed):
        return
    if any(hashed):
        raise ConfigError(
            f"{KEY}: ids of {name!r} are hashes of its values in one of {earlier.folder} and "
            f"{info.folder} only"
        )
    # Here, as no other training reads vocabularies, and polars takes 20 MiB and a while.
    from embcomp.data_pipelines.followed_values import moved_values

    moved = moved_values(earlier, info, name, memory)
    if moved:
        raise ConfigError(
            f"{KEY}: {method} finds rows of table {name!r} by ids, and {moved:,} of the values that "
            f"{source} knew have other ids in {info.folder}; number them as before: embcomp prepare "
            f"... --extend {earlier.folder}"
        )


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What became of the rows of an earlier run.

    Attributes:
        source: the run.
        steps: training steps that lie behind it, those of runs that it began with included.
        tables: by table: `kept`, `new` and `retired` values, and the shares of the train split's
            look-ups that go to kept ones and new ones.
    """

    source: str
    steps: int
    tables: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, run: RunContext) -> WarmStart | None:
        """That of a run that has begun with one."""
        path = run.place(run.schedule.trained[-1]).warm_start
        return cls(**json.loads(read_checked(path))) if path.exists() else None

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return dataclasses.asdict(self)

    @property
    def news(self) -> str:
        """A line for people."""
        kept, new, retired = (
            int(sum(each[key] for each in self.tables.values()))
            for key in ("kept", "new", "retired")
        )
        share, of_new = (
            sum(each[key] for each in self.tables.values()) / max(1, len(self.tables))
            for key in ("kept_share", "new_share")
        )
        return (
            f"begins with {self.source}: {kept:,} values keep their rows, which have {share:.1%} of "
            f"today's look-ups; {new:,} are new ({of_new:.1%}), {retired:,} retired"
        )


def prepare_warm_start(run: RunContext, process: Process, console: RunConsole) -> None:
    """Make what the last stage begins with; every rank calls it.

    Args:
        run: a run with a `train.warm_start`.
        process: the process group.
        console: what a person sees.
    """
    index = run.schedule.trained[-1]
    place = run.place(index)
    dist.barrier()
    if not place.warm_start.exists():
        if process.is_main:
            place.start.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        source = run.config.train.warm_start
        assert source is not None
        earlier = _Earlier.of(source)
        tables = _Tables(earlier, run)
        with work_in(place.start, run, process, console) as work:
            begun, tensors = tables.start(place.start, work)
        with work_in(place.start_optimizer, run, process, console) as work:
            states = stored_in_pieces(tables.optimizer_states(), work)
        if process.is_main:
            write_index(place.start, tensors)
            write_index(place.start_optimizer, states)
            if begun is not None and len(run.schedule.stages) > 1:
                text = json.dumps(plan_to_document(begun), indent=1) + "\n"
                write_checked(place.forms, text)
            text = json.dumps(tables.record().as_json(), indent=1) + "\n"
            write_checked(place.warm_start, text)
        dist.barrier()
    found = WarmStart.read(run)
    assert found is not None
    console.say(f"{run.folder.path}: {found.news}")
    if process.is_main:
        remove_the_rest(place.start)
        remove_the_rest(place.start_optimizer)
    dist.barrier()


class _Tables:
    """Today's tables and those of the earlier run, and how rows come from there to here.

    Args:
        earlier: the run to begin with.
        run: the one that begins.
    """

    def __init__(self, earlier: _Earlier, run: RunContext) -> None:
        self._earlier, self._run = earlier, run
        theirs = earlier.run
        self._folder = best_checkpoint(theirs)
        unsharded = theirs.build(torch.device("meta"), earlier.plan)
        self._left = LeftModel.in_folder(self._folder, unsharded)
        self._ids: dict[str, FollowedIds] = {}
        self._changes: Mapping[str, Mapping[str, float]] = {}
        self._moves: dict[str, RowMove] = {}  # by the names that physical rows have in the model

    def start(self, folder: Path, work: Work) -> tuple[ResolvedPlan | None, dict[str, Any]]:
        """The plan of today's tables, and every tensor of the model that begins.

        Args:
            folder: the work's.
            work: does what is to be done for every id.
        """
        checked_by_ranks(self._folder, work)
        self._ids, self._changes = followed_tables(
            self._earlier.run.info,
            self._run.info,
            folder=folder,
            work=work,
            memory=handover_memory(self._run),
        )
        tensors: dict[str, Any] = {}
        followed: dict[str, list[GroupState]] = {}
        plans: dict[str, ResolvedPlan | None] = {}
        for label, there, here in self._collections():
            states = [self._follow(each, here, label, work) for each in self._left.states_of(there)]
            followed[label] = states
            methods = {t.name: each.form.config for each in states for t in each.tables}
            plans[label] = ResolvedPlan(here.tables, methods)
        begun = self._run.build(torch.device("meta"), plans.get("tables"))
        self._check_first_order(plans.get("first_order"))
        for label, ours in (("tables", begun.tables), ("first_order", begun.first_order)):
            if ours is None:
                continue
            path = path_of(begun.model, ours)
            found = ours.state_of(followed[label])
            pieces = stored_in_pieces({f"{path}.{n}": each for n, each in found.items()}, work)
            tensors |= pieces
        inside = tuple(f"{path_of(begun.model, each)}." for each in begun.collections())
        wanted = {
            name: tensor
            for name, tensor in begun.model.state_dict().items()
            if not name.startswith(inside)
        }
        return plans.get("tables"), tensors | stored_in_pieces(self._left.outside(wanted), work)

    def _collections(
        self,
    ) -> Iterator[tuple[str, CompressedEmbeddingBagCollection, ResolvedPlan]]:
        """The collections of the earlier run, and today's plans of the same tables."""
        theirs, schedule = self._left.unsharded, self._run.schedule
        if theirs.tables is not None:
            assert schedule.plan is not None
            yield "tables", theirs.tables, schedule.plan
        if theirs.first_order is not None:
            assert schedule.first_order is not None
            yield "first_order", theirs.first_order, schedule.first_order

    def _check_first_order(self, plan: ResolvedPlan | None) -> None:
        if plan is not None:
            assert self._run.schedule.first_order is not None
            assert plan.methods == self._run.schedule.first_order.methods, "they were compared"

    def _follow(self, each: GroupState, here: ResolvedPlan, label: str, work: Work) -> GroupState:
        """A group's form today; its rows are read from the earlier ones."""
        names = [table.name for table in each.tables]
        tables = [table for table in by_name(here.tables) if table.name in names]
        earlier = by_name(each.tables)
        ids = {table.name: self._ids[table.name] for table in tables if table.name in self._ids}
        own_work = NamedWork(work, f"{label}-{names[0]}")
        found = each.form.config.follow_ids(
            FollowInputs(
                tables=tables, before=each.form, tables_before=earlier, ids=ids, work=own_work
            )
        )
        came: dict[str, Tensor | RowSource] = {**each.form.tensors, **each.form.sources}
        came |= found.tensors
        group, path = self._group_of(names[0], label)
        for physical, move in found.moves.items():
            came[f"rows.{physical}"] = move.moved(each.form.rows(physical), own_work, physical)
            self._moves[f"{path}.{group.rows_name(physical)}"] = move
        return GroupState(tables=tables, form=MethodState.of(found.config, came))

    def _group_of(self, table: str, label: str) -> tuple[Group, str]:
        theirs = self._left.unsharded
        collection = theirs.tables if label == "tables" else theirs.first_order
        assert collection is not None
        group = next(g for g in collection.groups if table in [t.name for t in g.tables])
        return group, path_of(theirs.model, collection)

    def optimizer_states(self) -> dict[str, Tensor | RowSource]:
        """What the earlier run's optimizers knew, row by row of today's tables."""
        came = CheckpointTensors(self._folder, "optim")
        found: dict[str, Tensor | RowSource] = {}
        for name, shape in came.shapes.items():
            move = next((m for rows, m in self._moves.items() if _is_of(name, rows)), None)
            if not shape:
                found[name] = came.tensor(name)
            elif move is None:
                found[name] = came.rows(name) if len(shape) < 3 else came.tensor(name)
            elif shape[0] == len(move.weights):
                found[name] = move.moved_state(came.rows(name))
        return found

    def record(self) -> WarmStart:
        """What became of the rows."""
        before = WarmStart.read(self._earlier.run)
        steps = int(read_state(self._folder)["step"]) + (0 if before is None else before.steps)
        source = self._run.config.train.warm_start
        assert source is not None
        return WarmStart(source=source, steps=steps, tables=self._changes)


def _is_of(state: str, rows: str) -> bool:
    """Whether an optimizer's entry, `state.fused.model.<rows>.<more>`, belongs to physical rows."""
    return re.match(rf"state\.\w+\.model\.{re.escape(rows)}\.", state) is not None
