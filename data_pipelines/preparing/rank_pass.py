"""The pass that ranks: each feature's values by their counts, as a vocabulary of the dataset."""

from __future__ import annotations

from pathlib import Path

from embcomp.data_pipelines.preparing.count_pass import COUNTS
from embcomp.data_pipelines.preparing.counting import PartCounts
from embcomp.data_pipelines.preparing.extended_vocabulary import extend_vocabulary
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.preparing.vocabulary import Ranked, build_vocabulary, vocabulary_file
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.data_pipelines.schema import LARGEST_ID

_MARKS = "ranked"


def rank_values(
    settings: PrepareSettings, work: Workspace, counts: PartCounts, partitions: int
) -> list[Ranked]:
    """Write the vocabulary of every categorical feature; return what they are, in that order."""
    (work.path / "vocabulary").mkdir(exist_ok=True)
    (work.scratch / _MARKS).mkdir(exist_ok=True)
    ranked = []
    features = settings.features.categorical
    with phase("rank", len(features), show=settings.progress) as advance:
        for place in range(len(features)):
            ranked.append(_rank(settings, work, counts, partitions, place))
            advance(1)
    return ranked


def vocabulary_path(settings: PrepareSettings, work: Workspace, place: int) -> Path:
    """Where the vocabulary of a categorical feature is written."""
    return work.path / vocabulary_file(settings.features.categorical[place].name, place)


def _rank(
    settings: PrepareSettings, work: Workspace, counts: PartCounts, partitions: int, place: int
) -> Ranked:
    feature = settings.features.categorical[place]
    if feature.hashed:
        return Ranked(raw_values=0, kept=0, quantiles={}, record=None, used=LARGEST_ID + 1)
    path = vocabulary_path(settings, work, place)

    def rank() -> Ranked:
        figures = counts.categorical[feature.name]
        missing = 0 if feature.multi_valued else figures.train_missing
        if settings.growth is not None and settings.growth.before is not None:
            return extend_vocabulary(
                [work.scratch / COUNTS / run for run in counts.runs],
                path,
                feature=place,
                before=settings.growth.before.categorical[place],
                growth=settings.growth,
                partitions=partitions,
                min_count=feature.min_count,
                missing=missing,
                total=missing + figures.train_values,
                limit=settings.memory_budget,
                scratch=work.scratch / _MARKS,
            )
        return build_vocabulary(
            [work.scratch / COUNTS / run for run in counts.runs],
            path,
            feature=place,
            name=feature.name,
            partitions=partitions,
            min_count=feature.min_count,
            missing=missing,
            total=missing + figures.train_values,
            limit=settings.memory_budget,
            scratch=work.scratch / _MARKS,
        )

    return work.once(
        f"{_MARKS}/{place:05d}.json",
        Ranked,
        rank,
        files=lambda found: {} if found.record is None else {path: found.record.sha256},
    )
