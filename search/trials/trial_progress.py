"""What a person sees while a search goes on: a live table on a terminal, plain lines otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from optuna import Study
from optuna.trial import FrozenTrial, TrialState
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from embcomp.io.live_console import LiveConsole, duration
from embcomp.search.attempts import KIND, latest_attempts, number_of
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.trials.worker import OUTCOME
from embcomp.tables.budget import format_bytes

_SHOWN = 8


class SearchConsole(LiveConsole):
    """Prints a search's progress on stderr.

    Args:
        config: the search.
        enabled: whether to print at all.
        stream: where to print.
    """

    def __init__(
        self, config: SearchConfig, *, enabled: bool, stream: TextIO | None = None
    ) -> None:
        super().__init__(enabled=enabled, stream=stream)
        self._config = config
        self._study: Study | None = None
        self._count = self._slots = 0
        self._title = ""

    def follow(self, study: Study, title: str, count: int, slots: int) -> None:
        """Show another study.

        Args:
            study: what to show.
            title: above the table.
            count: trials that it will have.
            slots: how many run at once here.
        """
        self._study, self._title, self._count, self._slots = study, title, count, slots

    def update(self, running: Sequence[int]) -> None:
        """Draw the running candidates anew, unless that was done a moment ago."""
        if self._study is not None:
            self.draw(lambda: self._table(running))

    def _table(self, running: Sequence[int]) -> Group:
        assert self._study is not None
        trials = latest_attempts(self._study)
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=self._title, title_justify="left")
        table.add_column("candidate")
        table.add_column("proposed as")
        for name in (*self._config.objectives, "serving bytes"):
            table.add_column(name, justify="right")
        for trial in best_first(self._study, trials)[:_SHOWN]:
            size = trial.user_attrs.get("serve_bytes")
            table.add_row(
                str(number_of(trial)),
                escape(str(trial.user_attrs.get(KIND, ""))),
                *(f"{value:,.6g}" for value in trial.values),
                "" if size is None else format_bytes(size),
            )
        return Group(table, Text(self.status(trials, running)))

    def status(self, trials: Sequence[FrozenTrial], running: Sequence[int]) -> str:
        """How far it is, in one line."""
        ended = [t for t in trials if t.state.is_finished()]
        failed = sum(1 for t in ended if t.state is TrialState.FAIL)
        seconds = [float(t.user_attrs.get(OUTCOME, {}).get("seconds", 0.0)) for t in ended]
        left = self._count - len(ended)
        eta = ""
        if seconds and left > 0:
            eta = (
                f", about {duration(sum(seconds) / len(seconds) * left / max(1, self._slots))} left"
            )
        here = ", ".join(map(str, running)) or "none"
        return f"{len(ended)} of {self._count} ended ({failed} failed), here run {here}{eta}"


def best_first(study: Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Finished trials: by the one objective, or the front by its first."""
    done = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if len(study.directions) > 1:
        numbers = {trial.number for trial in study.best_trials}
        done = [trial for trial in done if trial.number in numbers]
    maximize = study.directions[0].name == "MAXIMIZE"
    return sorted(done, key=lambda trial: (trial.values[0] * (-1 if maximize else 1), trial.number))
