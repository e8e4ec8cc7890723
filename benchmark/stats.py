"""Statistics of a handful of seeds: interquartile means, bootstrap intervals, comparisons.

Agarwal et al. 2021, https://arxiv.org/abs/2108.13264; the estimators and the stratified bootstrap are rliable's.
"""

from collections.abc import Callable

import numpy as np
from rliable import metrics
from rliable.library import create_performance_profile, get_interval_estimates

RESAMPLES = 2000


def with_interval(scores: np.ndarray, estimators: list[Callable]) -> list[tuple[float, float, float]]:
    """Each estimate of the scores (seeds, environments) with its 95% interval; seeds are drawn for each environment."""
    points, intervals = get_interval_estimates(
        {"": scores},
        lambda drawn: np.array([estimate(drawn) for estimate in estimators]),
        reps=RESAMPLES,
        random_state=np.random.RandomState(0),
    )
    low, high = intervals[""]
    return list(zip(points[""].tolist(), low.tolist(), high.tolist(), strict=True))


def interquartile_mean(scores: np.ndarray) -> float:
    return metrics.aggregate_iqm(scores)


def mean(scores: np.ndarray) -> float:
    return metrics.aggregate_mean(scores)


def mean_band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of the curves (seeds, points), and the ends of its 95% bootstrap interval over seeds, at every point."""
    draws = np.random.default_rng(0).integers(len(curves), size=(RESAMPLES, len(curves)))
    weights = np.stack([np.bincount(draw, minlength=len(curves)) for draw in draws]) / len(curves)
    low, high = np.quantile(weights @ curves, [0.025, 0.975], axis=0)
    return curves.mean(0), low, high


def probability_of_improvement(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """That a seed of the one is better than a seed of the other, averaged over environments; both (seeds, envs)."""
    points, intervals = get_interval_estimates(
        {"": (one, other)}, metrics.probability_of_improvement, reps=RESAMPLES, random_state=np.random.RandomState(0)
    )
    return float(points[""]), *intervals[""].ravel().tolist()


def performance_profiles(
    scores: dict[str, np.ndarray], thresholds: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Share of runs whose score is above each threshold, with 95% bands (2, thresholds)."""
    return create_performance_profile(scores, thresholds, reps=RESAMPLES)
