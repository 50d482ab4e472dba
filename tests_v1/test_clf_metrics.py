"""clf.py's metrics against scikit-learn, scipy, brute force and numbers worked out by hand."""

import math
import types

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

import clf

UNIT = types.SimpleNamespace(target_min=0.0, target_max=1.0, loss="cross_entropy")
SEEDS = range(20)


def with_ties(seed):
    """(logits, targets) of 2 to 200 rows, coarse enough for many ties; both sides of the middle occur."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 200))
    targets = rng.choice([0, 0.25, 0.5, 0.75, 1], n)
    targets[:2] = 0, 1
    return np.round(rng.normal(targets - 0.5, 1.5), seed % 3), targets


# ------------------------------------------------------------------------------------------------ oracles


@pytest.mark.parametrize("seed", SEEDS)
def test_ranking_metrics_are_scikit_learns_and_scipys(seed):
    logits, targets = with_ties(seed)
    found, p, is_positive = clf.point_metrics(logits, targets, UNIT), 1 / (1 + np.exp(-logits)), targets > 0.5
    expected = {"auc": sklearn.metrics.roc_auc_score(is_positive, logits), "accuracy": sklearn.metrics.accuracy_score(is_positive, p >= 0.5),
                "average_precision": sklearn.metrics.average_precision_score(is_positive, logits),
                "f1": sklearn.metrics.f1_score(is_positive, p >= 0.5, zero_division=0),
                "brier": np.mean((p - targets) ** 2), "rmse": sklearn.metrics.root_mean_squared_error(targets, p),
                "loss": sklearn.metrics.log_loss(np.repeat([0, 1], len(p)), np.tile(p, 2), sample_weight=np.concatenate([1 - targets, targets]))}
    if len(np.unique(logits)) > 1:
        expected.update(pearson=scipy.stats.pearsonr(p, targets).statistic, spearman=scipy.stats.spearmanr(logits, targets).statistic)
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-9, abs=1e-12), name
    assert clf.point_metrics(-logits, targets, UNIT)["auc"] == pytest.approx(1 - found["auc"])


def test_brier_on_hard_targets_is_scikit_learns():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=300), rng.integers(0, 2, 300).astype(float)
    found = clf.point_metrics(logits, targets, UNIT)
    assert found["brier"] == pytest.approx(sklearn.metrics.brier_score_loss(targets, 1 / (1 + np.exp(-logits))), rel=1e-12)


@pytest.mark.parametrize("n", [3, 4, 5, 10, 50, 1000, 20000])
@pytest.mark.parametrize("strength", [0.0, 0.05, 0.3, 0.9, -0.5])
def test_spearmans_p_value_is_scipys(n, strength):
    """To 1e-6 where scipy's is above 1e-300; the smallest double is 5e-324."""
    rng = np.random.default_rng(n)
    a = rng.normal(size=n)
    b = strength * a + math.sqrt(1 - strength**2) * rng.normal(size=n)
    expected = scipy.stats.spearmanr(a, b)
    found = clf.correlation_p_value(clf.pearson(clf.average_ranks(a), clf.average_ranks(b)), n)
    if expected.pvalue > 1e-300:
        assert found == pytest.approx(expected.pvalue, rel=1e-6)
    else:
        assert found < 1e-299


@pytest.mark.parametrize("n", [3, 4, 7, 30, 300, 3000, 30000])
def test_p_values_of_any_correlation_are_students_t(n):
    """Where r itself has digits enough: p goes with (1 - r^2)^(n / 2)."""
    n_checked = 0
    for r in (1e-4, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999, 1 - 1e-8):
        expected = 2 * scipy.stats.t.sf(r * math.sqrt((n - 2) / ((1 - r) * (1 + r))), n - 2)
        if expected > 1e-290:
            n_checked += 1
            assert clf.correlation_p_value(r, n) == pytest.approx(expected, rel=1e-6)
            assert clf.correlation_p_value(-r, n) == clf.correlation_p_value(r, n)
    assert n_checked >= 4 and clf.correlation_p_value(1.0, n) == 0 and clf.correlation_p_value(0.0, n) == pytest.approx(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_kendall_is_scipys_tau_b(seed):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=rng.integers(2, 9)), seed % 2)
    if len(np.unique(scores)) > 1:
        assert clf.kendall_tau(scores) == pytest.approx(scipy.stats.kendalltau(scores, -np.arange(len(scores))).statistic, rel=1e-12, abs=1e-12)
    assert clf.kendall_tau(np.array([3.0, 2.0, 1.0])) == 1 and clf.kendall_tau(np.array([1.0, 2.0])) == -1 and clf.kendall_tau(np.zeros(3)) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_error_is_a_slow_loop_over_ten_bins(seed):
    rng = np.random.default_rng(seed)
    p, target = rng.random(101) ** 2, rng.random(101)
    p[:3] = 0.0, 0.3, 1.0  # the last bin holds its upper end
    slow = 0.0
    for b in range(10):
        mine = [i for i in range(101) if b / 10 <= p[i] < (b + 1) / 10 or b == 9 and p[i] == 1]
        if mine:
            slow += len(mine) / 101 * abs(sum(p[i] for i in mine) / len(mine) - sum(target[i] for i in mine) / len(mine))
    assert clf.calibration_error(p, target) == pytest.approx(slow, rel=1e-9)
    assert clf.calibration_error(target, target) == 0 and clf.calibration_error(p, 1 - p) > 0.1


# ------------------------------------------------------------------------------------------------ threshold


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decimals", [1, 2, 16])
def test_best_threshold_beats_every_other_one(seed, decimals):
    rng = np.random.default_rng(seed)
    p = np.round(rng.random(rng.integers(1, 40)), decimals)
    is_positive = rng.random(len(p)) < p
    accuracy = {t: ((p >= t) == is_positive).mean() for t in [*np.linspace(0, 1, 1001), *p]}
    found = clf.best_threshold(p, is_positive)
    assert 0 <= found <= 1 and ((p >= found) == is_positive).mean() == max(accuracy.values())


def test_of_equally_good_thresholds_the_one_nearest_to_the_middle_is_taken():
    assert clf.best_threshold(np.array([0.1, 0.3, 0.6]), np.array([False, False, True])) == pytest.approx(0.45)
    assert clf.best_threshold(np.array([0.2, 0.4]), np.array([True, True])) == 0.0
    assert clf.best_threshold(np.array([0.2, 0.4]), np.array([False, False])) == pytest.approx(0.7)


def test_the_best_threshold_holds_for_saturated_scores():
    """sigmoid(40) is 1.0 exactly, and nothing in [0, 1] lies above it; just below, half-way between two scores is one of them."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        p, is_positive = clf.sigmoid(rng.normal(36, 1, 6)), rng.random(6) < 0.4
        p[:2] = 0.3, 1.0
        found = clf.best_threshold(p, is_positive)
        assert 0 <= found <= 1 and ((p >= found) == is_positive).sum() == max(((p >= t) == is_positive).sum() for t in [0, 0.5, *p]), (seed, p)


def test_the_threshold_is_in_the_users_unit_and_counts_as_it_is_when_given():
    layout = types.SimpleNamespace(target_min=1.0, target_max=5.0, loss="squared_error")
    logits, target = np.array([-2.0, -1.0, 0.0, 1.0]), np.array([0.0, 0.0, 1.0, 1.0])
    found = clf.point_metrics(logits, target, layout)
    p = 1 / (1 + np.exp(-logits))
    assert found["optimal_threshold"] == pytest.approx(1 + 4 * (p[1] + p[2]) / 2) and found["optimal_accuracy"] == 1
    assert found["rmse"] == pytest.approx(4 * math.sqrt(np.mean((p - target) ** 2))) and found["brier"] == pytest.approx(np.mean((p - target) ** 2))
    given = clf.point_metrics(logits, target, layout, 1 + 4 * 0.6)
    assert given["accuracy_at_threshold"] == 0.75 and given["f1_at_threshold"] == pytest.approx(2 / 3)
    assert not {"optimal_threshold", "optimal_accuracy"} & given.keys()


# ------------------------------------------------------------------------------------------------ missing and undefined


def test_rows_without_target_do_not_count():
    logits, targets = with_ties(4)
    holes = np.insert(targets, [0, 1, len(targets)], math.nan)
    assert clf.point_metrics(np.insert(logits, [0, 1, len(logits)], [50.0, -50.0, 7.0]), holes, UNIT) == clf.point_metrics(logits, targets, UNIT)
    assert clf.point_metrics(logits, np.full(len(logits), math.nan), UNIT) == {}


@pytest.mark.parametrize("targets, missing", [([1, 1, 0.75], {"auc", "average_precision"}), ([0, 0.5, 0.25], {"auc", "average_precision"}),
                                              ([1, 1, 1], {"auc", "average_precision", "pearson", "spearman"}), ([0, 1, 0.5], set())])
def test_metrics_without_meaning_are_left_out(targets, missing):
    found = clf.point_metrics(np.array([0.1, 0.2, -0.3]), np.array(targets, dtype=float), UNIT)
    assert set(clf.POINT_METRICS) - found.keys() == missing == clf.undefined_metrics(np.array(targets, dtype=float)).keys()
    assert all(math.isfinite(value) for value in found.values())


def test_constant_scores_have_chance_metrics_and_no_nan():
    found = clf.point_metrics(np.zeros(4), np.array([0.0, 1, 1, 0]), UNIT)
    assert (found["auc"], found["average_precision"], found["pearson"], found["spearman"]) == (0.5, 0.5, 0, 0)


# ------------------------------------------------------------------------------------------------ preferences


def test_pair_metrics_are_means_over_prompts_of_means_over_pairs():
    found = clf.pair_metrics(np.array([2.0, 1.0, 0.0, 0.0, 3.0]), np.array([0, 2, 5]))
    pairs = [[(2, 1)], [(0, 0), (0, 3), (0, 3)]]
    slow = {"loss": np.mean([np.mean([math.log1p(math.exp(b - a)) for a, b in p]) for p in pairs]),
            "accuracy": np.mean([1, (0.5 + 0 + 0) / 3]), "margin": np.mean([1, -2]),
            "kendall": np.mean([1, scipy.stats.kendalltau([0, 0, 3], [3, 2, 1]).statistic])}
    assert found == pytest.approx(slow) and set(found) == set(clf.PAIR_METRICS)
    assert clf.pair_metrics(np.empty(0), np.array([0])) == {}


# ------------------------------------------------------------------------------------------------ the earlier system's set


def test_rank_metrics_of_six_rows_with_ties_by_hand():
    """Scores .2 .9 .9 .4 .1 .4 have 2, 6, 6, 4, 1, 4 scores at or below them, so ranks 1/3, 1, 1, 2/3, 1/6, 2/3."""
    scores, target = np.array([0.2, 0.9, 0.9, 0.4, 0.1, 0.4]), np.array([0.0, 1.0, 0.0, 0.6, 0.5, 1.0])
    found = clf.rank_metrics([scores], target)
    assert found["pred_scores"] == pytest.approx([1 / 3, 1, 1, 2 / 3, 1 / 6, 2 / 3]) and found["gold_scores"] == target.tolist()
    # gold (> 0.5): 0 1 0 1 0 1; predicted (rank > 0.5): 0 1 1 1 0 1, so one of six is wrong
    assert found["discrete_pred_label"] == [0, 1, 1, 1, 0, 1] and found["accuracy"] == pytest.approx(5 / 6)
    # thresholds from 0.34 to 0.66 do as well, none does better; the first one is taken
    assert found["optimal_acc"] == pytest.approx(5 / 6) and found["optimal_threshold"] == 0.34
    assert found["threshold_tuned_discrete_pred_label"] == [0, 1, 1, 1, 0, 1]
    # positives at 1, 2/3, 2/3 against negatives at 1/3, 1, 1/6: 1 + 1/2 + 1, then twice 1 + 0 + 1, of 9 pairs
    assert found["auc"] == pytest.approx(6.5 / 9)
    # squared errors: 1/9, 0, 1, 1/225, 1/9, 1/9
    assert found["rmse"] == pytest.approx(math.sqrt((1 / 9 + 1 + 1 / 225 + 1 / 9 + 1 / 9) / 6))
    # ranks of the scores 2 5.5 5.5 3.5 1 3.5, of the targets 1.5 5.5 1.5 4 3 5.5, less 3.5: 3 + 4 - 4 + 1.25 over 16.5
    assert found["spearman_corr"] == pytest.approx(4.25 / 16.5) and found["spearman_p-value"] == pytest.approx(
        scipy.stats.spearmanr(scores, target).pvalue, rel=1e-6)
    # two scores are at or below sigmoid(-1) = 0.269, four at or below sigmoid(0) = 0.5
    shares = {round(x, 4): y for x, y in found["calibration_map"]}
    assert len(shares) == 101 and shares[0.2689] == pytest.approx(2 / 6) and shares[0.5] == pytest.approx(4 / 6)
    assert found["calibration_map"][0] == [pytest.approx(1 / (1 + math.exp(5))), 0.0] and found["calibration_map"][-1][1] == 1.0


def test_several_files_are_an_ensemble_of_their_ranks():
    a, b, target = np.array([0.1, 0.2, 0.9]), np.array([0.8, 0.1, 0.9]), np.array([0.0, 0.0, 1.0])
    assert clf.rank_metrics([a, b], target)["pred_scores"] == pytest.approx([(1 / 3 + 2 / 3) / 2, (2 / 3 + 1 / 3) / 2, 1])
    assert "auc" not in clf.rank_metrics([a], np.zeros(3)) and clf.rank_metrics([a], np.zeros(3))["accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("seed", SEEDS)
def test_rank_shares_are_the_share_of_scores_at_or_below(seed):
    values, _ = with_ties(seed)
    assert clf.rank_shares(values) == pytest.approx([np.mean(values <= v) for v in values])
    assert clf.average_ranks(values) == pytest.approx(scipy.stats.rankdata(values))


def test_every_metric_that_can_choose_the_best_has_a_direction_that_is_right():
    """The scores of a perfect model, one that knows nothing and one that is wrong come in that order."""
    target = np.array([0.0, 0, 1, 1, 0.25, 0.75])
    perfect, blank = np.log((target * 0.98 + 0.01) / (1 - target * 0.98 - 0.01)), np.array([0.1, 0.2, 0.05, 0.15, 0.12, -0.1])
    found = [clf.point_metrics(logits, target, UNIT) for logits in (perfect, blank, -perfect)]
    for name, direction in clf.POINT_METRICS.items():
        values = [row[name] * (1 if direction == "high" else -1) for row in found]
        assert values[0] > values[1] >= values[2] or name == "optimal_accuracy" and values[0] > max(values[1:]), name
    first = np.array([0, 3, 5])
    found = [clf.pair_metrics(np.array(logits), first) for logits in ([3.0, 2, 1, 2, 1], [1.0, 2, 1.5, 2, 1], [1.0, 2, 3, 1, 2])]
    for name, direction in clf.PAIR_METRICS.items():
        values = [row[name] * (1 if direction == "high" else -1) for row in found]
        assert values[0] > values[1] > values[2], name
    assert clf.directions(UNIT) is clf.POINT_METRICS and clf.directions(types.SimpleNamespace(loss="pairwise")) is clf.PAIR_METRICS
