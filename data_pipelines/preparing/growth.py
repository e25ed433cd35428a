"""What was asked for a vocabulary that is to grow from day to day, and whether yesterday's can go on."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from embcomp.data_pipelines.integrity import open_dataset
from embcomp.data_pipelines.preparing.features import Features
from embcomp.data_pipelines.schema import LARGEST_ID, DatasetInfo, Extended
from embcomp.data_pipelines.splits import exact
from embcomp.errors import DataError
from embcomp.io.digests import sha256_of_json
from embcomp.io.remote_paths import as_path

DEFAULT_DECAY = 0.9
_MOST_ROOM = 100


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How vocabularies grow.

    Attributes:
        room: ids that are reserved for values to come, as a share of those in use.
        decay: by what a value's count is multiplied from one dataset to the next.
        retire_after: in how many datasets in a row a value is unseen until its id is free again;
            None keeps values for good.
        before: the dataset whose vocabularies go on; None begins with today's.
    """

    room: Fraction = Fraction(0)
    decay: float = DEFAULT_DECAY
    retire_after: int | None = None
    before: DatasetInfo | None = None

    @property
    def fingerprint(self) -> list[object]:
        """What a call must have in common with a killed one to go on from its pieces."""
        before = None if self.before is None else digest_of(self.before)
        return [str(self.room), self.decay, self.retire_after, before]

    @property
    def record(self) -> Extended | None:
        """What `dataset.json` says of it."""
        if self.before is None:
            return None
        return Extended(
            name=self.before.name,
            digest=digest_of(self.before),
            day=2 if self.before.extends is None else self.before.extends.day + 1,
            decay=self.decay,
            retire_after=self.retire_after,
        )

    def num_embeddings(self, used: int, before: int) -> int:
        """How many ids a feature has: as many as before while these are enough.

        Args:
            used: the ids in use, up to the highest.
            before: how many there were; 0 for a feature that is new.
        """
        if used <= before:
            return before
        return min(LARGEST_ID + 1, used + math.ceil(self.room * used))


def digest_of(info: DatasetInfo) -> str:
    """What tells a description from others, also where it was written without a digest."""
    return info.digest or sha256_of_json(info.model_dump(mode="json", exclude={"sources"}))


def parse_growth(
    extend: str | Path | None,
    room: str | float | None,
    decay: float | None,
    retire_after: int | None,
    output: Path,
) -> Growth | None:
    """Check what was asked for; None where a dataset stands for itself.

    Raises:
        DataError: for numbers out of range, choices that need `extend`, or a dataset that cannot
            be read.
    """
    if extend is None:
        for name, value in (("decay", decay), ("retire_after", retire_after)):
            if value is not None:
                raise DataError(
                    f"{name} says how values of an earlier dataset go on; give that one: extend"
                )
        return None if room is None else Growth(room=_share(room))
    chosen = DEFAULT_DECAY if decay is None else decay
    if not 0 <= chosen <= 1:
        raise DataError(f"decay is {decay}; expected a factor from 0 to 1")
    if retire_after is not None and retire_after < 1:
        raise DataError(f"retire_after is {retire_after}; expected 1 dataset or more")
    if output.exists() and output.resolve() == as_path(extend).resolve():
        raise DataError(
            f"output {output} is the dataset that is to be extended; name another folder"
        )
    return Growth(
        room=Fraction(0) if room is None else _share(room),
        decay=float(chosen),
        retire_after=retire_after,
        before=open_dataset(extend),
    )


def _share(room: str | float) -> Fraction:
    text = str(room).strip()
    try:
        share = Fraction(text[:-1]) / 100 if text.endswith("%") else exact(float(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        share = Fraction(-1)
    if not 0 <= share <= _MOST_ROOM:
        raise DataError(
            f"room: {room!r} is not a share of the ids in use; write for example 20% or 0.2"
        )
    return share


def check_same_features(before: DatasetInfo, features: Features, bucketed: Collection[str]) -> None:
    """Raise a DataError where an earlier dataset has other features than these rows.

    Args:
        before: the dataset whose vocabularies are to go on.
        features: of the rows.
        bucketed: the categorical features that are numbers in the raw rows.
    """
    for kind, there, here in (
        ("categorical", before.categorical_names, [f.name for f in features.categorical]),
        ("numeric", before.numeric_names, [f.name for f in features.numeric]),
    ):
        if there != here:
            _refuse(before, f"its {kind} features are {_listed(there)}, here {_listed(here)}")
    for ours, theirs in zip(features.categorical, before.categorical):
        if ours.multi_valued != theirs.multi_valued:
            shown = "several values a row" if theirs.multi_valued else "one value a row"
            _refuse(before, f"feature {ours.name!r} has {shown} there, which it has not here")
        if ours.hashed != theirs.is_hashed:
            _refuse(
                before, f"ids of feature {ours.name!r} are hashes of values in one of the two only"
            )
        if ours.num_embeddings is not None or theirs.holds_ids:
            _refuse(before, f"feature {ours.name!r} holds ids already, which nobody numbers anew")
        if not (theirs.vocabulary or theirs.is_hashed):
            _refuse(before, f"feature {ours.name!r} has no vocabulary there to go on from")
    for column, numeric in zip(features.numeric, before.numeric):
        if column.transform != numeric.transform:
            _refuse(
                before,
                f"{column.name!r} went through {numeric.transform} there, here through "
                f"{column.transform}",
            )
    known = before.raw_format
    odd = set() if known is None else set(known.bucketed) ^ set(bucketed)
    if odd:
        _refuse(before, f"feature {min(odd)!r} is a bucketed number in one of the two only")


def _refuse(before: DatasetInfo, why: str) -> None:
    raise DataError(
        f"{before.folder} cannot be extended by these rows: {why}. Prepare them with the schema and "
        f"the options of that dataset, or without extending it"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
