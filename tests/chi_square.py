"""Chi-square tests of sampled laws with a stated false-alarm rate and power.

FAMILY_FALSE_ALARM bounds the probability that a correct program fails anywhere in the suite; every single test runs
at FAMILY_FALSE_ALARM / MAX_TESTS (Bonferroni). Seeds are fixed, so that a run which passes keeps passing until the
code changes.

Power. With N draws, C cells of positive probability and a total variation d between the sampled law and the exact
one, the statistic is close to a noncentral chi-square with C - 1 degrees of freedom and noncentrality N * sum (p' -
p)^2 / p, which is at least N * (2 d)^2 (Cauchy-Schwarz). `power` evaluates that bound.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

FAMILY_FALSE_ALARM = 1e-6
MAX_TESTS = 200
LEVEL = FAMILY_FALSE_ALARM / MAX_TESTS
MIN_EXPECTED = 10.0


def p_value(tokens: np.ndarray, law: np.ndarray) -> float:
    """P value of Pearson's test that rows of `tokens` [N, L] follow the joint `law` [V] * L.

    Cells that expect fewer than MIN_EXPECTED draws are merged into one. A draw of probability zero gives 0.
    """
    cells = np.ravel_multi_index(tuple(tokens.T), law.shape)
    counts = np.bincount(cells, minlength=law.size).astype(float)
    probability = law.ravel()
    if counts[probability == 0].any():
        return 0.0
    expected = probability * len(tokens)
    rare = expected < MIN_EXPECTED
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
        counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(stats.chi2.sf(statistic, len(counts) - 1))


def power(samples: int, cells: int, total_variation: float) -> float:
    """Lower bound on the probability that a law this far off fails at LEVEL."""
    critical = stats.chi2.isf(LEVEL, cells - 1)
    return float(stats.ncx2.sf(critical, cells - 1, samples * (2 * total_variation) ** 2))


def total_variation(first: np.ndarray, second: np.ndarray) -> float:
    """Half the L1 distance of two laws."""
    return float(np.abs(first - second).sum() / 2)
