"""The stages of a run in which several methods are trained in stages, in the order they are run.

All methods begin in one stage together. Then each goes through the rest of its stages, one method after
another: those that begin the network afresh on the way come first, so that no table was compressed
for a network that is then thrown away. While a method is at work, the others' tables are as they
are: in the form in which they began where their turn is to come, in their last one where it has been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from embcomp.backends.base import BackendConfig
from embcomp.backends.stages import Stage
from embcomp.collection.groups import group_labels
from embcomp.collection.plan import ResolvedPlan
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import listed
from embcomp.tables.specs import TableSpec


@dataclass(frozen=True, kw_only=True)
class StagedGroup:
    """A method that is trained in stages, and its tables.

    Attributes:
        label: the method's name, with its first table's where several settings of it are staged.
        method: its settings.
        tables: in the order of their names.
    """

    label: str
    method: BackendConfig
    tables: list[TableSpec]

    @property
    def names(self) -> list[str]:
        """The tables' names."""
        return [table.name for table in self.tables]


@dataclass(frozen=True, kw_only=True)
class RunStage:
    """One stage of a run.

    Attributes:
        stage: what is done, under the name that it has in the run.
        owners: whose stage it is, and what each of them calls it.
    """

    stage: Stage
    owners: Sequence[tuple[StagedGroup, str]] = ()

    @property
    def owner(self) -> StagedGroup:
        """The one method whose stage it is."""
        ((group, _),) = self.owners
        return group

    def is_of(self, group: StagedGroup) -> bool:
        """Whether it is a stage of a method."""
        return any(owner is group for owner, _ in self.owners)

    def as_of(self, group: StagedGroup) -> Stage:
        """The stage under the name by which one of its owners knows it."""
        return replace(self.stage, name=next(n for owner, n in self.owners if owner is group))


def staged_groups(plan: ResolvedPlan | None) -> list[StagedGroup]:
    """The methods of a plan that are trained in stages, in the order of their tables.

    Raises:
        ConfigError: where two would come to share what they store.
    """
    groups = [] if plan is None else plan.groups
    staged = [(method, tables) for method, tables in groups if len(method.stages()) > 1]
    found = [
        StagedGroup(label=label, method=method, tables=tables)
        for label, (method, tables) in zip(group_labels(staged), staged)
    ]
    for group in found:
        for method, tables in groups:
            if group.method != method:
                _check_apart(group, method, tables)
    return found


def ordered_stages(groups: Sequence[StagedGroup]) -> list[RunStage]:
    """The stages of a run, whose names are the method's own where it has one in stages.

    Args:
        groups: the methods that are trained in stages.

    Raises:
        ConfigError: for methods whose first stages do not go together.
    """
    if not groups:
        return [RunStage(stage=Stage(name="train"))]
    if len(groups) == 1:
        (only,) = groups
        return [RunStage(stage=s, owners=((only, s.name),)) for s in only.method.stages()]
    stages = [_first_of_all(groups)]
    for group in sorted(groups, key=lambda each: not _begins_network_afresh(each)):
        stages += [
            RunStage(
                stage=replace(own, name=f"{group.label}.{own.name}"), owners=((group, own.name),)
            )
            for own in group.method.stages()[1:]
        ]
    return _with_search_rows_held_out(stages)


def forms_by_stage(plan: ResolvedPlan) -> list[tuple[str, ResolvedPlan]]:
    """How tables are stored in each stage that trains, as far as is known, by the stages' names."""
    groups = staged_groups(plan)
    forms = {group.label: group.method.training_forms(group.tables) for group in groups}
    done = dict.fromkeys(forms, -1)
    found = []
    for each in ordered_stages(groups):
        if each.stage.kind != "train":
            continue
        for owner, _ in each.owners:
            done[owner.label] += 1
        own = {
            name: forms[group.label][min(done[group.label], len(forms[group.label]) - 1)]
            for group in groups
            for name in group.names
        }
        found.append((each.stage.name, ResolvedPlan(plan.tables, {**plan.methods, **own})))
    return found


def check_apart_now(group: StagedGroup, form: BackendConfig, plan: ResolvedPlan) -> None:
    """Raise where a form would share what it stores with tables of another method.

    Args:
        group: the method.
        form: its next form.
        plan: how all tables are stored before.
    """
    for method, tables in plan.groups:
        others = [table for table in tables if table.name not in group.names]
        if others and form.compresses and form == method:
            raise _shared(group, method, others)


def _check_apart(group: StagedGroup, method: BackendConfig, tables: Sequence[TableSpec]) -> None:
    own, others = group.method.training_forms(group.tables), method.training_forms(tables)
    if any(form in others for form in own if form.compresses):
        raise _shared(group, method, tables)


def _shared(group: StagedGroup, method: BackendConfig, tables: Sequence[TableSpec]) -> ConfigError:
    return ConfigError(
        f"tables: {group.method.name} of {group.names[0]!r} and {method.name} of {tables[0].name!r} "
        "would come to be stored by one method in equal settings, and so share what they learnt apart; "
        "give one of them another seed or size, or both tables one method"
    )


def _first_of_all(groups: Sequence[StagedGroup]) -> RunStage:
    firsts = [(group, group.method.stages()[0]) for group in groups]
    alike = [replace(own, name="", purpose="", holds_out=False) for _, own in firsts]
    odd = [group.label for (group, _), each in zip(firsts, alike) if each != alike[0]]
    if odd:
        raise ConfigError(
            f"tables: the first stages of {listed(odd)} and of {groups[0].label} differ in what "
            "learns or for how long, so that one run has no room for both"
        )
    names = sorted({own.name for _, own in firsts})
    purposes = dict.fromkeys(own.purpose for _, own in firsts)
    stage = replace(firsts[0][1], name="+".join(names), purpose="; ".join(purposes))
    return RunStage(stage=stage, owners=tuple((group, own.name) for group, own in firsts))


def _begins_network_afresh(group: StagedGroup) -> bool:
    return any(stage.reinit_network for stage in group.method.stages())


def _with_search_rows_held_out(stages: Sequence[RunStage]) -> list[RunStage]:
    """The stages so that nothing trains on search-validation rows which somebody is yet to look at."""
    looks = [
        any(own.holds_out for group, _ in each.owners for own in group.method.stages())
        and (each.stage.holds_out or each.stage.alternate or each.stage.kind == "search")
        for each in stages
    ]
    looks[0] = any(own.method.stages()[0].holds_out for own, _ in stages[0].owners)
    last = max((index for index, does in enumerate(looks) if does), default=-1)
    return [
        replace(each, stage=replace(each.stage, holds_out=True))
        if index <= last and each.stage.kind == "train"
        else each
        for index, each in enumerate(stages)
    ]
