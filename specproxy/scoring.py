"""Scores of answers that end in a number, and how sure they are. Knows texts and numbers, nothing of models.

Two readings of one answer, as lm-evaluation-harness has them for GSM8K (Cobbe et al. 2021, arXiv 2110.14168):

    strict      the number behind the first `####`: the answer in the format that tuning teaches
    lenient     the last number anywhere: what a model without the format may know

Every interval is one of `confidence`, 95 % by default. What is compared was measured on the same problems, so that
differences and shares are drawn from paired resamples: the same problems, and the same runs, on every side.

Example:
    >>> right = score_answers(["So 2.\\n#### 2", "it is 5"], ["#### 2", "#### 5"])
    >>> right.strict.tolist(), right.lenient.tolist()
    ([True, False], [True, True])
    >>> estimate = proportion(right.lenient)
    >>> round(estimate.value, 2), round(estimate.low, 2), round(estimate.high, 2)
    (1.0, 0.34, 1.0)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specproxy.errors import ConfigurationError

__all__ = [
    "Estimate",
    "Scores",
    "difference",
    "lenient_answer",
    "mean",
    "proportion",
    "reference_answer",
    "score_answers",
    "share_of_gap",
    "strict_answer",
]

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_LENIENT = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_MARK = re.compile(r".*#### ", re.DOTALL)
_IGNORED = re.compile(r"[,$]")
_RESAMPLES = 5_000
_SEED = 0


def strict_answer(text: str) -> str | None:
    """The number behind the first `####`, normalised; None where there is none."""
    found = _STRICT.search(text)
    return None if found is None else _normalised(found.group(1))


def lenient_answer(text: str) -> str | None:
    """The last number in the text, normalised; None where there is none."""
    found = _LENIENT.findall(text)
    return _normalised(found[-1]) if found else None


def reference_answer(text: str) -> str:
    """The number that a reference states: behind its last `####`, or the whole text."""
    return _normalised(_MARK.sub("", text.strip()))


def _normalised(number: str) -> str:
    return _IGNORED.sub("", number).removesuffix(".")


@dataclass(frozen=True)
class Scores:
    """Which answers are right, bool [problems] each; see the module for the two readings."""

    strict: NDArray[np.bool_]
    lenient: NDArray[np.bool_]


def score_answers(texts: Sequence[str], references: Sequence[str]) -> Scores:
    """Compare answers with references, number by number, as strings without commas, dollars and a last full stop.

    Args:
        texts: a model's answers, without their prompts.
        references: of the same problems: numbers, or solutions that end in `#### N`.
    """
    expected = [reference_answer(reference) for reference in references]
    pairs = list(zip(texts, expected, strict=True))
    return Scores(
        np.array([strict_answer(text) == number for text, number in pairs], dtype=bool),
        np.array([lenient_answer(text) == number for text, number in pairs], dtype=bool),
    )


@dataclass(frozen=True)
class Estimate:
    """A value and its interval. A bound is None where the data give none; so is a value that is not defined."""

    value: float | None
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Ready for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def format(self, scale: float = 100.0, digits: int = 1) -> str:
        """As `12.3 [10.1, 14.9]`, percent by default; a dash stands for what is None."""
        value, low, high = ("-" if x is None else f"{x * scale:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def proportion(right: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Share of right answers.

    Args:
        right: bool [problems], or [runs, problems] for several runs (seeds of a tuning run, say).
        confidence: of the interval.

    Returns:
        The mean, with Wilson's interval for one run, and for several the percentiles of a bootstrap over runs and
        problems, which sees how runs differ as far as so few can tell.

    Source: E. B. Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22.
    """
    rows = _rows(right)
    if len(rows) > 1:
        return _bootstrap(lambda means: means[0], [rows], confidence)
    n = rows.shape[1]
    share, z = float(rows.mean()), NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The bounds hold the share itself, which rounding must not hide where all or none are right.
    return Estimate(share, min(share, max(0.0, centre - reach)), max(share, min(1.0, centre + reach)))


def mean(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of any numbers, one per text, with the percentiles of a bootstrap over texts.

    Args:
        values: [texts] or [runs, texts].
        confidence: of the interval.
    """
    return _bootstrap(lambda means: means[0], [_rows(values)], confidence)


def difference(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of `first` less that of `second` on the same problems: of right answers, the difference of their shares.

    Args:
        first, second: bool, or any numbers, [problems] or [runs, problems]; one without runs stands beside every run
            of the other.
        confidence: of the interval, the percentiles of a paired bootstrap.
    """
    return _bootstrap(lambda means: means[0] - means[1], [_rows(first), _rows(second)], confidence)


def share_of_gap(base: ArrayLike, proxy: ArrayLike, tuned: ArrayLike, confidence: float = 0.95) -> Estimate:
    """How much of the way from the base to the directly tuned base proxy-tuning goes: (proxy - base) / (tuned - base).

    Args:
        base, proxy, tuned: bool [problems] or [runs, problems] of the same problems.
        confidence: of the interval, the percentiles of a paired bootstrap.

    Returns:
        The share; 1 closes the gap, and more passes it. Without bounds where resamples have no gap so often that its
        sign is not known with `confidence`; without value where there is none in the sample itself.
    """

    def share(means: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        gap = means[2] - means[0]
        return np.divide(means[1] - means[0], gap, out=np.full_like(gap, np.nan), where=gap > 0)

    return _bootstrap(share, [_rows(base), _rows(proxy), _rows(tuned)], confidence)


def _rows(right: ArrayLike) -> NDArray[np.float64]:
    """As [runs, problems]."""
    rows = np.atleast_2d(np.asarray(right, dtype=np.float64))
    if rows.ndim != 2 or rows.size == 0:
        raise ConfigurationError(f"right has shape {list(np.shape(right))}; give [problems] or [runs, problems].")
    return rows


def _bootstrap(
    statistic: Callable[[list[NDArray[np.float64]]], Any], samples: list[NDArray[np.float64]], confidence: float
) -> Estimate:
    """A statistic of means and its percentile interval over resamples of problems and runs, shared by all samples.

    Args:
        statistic: from the samples' means, each [n], to values [n]; NaN where it is not defined.
        samples: each [runs, problems]; of one number of problems, and of one number of runs or of 1.
        confidence: of the interval.
    """
    shapes = [sample.shape for sample in samples]
    runs, problems = max(shape[0] for shape in shapes), shapes[0][1]
    if any(shape[1] != problems or shape[0] not in (1, runs) for shape in shapes):
        listed = ", ".join(str(list(shape)) for shape in shapes)
        raise ConfigurationError(f"right has shapes {listed}; give the same problems, and the same runs or one.")
    value = float(statistic([np.array([sample.mean()]) for sample in samples])[0])
    rng = np.random.default_rng(_SEED)
    drawn = rng.multinomial(problems, np.full(problems, 1 / problems), size=_RESAMPLES) / problems
    drawn_runs = rng.multinomial(runs, np.full(runs, 1 / runs), size=_RESAMPLES) / runs
    means = []
    for sample in samples:
        by_run = drawn @ sample.T  # [resamples, runs]
        means.append(by_run[:, 0] if len(sample) == 1 else (by_run * drawn_runs).sum(axis=1))
    values = statistic(means)
    tail = (1 - confidence) / 2
    if np.isnan(value):
        return Estimate(None, None, None)
    if np.isnan(values).mean() > tail:
        return Estimate(value, None, None)
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
