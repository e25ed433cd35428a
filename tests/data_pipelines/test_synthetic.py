"""A generated log is Criteo's format, reproducible, and as hard as its truth file says."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from embcomp.data_pipelines.bayes_metrics import BayesMeter, Truth
from embcomp.data_pipelines.schema import BayesMetrics
from embcomp.data_pipelines.splits import ChronologicalSplit, FileSplit, RandomSplit
from embcomp.data_pipelines.synthetic.click_model import MISSING
from embcomp.data_pipelines.synthetic.generate import draw, write_criteo_log
from embcomp.data_pipelines.synthetic.synthetic_rows import (
    CRITEO_CARDINALITIES,
    SyntheticConfig,
    SyntheticRows,
)
from embcomp.errors import ConfigError, DataError

SMALL = SyntheticConfig(rows=20_000, scale=0.0001)


def everything(config):
    parts = list(draw(config))
    values = np.concatenate([rows.values for rows, _, _ in parts], axis=1)
    probability = np.concatenate([part[1] for part in parts])
    label = np.concatenate([part[2] for part in parts])
    return values, probability, label


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_criteo_log(tmp_path / name, SyntheticConfig(rows=3000, seed=seed))
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c
    truth_a, truth_b = ((tmp_path / f"{name}.truth.json").read_bytes() for name in "ab")
    assert truth_a == truth_b


def test_lines_are_criteo_lines_of_the_drawn_rows(tmp_path):
    config = SyntheticConfig(rows=66_000, scale=0.001)  # more than one chunk
    truth = write_criteo_log(tmp_path / "train.txt", config)
    values, _, label = everything(config)
    lines = (tmp_path / "train.txt").read_text().splitlines()
    assert len(lines) == truth.rows == 66_000
    assert truth.positives == label.sum()
    ends = np.r_[0:2000, 64_500:66_000]  # rows of both chunks
    table = np.array([lines[row].split("\t") for row in ends])
    values, label = values[:, ends], label[ends]
    assert table.shape == (len(ends), 40)
    np.testing.assert_array_equal(table[:, 0], label.astype(int).astype(str))
    counts = table[:, 1:14]
    absent = (counts == "").mean(axis=0)
    assert absent.max() > 0.7
    assert absent.min() == 0
    assert min(int(text) for text in counts.ravel() if text) == -1
    for field in range(26):
        column = table[:, 14 + field]
        np.testing.assert_array_equal(column == "", values[field] == MISSING)
        # One text per value and one value per text.
        texts, first = np.unique(column, return_index=True)
        assert len(texts) == len(np.unique(values[field]))
        np.testing.assert_array_equal(
            values[field][first][np.searchsorted(texts, column)], values[field]
        )
        assert all(len(text) == 8 and int(text, 16) >= 0 for text in texts if text)


@pytest.mark.parametrize("rule", [ChronologicalSplit(), RandomSplit(seed=7)])
def test_truth_is_the_score_of_the_true_probabilities_on_the_test_rows(tmp_path, rule):
    truth = write_criteo_log(tmp_path / "train.txt", SMALL, split_rule=rule)
    _, probability, label = everything(SMALL)
    test = rule.codes(0, SMALL.rows, SMALL.rows, None) == 2
    assert truth.bayes is not None
    assert truth.bayes.auc == pytest.approx(roc_auc_score(label[test], probability[test]), abs=2e-6)
    assert truth.bayes.log_loss == pytest.approx(log_loss(label[test], probability[test]), abs=1e-6)
    assert truth.by_split["test"] == truth.bayes
    assert Truth.load(tmp_path / "train.txt.truth.json") == truth


def test_no_distortion_of_the_truth_scores_better():
    _, probability, label = everything(SMALL)
    best = roc_auc_score(label, probability)
    noise = np.random.default_rng(0).normal(size=len(label))
    logit = np.log(probability / (1 - probability))
    assert roc_auc_score(label, logit + 0.5 * noise) < best - 0.005
    # Calibrated: in each tenth of the rows, as many clicks as promised, within 4 deviations.
    for part in np.array_split(np.argsort(probability), 10):
        promised, spread = (
            probability[part].sum(),
            np.sqrt((probability[part] * (1 - probability[part])).sum()),
        )
        assert abs(label[part].sum() - promised) < 4 * spread


def test_default_difficulty_is_that_of_click_prediction():
    for seed in (1, 2):
        _, probability, label = everything(SyntheticConfig(rows=40_000, seed=seed))
        assert 0.78 < roc_auc_score(label, probability) < 0.86
        assert 0.24 < label.mean() < 0.275


def test_pairs_of_fields_interact():
    alone = SyntheticConfig(rows=20_000, interaction=0.0, first_order=0.0, numeric=0.0)
    _, probability, _ = everything(alone)
    assert np.ptp(probability) < 1e-9
    together = SyntheticConfig(rows=20_000, interaction=1.0, first_order=0.0, numeric=0.0)
    _, probability, _ = everything(together)
    logit = np.log(probability / (1 - probability))
    assert logit.std() == pytest.approx(1.0, abs=0.1)


def test_planted_pairs_interact_by_their_ranks_and_others_not_at_all():
    config = SyntheticConfig(
        rows=30_000,
        scale=0.0,
        min_cardinality=16,
        exponent=0.0,
        ranks=(7, 0, 0, 0, 0, 1),
        interaction=1.0,
        first_order=0.0,
        numeric=0.0,
    )
    values, probability, _ = everything(config)
    logit = np.log(probability / (1 - probability))

    def explained(f, g):
        """Share of the logit's variance between the combinations of two fields' values."""
        cells = values[f] * 1000 + values[g]
        _, cell = np.unique(cells, return_inverse=True)
        means = np.bincount(cell, logit) / np.bincount(cell)
        return means[cell].var() / logit.var()

    assert explained(0, 1) == pytest.approx(7 / 8, abs=0.1)
    assert explained(10, 11) == pytest.approx(1 / 8, abs=0.1)
    assert explained(0, 10) < 0.25 and explained(2, 3) < 0.05
    # Seven latents make a matrix of rank seven, beside what the other pair adds and the bias.
    known = (values[0] >= 0) & (values[1] >= 0)
    sums = np.zeros((16, 16))
    np.add.at(sums, (values[0][known], values[1][known]), logit[known])
    counts = np.zeros((16, 16))
    np.add.at(counts, (values[0][known], values[1][known]), 1)
    parts = np.linalg.svd(sums / counts, compute_uv=False)
    assert parts[6] > 3 * parts[8]


@pytest.mark.parametrize("ranks", [(-1,), (1,) * 14])
def test_ranks_that_cannot_be_planted_are_refused(ranks):
    with pytest.raises(ConfigError, match="for up to 13 pairs of fields"):
        SyntheticConfig(ranks=ranks)


def test_cardinalities_are_criteos_scaled_and_values_have_a_long_tail():
    config = SyntheticConfig(rows=60_000, scale=0.001, min_cardinality=100)
    assert config.cardinalities[2] == 10_131
    assert config.cardinalities[8] == 3
    assert config.cardinalities[0] == 100
    values, _, _ = everything(config)
    for field, cardinality in enumerate(config.cardinalities):
        present = values[field][values[field] != MISSING]
        assert present.max() < cardinality
    counts = np.sort(np.bincount(values[2][values[2] != MISSING], minlength=10_131))[::-1]
    assert counts[:100].sum() > 0.3 * counts.sum()
    assert (counts <= 5).sum() > 5_000
    full = SyntheticConfig(scale=1.0).cardinalities
    assert full == list(CRITEO_CARDINALITIES)


def unseen_share(values, field):
    """Share of the last tenth's values that the first eight tenths lack."""
    size = values.shape[1]
    train, test = values[field, : int(size * 0.8)], values[field, int(size * 0.9) :]
    return 1 - np.isin(test, train).mean()


def test_renewal_brings_ids_that_earlier_rows_lack():
    still, _, _ = everything(SMALL)
    moving, _, _ = everything(SyntheticConfig(rows=20_000, scale=0.0001, renewal=0.8))
    for field in (2, 11, 20):  # large fields
        assert unseen_share(moving, field) > unseen_share(still, field) + 0.03
    for field in (0, 8, 24):  # small ones keep their values
        assert unseen_share(moving, field) <= unseen_share(still, field) + 0.005
    first = SMALL.rows // 20
    born_later = moving[2] >= SMALL.cardinalities[2]
    early, late = born_later[:first].mean(), born_later[-first:].mean()
    assert early < 0.1
    assert 0.5 < late < 0.95


def test_drift_turns_effects_into_others_without_changing_the_rows():
    still = SyntheticConfig(rows=30_000, scale=0.0001, drift=0.0)
    moving = SyntheticConfig(rows=30_000, scale=0.0001, drift=1.0)
    values_still, p_still, _ = everything(still)
    values_moving, p_moving, _ = everything(moving)
    np.testing.assert_array_equal(values_still, values_moving)

    def agreement(part):
        return np.corrcoef(p_still[part], p_moving[part])[0, 1]

    assert agreement(slice(0, 3000)) > 0.97
    assert agreement(slice(27_000, None)) < 0.8


def test_a_longer_log_begins_with_the_same_rows():
    short, long = (everything(SyntheticConfig(rows=rows)) for rows in (1000, 2000))
    np.testing.assert_array_equal(short[0], long[0][:, :1000])
    np.testing.assert_array_equal(short[2], long[2][:1000])


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    def fail(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_criteo_log(tmp_path / "train.txt", SyntheticConfig(rows=100), progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_rows(tmp_path):
    seen: list[int] = []
    write_criteo_log(tmp_path / "t", SyntheticConfig(rows=66_000), progress=seen.append)
    assert seen == [65_536, 66_000]


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="drift must be in"):
        SyntheticConfig(drift=2.0)
    with pytest.raises(ConfigError, match="chronological or random"):
        write_criteo_log(tmp_path / "t", SMALL, split_rule=FileSplit())


def test_a_damaged_truth_file_is_named(tmp_path):
    path = tmp_path / "x.truth.json"
    with pytest.raises(DataError, match=r"x\.truth\.json is missing"):
        Truth.load(path)
    path.write_text('{"rows": -1}')
    with pytest.raises(DataError, match=r"x\.truth\.json"):
        Truth.load(path)


def test_meter_counts_ties_as_half_and_needs_both_labels():
    meter = BayesMeter()
    meter.update(np.array([0.5, 0.5]), np.array([True, True]))
    assert meter.result() is None
    meter.update(np.array([0.5, 0.25]), np.array([False, False]))
    assert meter.result() == BayesMetrics(
        auc=0.75, log_loss=round(-(3 * np.log(0.5) + np.log(0.75)) / 4, 6)
    )


def test_chunks_do_not_repeat():
    source = SyntheticRows(SMALL)
    first, second = source.chunk(0)[0], source.chunk(1)[0]
    assert (first.values[2] == second.values[2]).mean() < 0.5
