"""Criteo-format click logs whose best possible AUC is known.

Real logs never say how good a model could be. These keep what makes Criteo hard for compressed
tables - 26 fields whose cardinalities span seven orders of magnitude, ids with a long tail, empty
fields - and draw labels from a known click model, whose own AUC and log loss on the test part are
written beside the log: no model can be expected to do better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embcomp.data_pipelines.bayes_metrics import BayesMeter, Truth
from embcomp.data_pipelines.preparing.workspace import disk_errors
from embcomp.data_pipelines.splits import SPLITS, ChronologicalSplit, FileSplit, SplitRule
from embcomp.data_pipelines.synthetic.click_model import ClickModel, RawRows
from embcomp.data_pipelines.synthetic.criteo_text import to_lines
from embcomp.data_pipelines.synthetic.synthetic_rows import (
    CHUNK_ROWS,
    SyntheticConfig,
    SyntheticRows,
)
from embcomp.errors import ConfigError
from embcomp.io.atomic_files import atomic_path

TRUTH_SUFFIX = ".truth.json"


def write_criteo_log(
    path: str | Path,
    config: SyntheticConfig | None = None,
    *,
    split_rule: SplitRule | None = None,
    progress: Callable[[int], None] | None = None,
) -> Truth:
    """Write a log in Criteo's format, and `<path>.truth.json` with the best reachable figures.

    A line is the label, 13 integers and 26 values of 8 hexadecimal digits, tab-separated, empty
    where missing. Rows are drawn and written a chunk at a time, so memory does not grow with them,
    and both files appear under their names only when they are complete.

    Args:
        path: of the log; its folder is made if it is not there.
        config: what to generate.
        split_rule: which rows the figures of `truth.json` are about; by row order if None, as
            `prepare` splits such a log by default.
        progress: called with the number of rows written so far.

    Returns:
        What the truth file says.
    """
    path = Path(path)
    config = SyntheticConfig() if config is None else config
    rule = ChronologicalSplit() if split_rule is None else split_rule
    if isinstance(rule, FileSplit):
        raise ConfigError("a generated log is one file: split_rule must be chronological or random")
    whole, by_split = BayesMeter(), [BayesMeter() for _ in SPLITS]
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), atomic_path(path) as temporary, temporary.open("wb") as file:
        done = 0
        for rows, probability, label in draw(config):
            to_lines(rows, label, file)
            codes = rule.codes(done, len(label), config.rows, None)
            whole.update(probability, label)
            for code, meter in enumerate(by_split):
                meter.update(probability[codes == code], label[codes == code])
            done += len(label)
            if progress is not None:
                progress(done)
    results = {split: meter.result() for split, meter in zip(SPLITS, by_split)}
    truth = Truth(
        rows=whole.rows,
        positives=whole.positives,
        split_rule=rule,
        bayes=results["test"],
        by_split={split: result for split, result in results.items() if result is not None},
        generator=asdict(config),
    )
    truth.save(path.with_name(path.name + TRUTH_SUFFIX))
    return truth


def draw(
    config: SyntheticConfig,
) -> Iterator[tuple[RawRows, NDArray[np.float64], NDArray[np.bool_]]]:
    """Yield rows, their true click probabilities and their labels, a chunk at a time."""
    source = SyntheticRows(config)
    model = ClickModel(
        sample=source.sample(),
        seed=config.seed,
        weights=[n**-config.damping for n in config.cardinalities],
        num_pairs=config.num_pairs,
        strengths=(config.first_order, config.interaction, config.numeric),
        click_rate=config.click_rate,
        drift=config.drift,
        ranks=config.ranks,
    )
    for number in range(-(-config.rows // CHUNK_ROWS)):
        size = min(CHUNK_ROWS, config.rows - number * CHUNK_ROWS)
        rows, uniform = source.chunk(number)
        rows = rows.first(size)
        probability = model.probability(rows)
        yield rows, probability, uniform[:size] < probability
