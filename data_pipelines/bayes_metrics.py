"""How well the best possible model scores on generated data, and the file that says so.

`truth.json` is written by generators, ours or others, and read by `prepare`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embcomp.data_pipelines.schema import BayesMetrics
from embcomp.data_pipelines.splits import ChronologicalSplit, SplitRule
from embcomp.errors import DataError, one_line
from embcomp.io.atomic_files import write_atomically

FORMAT_VERSION = 1

_BINS = 1 << 20


class Truth(BaseModel):
    """The content of the truth file that lies beside a generated log.

    `bayes` is what the true click probabilities score against the labels of the test rows, as
    `split_rule` picks them; a dataset that was split otherwise has other test rows. `by_split` has
    the same for each split whose rows carry both labels.
    """

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    rows: int = Field(ge=0)
    positives: int = Field(ge=0)
    split_rule: SplitRule = ChronologicalSplit()
    bayes: BayesMetrics | None = None
    by_split: dict[str, BayesMetrics] = Field(default_factory=dict)
    generator: dict[str, float | int | list[int]] = Field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the file atomically."""
        text = json.dumps(self.model_dump(mode="json"), indent=1) + "\n"
        write_atomically(Path(path), text)

    @classmethod
    def load(cls, path: str | Path) -> Truth:
        """Read a truth file, or raise a DataError that says what is wrong with it."""
        path = Path(path)
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path} is missing; generate the log again") from None
        except (UnicodeDecodeError, ValidationError) as error:
            raise DataError(
                f"{path} does not say what a truth file says: {one_line(error)}"
            ) from None


class BayesMeter:
    """AUC and log loss of known probabilities, over any number of rows in 16 MiB.

    Probabilities are counted in 2**20 equal bins, ties within a bin as half: the AUC is exact to
    about 1e-6.
    """

    def __init__(self) -> None:
        self._counts = np.zeros((2, _BINS), dtype=np.int64)
        self._loss = 0.0

    def update(self, probability: NDArray[np.float64], label: NDArray[np.bool_]) -> None:
        """Count rows: (n,) true probabilities and (n,) labels."""
        bins = np.minimum((probability * _BINS).astype(np.int64), _BINS - 1)
        for value in (0, 1):
            np.add.at(self._counts[value], bins[label == value], 1)
        likelihood = np.where(label, probability, 1 - probability)
        self._loss -= float(np.log(np.maximum(likelihood, 1e-300)).sum())

    @property
    def rows(self) -> int:
        """Rows counted so far."""
        return int(self._counts.sum())

    @property
    def positives(self) -> int:
        """Rows counted so far whose label is 1."""
        return int(self._counts[1].sum())

    def result(self) -> BayesMetrics | None:
        """The metrics rounded to 6 digits, or None while one of the labels has not come."""
        negative, positive = self._counts
        pairs = int(negative.sum()) * int(positive.sum())
        if not pairs:
            return None
        below = np.cumsum(negative) - negative
        # Twice the count of ordered pairs, in whole numbers.
        ordered = int((positive * (2 * below + negative)).sum())
        return BayesMetrics(
            auc=round(ordered / (2 * pairs), 6), log_loss=round(self._loss / self.rows, 6)
        )


def read_bayes(files: Sequence[Path], rule: SplitRule) -> dict[str, float] | None:
    """Return `{"auc": ..., "log_loss": ...}` of the test split from the files' sidecar, if any.

    The sidecar is `<file>.truth.json`, or `truth.json` in the files' folder. Its `split_rule`
    names the rule whose test rows the figures are of: under another rule they mean nothing and are
    left out. A sidecar without a rule is taken at its word.
    """
    candidates = [files[0].with_name(files[0].name + ".truth.json")]
    candidates.append(files[0].parent / "truth.json")
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        bayes = content.get("bayes")
        expected = content.get("split_rule")
        if bayes is None or (expected is not None and expected != rule.model_dump()):
            return None
        return {"auc": float(bayes["auc"]), "log_loss": float(bayes["log_loss"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a truth file ({error!r}); expected "
            f'{{"bayes": {{"auc": ..., "log_loss": ...}}}}'
        ) from None
