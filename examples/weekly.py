"""A model every day whose structure is frozen for days, and searched anew once a week.

    python examples/weekly.py raw/day*.txt --recipe criteo_autoint_pq --importer criteo --every 7

For each raw file, in the order given (a day each), in the folder `--work`:

    data/day001    its dataset, in the numbers of the day before
    runs/full001   full tables, which go on from the day before
    runs/serve001  what is served, by the recipe's method in stages: on the first day, and on every seventh
                   after it, its structure is found anew from that day's full tables (`train.start_from`);
                   on the days in between it goes on from the day before, as it was (`train.warm_start`)

What is finished is left alone, so the call of the next day names one file more, and one that was killed
goes on where it was. `--anew 12` searches on day 12 as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from embcomp.config import load_config
from embcomp.config.catalog import find_recipe
from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.schema import FILE_NAME
from embcomp.errors import ConfigError, EmbcompError
from embcomp.training import Report, train

FULL = ("tables.budget=null", "tables.overrides={}", "tables.method=full", "train.stages={}")
"""A recipe's settings with full tables."""


@dataclass(frozen=True, kw_only=True)
class Week:
    """How models follow each other.

    Attributes:
        recipe: a recipe's name or YAML, of a method in stages that begins with full tables.
        work: the folder of datasets and runs.
        importer: how raw files are written.
        every: days from one search to the next.
        anew: further days on which to search.
        room: ids to reserve for values to come, a share of those in use.
        settings: `key.path=value`, for all runs.
    """

    recipe: str
    work: Path
    importer: str = "criteo"
    every: int = 7
    anew: Collection[int] = ()
    room: str = "20%"
    settings: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"every is {self.every}; expected 1 day or more")
        method = self._config().tables.method.settings
        if len(method.stages()) < 2:
            raise ConfigError(
                f"recipe {self.recipe}: {method.name} is trained in one stage and has no structure to "
                "search; take a method in stages, such as pq, optembed or dnis"
            )

    def searches(self, day: int) -> bool:
        """Whether a day, counted from 1, finds its structure anew."""
        return (day - 1) % self.every == 0 or day in self.anew

    def follow(self, days: Sequence[str | Path]) -> list[Report]:
        """Prepare and train what is not there yet; returns what is served, day by day."""
        if not days:
            raise ConfigError("name the raw file of one day or more, in their order")
        return [self._day(number, Path(raw)) for number, raw in enumerate(days, 1)]

    def _day(self, day: int, raw: Path) -> Report:
        data = self._folder("data/day", day)
        if not (data / FILE_NAME).exists():
            before = self._folder("data/day", day - 1) if day > 1 else None
            prepare(raw, data, importer=self.importer, room=self.room, extend=before)
        rows = [] if day == 1 else [f"train.warm_start={self._folder('runs/full', day - 1)}"]
        self._train("full", day, *FULL, *rows)
        if self.searches(day):
            begin = f"train.start_from={self._folder('runs/full', day)}"
        else:
            begin = f"train.warm_start={self._folder('runs/serve', day - 1)}"
        return self._train("serve", day, begin)

    def _train(self, kind: str, day: int, *more: str) -> Report:
        config = self._config(f"name={kind}{day:03d}", *more)
        return train(config.with_data(self._folder("data/day", day)), runs=self.work / "runs")

    def _config(self, *more: str) -> TrainConfig:
        return load_config(find_recipe(self.recipe), [*self.settings, *more])

    def _folder(self, kind: str, day: int) -> Path:
        return self.work / f"{kind}{day:03d}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow the days of the command line; prints the test AUC of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("days", nargs="+", help="raw files, a day each, in their order")
    parser.add_argument("--recipe", default="criteo_autoint_pq")
    parser.add_argument("--work", type=Path, default=Path("week"))
    parser.add_argument("--importer", default="criteo")
    parser.add_argument("--every", type=int, default=7, help="days from one search to the next")
    parser.add_argument("--anew", type=int, nargs="*", default=[], help="further days to search on")
    parser.add_argument("--room", default="20%", help="for values to come")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="key=value")
    options = vars(parser.parse_args(arguments))
    try:
        days = options.pop("days")
        week = Week(**options)
        for day, report in enumerate(week.follow(days), 1):
            how = "searched" if week.searches(day) else "frozen"
            found = "no test rows" if report.test is None else f"AUC {report.test['auc']:.4f}"
            print(f"day {day}: {how}, {report.serve_bytes:,} bytes, {found}")
    except EmbcompError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
