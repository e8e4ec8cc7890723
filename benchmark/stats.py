"""Statistics of a handful of seeds: interquartile means, bootstrap intervals, comparisons.

Agarwal et al. 2021, https://arxiv.org/abs/2108.13264. Their rliable draws resample by resample and without a seed; here
all resamples are one array, so a report of a thousand runs takes seconds and comes out the same each time. The tests
compare the two. Scores are (seeds, environments); a resample draws seeds anew for each environment.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.stats import trim_mean

RESAMPLES = 2000
FEWEST = 3  # seeds that have an interval: a bootstrap of two gives back their range


def resample(scores: np.ndarray, seed: int = 0) -> np.ndarray:
    """(resamples, seeds, environments)"""
    drawn = np.random.default_rng(seed).integers(len(scores), size=(RESAMPLES, *scores.shape))
    return np.take_along_axis(scores[None], drawn, axis=1)


def interval(estimates: np.ndarray, seeds: int) -> np.ndarray:
    """Both ends of the 95% interval, NaN where there are too few seeds to know the spread."""
    ends = np.quantile(estimates, [0.025, 0.975], axis=0)
    return ends if seeds >= FEWEST else np.full_like(ends, np.nan)


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Of the middle half of all runs; the last two axes are seeds and environments."""
    return trim_mean(scores.reshape(*scores.shape[:-2], -1), 0.25, axis=-1)


def mean(scores: np.ndarray) -> np.ndarray:
    return scores.mean((-2, -1))


def with_interval(scores: np.ndarray, estimator: Callable) -> tuple[float, float, float]:
    low, high = interval(estimator(resample(scores)), len(scores))
    return float(estimator(scores)), float(low), float(high)


@cache
def weights(seeds: int, stream: int = 0) -> np.ndarray:
    """(resamples, seeds): the share of each resample that is this seed. Streams are independent of each other."""
    generator = np.random.default_rng([seeds, stream])
    return generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds


def mean_band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of the curves (seeds, points), and the ends of its interval at every point; seeds are drawn as a whole."""
    return curves.mean(0), *interval(weights(len(curves)) @ curves, len(curves))


def probability_of_improvement(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Share of pairs of seeds in which the one is better than the other, ties being half, averaged over environments.

    A pair of score arrays for each environment, which may have different numbers of seeds.
    """
    middles, draws = [], []
    for k, (one, other) in enumerate(pairs):
        wins = (one[:, None] > other) + 0.5 * (one[:, None] == other)
        middles.append(wins.mean())
        drawn = weights(len(one), 2 * k) @ wins
        draws.append((drawn * weights(len(other), 2 * k + 1)).sum(1))
    low, high = interval(np.mean(draws, axis=0), min(len(scores) for pair in pairs for scores in pair))
    return float(np.mean(middles)), float(low), float(high)


def performance_profile(scores: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of runs whose score is above each level, and the ends of its interval."""
    share = np.array([(scores > level).mean() for level in levels])
    drawn = resample(scores)
    shares = np.stack([(drawn > level).mean((1, 2)) for level in levels], axis=1)
    return share, *interval(shares, len(scores))
