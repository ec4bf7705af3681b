"""Intervals over seeds and images: against leaving out by hand, scipy's tests and simulated comparisons."""

import itertools

import numpy as np
import pytest
from scipy import stats

from llava.compare.statistics import detectable, estimate, holm, summarise, t_quantile, t_tails
from tests.compare import simulation

SIZES = np.array([3, 1, 4, 1, 5, 2, 2, 3])


def tower(seed: int, runs: int = 3, sizes=SIZES):
    """[runs, groups] sums of rights, of a made-up tower."""
    rng = np.random.default_rng(seed)
    return rng.binomial(sizes, rng.uniform(0.2, 0.9, (runs, 1)), (runs, len(sizes)))


def mean(sums, sizes, left_out=None) -> float:
    kept = [at for at in range(len(sizes)) if at != left_out]
    return np.mean(sums[:, kept].sum(1) / sizes[kept].sum())


# --- the variance -----------------------------------------------------------------------------------------------------


def test_images_part_is_the_jackknife_by_leaving_images_out():
    a, b, count = tower(0, 1), tower(1, 1), len(SIZES)
    found = estimate(summarise(a, SIZES), summarise(b, SIZES), SIZES)
    without = np.array([mean(a, SIZES, at) - mean(b, SIZES, at) for at in range(count)])
    assert found.value == pytest.approx(mean(a, SIZES) - mean(b, SIZES))
    assert found.variance == pytest.approx((count - 1) / count * ((without - without.mean()) ** 2).sum())


def test_variance_is_that_of_the_crossed_analysis_of_variance():
    """With images of one size: (mean square of seeds + of images - of what is left) / (seeds x images)."""
    rng, (seeds, images) = np.random.default_rng(3), (4, 9)
    scores = rng.normal(size=(seeds, images)) + 2 * rng.normal(size=(seeds, 1)) + rng.normal(size=(1, images))
    grand, rows, columns = scores.mean(), scores.mean(1, keepdims=True), scores.mean(0, keepdims=True)
    of_seeds = images * ((rows - grand) ** 2).sum() / (seeds - 1)
    of_images = seeds * ((columns - grand) ** 2).sum() / (images - 1)
    left = ((scores - rows - columns + grand) ** 2).sum() / ((seeds - 1) * (images - 1))
    assert of_seeds > left
    found = estimate(summarise(scores, np.ones(images)), None, np.ones(images))
    assert found.variance == pytest.approx((of_seeds + of_images - left) / (seeds * images))


def test_variance_is_that_of_many_studies():
    """Towers of 5 and 3 seeds: the variance that one study estimates is the one that 3,000 studies have."""
    rng = np.random.default_rng(4)
    sizes = simulation.sizes_of_images(rng, 120)
    a, b = simulation.answers(rng, 3000, [0.8, 0.5], [0.3, 0.2], [5, 3], sizes)
    found = estimate(summarise(a, sizes), summarise(b, sizes), sizes)
    assert np.mean(found.variance) == pytest.approx(np.var(found.value), rel=0.08)


def test_one_seed_and_one_question_an_image_is_the_paired_t_test():
    sizes = np.ones(40)
    a, b = tower(5, 1, np.ones(40, int)), tower(6, 1, np.ones(40, int))
    found = estimate(summarise(a, sizes), summarise(b, sizes), sizes)
    true = stats.ttest_rel(a[0], b[0])
    interval = true.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((true.pvalue, interval.low, interval.high))


def test_only_seeds_vary():
    """Where all images say the same, two towers' interval is that of two samples of seeds, with degrees of freedom
    between Welch's and the common variance's."""
    a, b = np.array([0.2, 0.5, 0.9]), np.array([0.1, 0.15, 0.3])
    sizes = np.full(30, 2)
    found = estimate(*(summarise(runs[:, None] * sizes, sizes) for runs in (a, b)), sizes)
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert found.variance == pytest.approx((a.var(ddof=1) + b.var(ddof=1)) / 3)
    assert 1 / found.freedom == pytest.approx((1 / welch.df + 1 / 4) / 2)
    one = estimate(summarise(a[:, None] * sizes, sizes), None, sizes)
    interval = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    assert (one.low, one.high) == pytest.approx((interval.low, interval.high))


def test_questions_on_one_image_count_as_one():
    """The same answers, each asked four times of the same picture, tell no more than once."""
    a, b = tower(7, 2, np.ones(30, int)), tower(8, 2, np.ones(30, int))
    once = estimate(summarise(a, np.ones(30)), summarise(b, np.ones(30)), np.ones(30))
    four = estimate(summarise(4 * a, np.full(30, 4)), summarise(4 * b, np.full(30, 4)), np.full(30, 4))
    for name in ("low", "high", "p"):
        assert getattr(four, name) == pytest.approx(getattr(once, name))


# --- what follows from it ---------------------------------------------------------------------------------------------


def test_p_is_below_one_twentieth_exactly_where_the_interval_leaves_out_zero():
    rng = np.random.default_rng(9)
    sizes = simulation.sizes_of_images(rng, 60)
    a, b = simulation.answers(rng, 400, [0.8, 0.2], [0.3, 0.3], [3, 2], sizes)
    found = estimate(summarise(a, sizes), summarise(b, sizes), sizes)
    outside = (found.low > 0) | (found.high < 0)
    assert 0 < outside.sum() < 400
    assert (outside == (found.p < 0.05)).all()


def test_order_of_towers_and_of_seeds_is_nothing():
    a, b = summarise(tower(1), SIZES), summarise(tower(2, 2), SIZES)
    one, other = estimate(a, b, SIZES), estimate(b, summarise(tower(1)[::-1], SIZES), SIZES)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.p == pytest.approx(other.p)


def test_the_same_twice_is_no_difference():
    a = summarise(tower(1, 2), SIZES)
    same = estimate(a, a, SIZES)
    assert (same.value, same.p) == (0, 1) and same.low <= 0 <= same.high
    once = estimate(summarise(tower(1, 1), SIZES), summarise(tower(1, 1), SIZES), SIZES)
    assert (once.value, once.low, once.high, once.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(("images", "p"), [(1, None), (5, None), (6, 2**-5), (20, 2**-19)])
def test_no_variance_is_no_certainty(images, p):
    """Always right against always wrong: how sure that is depends on the number of images alone."""
    right, wrong, sizes = np.full((2, images), 3), np.zeros((2, images)), np.full(images, 3)
    found = estimate(summarise(right, sizes), summarise(wrong, sizes), sizes)
    if p is None:
        assert np.isnan([found.low, found.high, found.p]).all()
    else:
        assert (found.low, found.high, found.p) == (1, 1, p)


def test_holm():
    assert holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([None]) == [None]


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 7.3, 60, 1400])
def test_students_distribution_is_scipys(freedom):
    t = np.array([0, 1e-9, 0.3, 1, 2, 4.3, 12.7, 60])
    assert t_tails(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-9)
    for level in (0.05, 1e-4):
        assert t_quantile(freedom, level) == pytest.approx(stats.t.isf(level / 2, freedom), rel=1e-9)


# --- what the design could have shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "ratio"), [(2, 1.0), (2, 0.1), (5, 0.3)])
def test_detectable_difference_is_detected_in_80_per_cent(seeds, ratio):
    rng = np.random.default_rng(seeds)
    sizes = simulation.sizes_of_images(rng, 150)
    spread = simulation.seed_spread_for(rng, ratio, 0.6, seeds, sizes)

    def studies(accuracies, count):
        skills = [simulation.skill_for(accuracy, spread) for accuracy in accuracies]
        return simulation.answers(rng, count, skills, [spread] * len(skills), [seeds] * len(skills), sizes)

    towers = studies([0.6] * 10, 12)
    told = [detectable([summarise(sums[at], sizes) for sums in towers], sizes) for at in range(12)]
    difference = np.mean(told)
    assert 0 < difference < 0.6
    pair = studies([0.6 - difference / 2, 0.6 + difference / 2], 1500)
    power = np.mean(estimate(*(summarise(sums, sizes) for sums in pair), sizes).p < 0.05)
    assert 0.75 < power < 0.85


def test_detectable_difference_of_many_seeds_is_the_textbook_one():
    """Only seeds vary, and there are 40 of them: t(0.975) + t(0.8), at 78 degrees of freedom, standard errors."""
    runs, sizes = np.linspace(0.2, 0.7, 40), np.full(50, 2)
    towers = [summarise((runs + shift)[:, None] * sizes, sizes) for shift in (0, 0.1, 0.2, 0.3)]
    error = np.sqrt(2 * runs.var(ddof=1) / 40)
    assert detectable(towers, sizes) / error == pytest.approx(stats.t.isf(0.025, 78) + stats.t.isf(0.2, 78), rel=0.01)


def test_nothing_is_detectable_where_seed_noise_is_not_known():
    several, single = summarise(tower(1), SIZES), summarise(tower(2, 1), SIZES)
    assert detectable([several, single], SIZES) is None
    assert detectable([single, single], SIZES) is None
    assert detectable([several], SIZES) is None
    other = summarise(tower(3), SIZES)
    assert detectable([several, other, single], SIZES) == detectable([several, other], SIZES) > 0


# --- coverage and false alarms ----------------------------------------------------------------------------------------

SMALL, EQUAL, LARGE = 0.1, 1.0, 10.0  # variance of a difference by seeds, over that by images


def bounds_of_coverage(seeds: int, ratio: float) -> tuple[float, float]:
    """The corner where coverage is above 97%: two seeds cannot tell that there is hardly any seed noise."""
    return (0.93, 0.98) if seeds == 2 and ratio <= SMALL else (0.93, 0.97)


@pytest.mark.parametrize("questions", [100, 400, 1400])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_intervals_of_differences_hold_the_truth_in_95_per_cent(seeds, questions):
    for ratio in (SMALL, EQUAL, LARGE):
        rng = np.random.default_rng(7)
        found = simulation.coverage(rng, 1000, seeds, questions, ratio, (0.7, 0.6))
        low, high = bounds_of_coverage(seeds, ratio)
        assert low <= found["difference"] <= high, (ratio, found)
        assert found["one_tower"] >= 0.90, (ratio, found)


@pytest.mark.parametrize(("seeds", "ratio"), [(2, SMALL), (2, LARGE), (3, EQUAL), (5, EQUAL)])
def test_false_alarms_among_four_equal_towers(seeds, ratio):
    """Of six pairs without a difference: none is marked in 95% of 1,000 studies."""
    rng = np.random.default_rng(2)
    sizes = simulation.sizes_of_images(rng, 300)
    spread = simulation.seed_spread_for(rng, ratio, 0.7, seeds, sizes)
    skill = simulation.skill_for(0.7, spread)
    runs = simulation.answers(rng, 1000, [skill] * 4, [spread] * 4, [seeds] * 4, sizes)
    towers = [summarise(sums, sizes) for sums in runs]
    p = np.stack([estimate(a, b, sizes).p for a, b in itertools.combinations(towers, 2)], 1)
    assert np.mean(p < 0.05) <= 0.055
    assert np.mean([min(holm(list(row))) < 0.05 for row in p]) <= 0.05
