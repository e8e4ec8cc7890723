"""Statistics of a handful of seeds: interquartile means, bootstrap intervals, comparisons.

Agarwal et al. 2021, https://arxiv.org/abs/2108.13264. Their rliable draws resample by resample and without a seed; here
all resamples are one array, so a report of a thousand runs takes seconds and comes out the same each time. The tests
compare the two. Scores are (seeds, environments); a resample draws seeds anew for each environment.
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import trim_mean

RESAMPLES = 2000


def resample(scores: np.ndarray, seed: int = 0) -> np.ndarray:
    """(resamples, seeds, environments)"""
    drawn = np.random.default_rng(seed).integers(len(scores), size=(RESAMPLES, *scores.shape))
    return np.take_along_axis(scores[None], drawn, axis=1)


def interval(estimates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.quantile(estimates, [0.025, 0.975], axis=0)
    return low, high


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Of the middle half of all runs; the last two axes are seeds and environments."""
    return trim_mean(scores.reshape(*scores.shape[:-2], -1), 0.25, axis=-1)


def mean(scores: np.ndarray) -> np.ndarray:
    return scores.mean((-2, -1))


def with_interval(scores: np.ndarray, estimator: Callable) -> tuple[float, float, float]:
    """An estimate and its 95% interval."""
    low, high = interval(estimator(resample(scores)))
    return float(estimator(scores)), float(low), float(high)


def mean_band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of the curves (seeds, points), and the ends of its interval at every point; seeds are drawn as a whole."""
    draws = np.random.default_rng(0).integers(len(curves), size=(RESAMPLES, len(curves)))
    weights = np.stack([np.bincount(draw, minlength=len(curves)) for draw in draws]) / len(curves)
    return curves.mean(0), *interval(weights @ curves)


def superiority(one: np.ndarray, other: np.ndarray) -> float:
    """Share of pairs of seeds in which the one is better, ties being half, averaged over environments."""
    shares = []
    for a, b in zip(one.T, np.sort(other, axis=0).T, strict=True):
        below = np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")
        shares.append(below.mean() / (2 * len(b)))
    return float(np.mean(shares))


def probability_of_improvement(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    pairs = zip(resample(one, seed=0), resample(other, seed=1), strict=True)
    low, high = interval(np.array([superiority(a, b) for a, b in pairs]))
    return superiority(one, other), float(low), float(high)


def performance_profile(scores: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of runs whose score is above each level, and the ends of its interval."""
    drawn = resample(scores)
    shares = np.stack([(drawn > level).mean((1, 2)) for level in levels], axis=1)
    return np.array([(scores > level).mean() for level in levels]), *interval(shares)
