"""Other forms of a collection's tables, wherever their rows are: serving forms, fewer columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from embcomp.collection.group_states import GroupState
from embcomp.collection.plan import ResolvedPlan
from embcomp.errors import ConfigError


def compacted_states(
    states: Sequence[GroupState], counts: Mapping[str, Tensor] | None = None
) -> list[GroupState] | None:
    """The serving forms of all groups; None where all are serving forms already.

    Args:
        states: the forms of all groups.
        counts: for each table by name, (num_embeddings,) how often each id occurs.
    """
    if counts:
        states = [replace(each, form=replace(each.form, counts=counts)) for each in states]
    compacted = [
        GroupState(tables=each.tables, form=each.form.config.compact(each.tables, each.form))
        for each in states
    ]
    same = all(new.form is old.form for new, old in zip(compacted, states))
    return None if same else compacted


def sliced_states(
    plan: ResolvedPlan, states: Sequence[GroupState], widths: Mapping[str, int]
) -> list[GroupState]:
    """Forms of fewer columns, of methods that train every prefix of a row.

    Args:
        plan: the method of every table.
        states: the forms of all groups.
        widths: columns by table.

    Raises:
        ConfigError: for a table or a width that is not there, or a method that cannot.
    """
    known = [table.name for table in plan.tables]
    unknown = [name for name in widths if name not in known]
    if unknown:
        raise ConfigError(
            f"no table is called {', '.join(unknown)}; the tables are {', '.join(known)}"
        )
    cut: list[GroupState] = []
    for each in states:
        own = {t.name: widths[t.name] for t in each.tables if t.name in widths}
        form = each.form.config.slice_columns(each.tables, each.form, own) if own else each.form
        cut.append(GroupState(tables=each.tables, form=form))
    return cut
