"""The pass that ranks: each feature's values by their counts, as a vocabulary of the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embcomp.data_pipelines.preparing.count_pass import COUNTS
from embcomp.data_pipelines.preparing.counting import PartCounts
from embcomp.data_pipelines.preparing.engine import Advance, Part, map_parts
from embcomp.data_pipelines.preparing.extended_vocabulary import extend_vocabulary
from embcomp.data_pipelines.preparing.given_counts import GIVEN, GivenPart, check_unique
from embcomp.data_pipelines.preparing.given_id_counts import count_given_ids
from embcomp.data_pipelines.preparing.growth import Growth
from embcomp.data_pipelines.preparing.local_scratch import local_scratch
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.preparing.vocabulary import Ranked, build_vocabulary, vocabulary_file
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.data_pipelines.schema import LARGEST_ID

_MARKS = "ranked"


@dataclass(frozen=True, kw_only=True)
class RankTask:
    """The counts of one categorical feature to rank.

    Attributes:
        runs: the run files of the count pass.
        path: the vocabulary to write.
        place: of the feature among the categorical ones.
        name: of the feature.
        partitions: into how many parts values are cut by their hash.
        min_count: what a new value must reach in the train split.
        missing: how many values of the train split got id 0.
        total: how many values the train split has, `missing` among them.
        limit: bytes that merging and sorting may hold at once.
        scratch: where files on the way go: a folder that this task has for itself.
        growth: how the vocabulary of an earlier dataset goes on; None where there is none.
        num_embeddings: how many ids there are, of a feature whose values are ids already.
    """

    runs: Sequence[Path]
    path: Path
    place: int
    name: str
    partitions: int
    min_count: int
    missing: int
    total: int
    limit: int
    scratch: Path
    growth: Growth | None
    num_embeddings: int | None


def rank(task: RankTask, advance: Advance) -> Ranked:
    """Write the vocabulary of a feature."""
    with local_scratch(task.scratch) as scratch:
        if task.num_embeddings is not None:
            ranked = count_given_ids(
                task.runs,
                task.path,
                feature=task.place,
                name=task.name,
                num_embeddings=task.num_embeddings,
                partitions=task.partitions,
                missing=task.missing,
                total=task.total,
                limit=task.limit,
                scratch=scratch,
            )
        elif task.growth is not None and task.growth.before is not None:
            ranked = extend_vocabulary(
                task.runs,
                task.path,
                feature=task.place,
                before=task.growth.before.categorical[task.place],
                growth=task.growth,
                partitions=task.partitions,
                min_count=task.min_count,
                missing=task.missing,
                total=task.total,
                limit=task.limit,
                scratch=scratch,
            )
        else:
            ranked = build_vocabulary(
                task.runs,
                task.path,
                feature=task.place,
                name=task.name,
                partitions=task.partitions,
                min_count=task.min_count,
                missing=task.missing,
                total=task.total,
                limit=task.limit,
                scratch=scratch,
            )
    advance(1)
    return ranked


def rank_values(
    settings: PrepareSettings,
    work: Workspace,
    counts: PartCounts,
    partitions: int,
    given: GivenPart | None = None,
) -> list[Ranked]:
    """Write the vocabulary of every categorical feature; return what they are, in that order.

    Args:
        settings: what the call was asked for.
        work: where the dataset grows.
        counts: what the count pass found.
        partitions: into how many parts values are cut by their hash.
        given: counts of values that someone else took.
    """
    (work.path / "vocabulary").mkdir(exist_ok=True)
    (work.scratch / _MARKS).mkdir(exist_ok=True)
    features = settings.features.categorical
    places = [place for place, feature in enumerate(features) if not feature.hashed]
    parts = [_part(settings, work, counts, partitions, given, place) for place in places]
    with phase("rank", len(features), show=settings.progress) as advance:
        advance(len(features) - len(places))
        found = map_parts(
            settings.engine,
            work,
            rank,
            parts,
            Ranked,
            files=lambda task, ranked: (
                {} if ranked.record is None else {task.path: ranked.record.sha256}
            ),
            advance=advance,
            at_once=settings.at_once(len(features)),
        )
    for part, ranked in zip(parts, found):
        if settings.given is not None and given is not None and part.task.name in given.rows:
            check_unique(
                settings.given, part.task.name, given.rows[part.task.name], ranked.raw_values
            )
    hashed = Ranked(raw_values=0, kept=0, quantiles={}, record=None, used=LARGEST_ID + 1)
    by_place = dict(zip(places, found))
    return [by_place.get(place, hashed) for place in range(len(features))]


def vocabulary_path(settings: PrepareSettings, work: Workspace, place: int) -> Path:
    """Where the vocabulary of a categorical feature is written."""
    return work.path / vocabulary_file(settings.features.categorical[place].name, place)


def _part(
    settings: PrepareSettings,
    work: Workspace,
    counts: PartCounts,
    partitions: int,
    given: GivenPart | None,
    place: int,
) -> Part[RankTask]:
    feature = settings.features.categorical[place]
    figures = counts.categorical[feature.name]
    missing = 0 if feature.multi_valued else figures.train_missing
    values, runs = figures.train_values, [work.scratch / COUNTS / run for run in counts.runs]
    if given is not None and feature.counted_before:
        values, runs = given.total[feature.name], [work.scratch / GIVEN / run for run in given.runs]
    task = RankTask(
        runs=runs,
        path=vocabulary_path(settings, work, place),
        place=place,
        name=feature.name,
        partitions=partitions,
        min_count=feature.min_count,
        missing=missing,
        total=missing + values,
        limit=settings.memory_budget // settings.at_once(len(settings.features.categorical)),
        scratch=work.scratch / _MARKS / f"{place:05d}",
        growth=settings.growth,
        num_embeddings=feature.num_embeddings,
    )
    return Part(seal=f"{_MARKS}/{place:05d}.json", task=task, size=1)
