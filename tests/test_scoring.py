"""Scores agree with lm-evaluation-harness, intervals with SciPy and with theory, problems with their generator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lm_eval.filters.extraction import RegexFilter
from scipy.stats import binomtest

from specproxy import scoring
from specproxy.errors import ConfigurationError, PromptError
from specproxy.problems import SPLITS, held_out, held_out_file, load_problems
from training.held_out import COUNT, problem_lines

TEXTS = [
    "\nWe start with 52.\nSo the answer is 61.\n#### 61",
    "#### 1,234.\nand later 7",
    "#### -5 then #### 6",
    "it costs $18.50",
    "it costs $18.50.",
    "19 + 3 = 22. 22 is it.",
    "no number",
    "#### none, but 12",
    "a. b, c... 4",
    "4 ... and",
    "12.0",
    "",
    "x = -3",
]
# The patterns of lm-eval's gsm8k.yaml.
STRICT = RegexFilter("#### (\\-?[0-9\\.\\,]+)")
LENIENT = RegexFilter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)


def harness_says(text: str, reference: str, reading: RegexFilter) -> bool:
    """What gsm8k's filter and its exact match make of an answer."""
    import re

    [[found]] = reading.apply([[text]], [{}])
    sides = [found, reference]
    for pattern in (",", "\\$", "(?s).*#### ", "\\.$"):
        sides = [re.sub(pattern, "", side) for side in sides]
    return sides[0].lower() == sides[1].lower()


def test_readings_are_those_of_the_harness() -> None:
    answers = [
        "61",
        "1234",
        "-5",
        "6",
        "7",
        "18.50",
        "22",
        "12",
        "4",
        "12.0",
        "-3",
        "3",
        "work\nso\n#### 61",
        "#### 1,234",
    ]
    right = 0
    for reference in answers:
        scores = scoring.score_answers(TEXTS, [reference] * len(TEXTS))
        assert scores.strict.tolist() == [harness_says(text, reference, STRICT) for text in TEXTS]
        assert scores.lenient.tolist() == [harness_says(text, reference, LENIENT) for text in TEXTS]
        right += scores.strict.sum() + scores.lenient.sum()
    assert right > 15


def test_scores_ask_for_as_many_references() -> None:
    with pytest.raises(ValueError, match="zip"):
        scoring.score_answers(["1"], [])


@pytest.mark.parametrize(("right", "total"), [(0, 20), (1, 20), (13, 20), (20, 20), (287, 500)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_proportion_is_wilsons(right: int, total: int, confidence: float) -> None:
    estimate = scoring.proportion([True] * right + [False] * (total - right), confidence)
    expected = binomtest(right, total).proportion_ci(confidence, method="wilson")
    assert estimate.value == right / total
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))
    assert estimate.low <= estimate.value <= estimate.high


def test_difference_is_paired() -> None:
    rng = np.random.default_rng(1)
    second = rng.random(400) < 0.5
    first = second | (rng.random(400) < 0.2)  # never wrong where the second is right
    estimate = scoring.difference(first, second)
    deltas = first.astype(float) - second
    assert estimate.value == pytest.approx(deltas.mean())
    half = 1.96 * deltas.std() / np.sqrt(400)
    assert estimate.low == pytest.approx(deltas.mean() - half, abs=0.004)
    assert estimate.high == pytest.approx(deltas.mean() + half, abs=0.004)
    shuffled = scoring.difference(first, rng.permutation(second))
    assert shuffled.high - shuffled.low > 1.5 * (estimate.high - estimate.low)
    assert scoring.difference(first, first) == scoring.Estimate(0.0, 0.0, 0.0)


def test_several_runs_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    runs = rng.random((3, 400)) < np.array([0.4, 0.55, 0.7])[:, None]
    one, three = scoring.proportion(runs[1]), scoring.proportion(runs)
    assert three.value == pytest.approx(runs.mean())
    assert three.high - three.low > 1.5 * (one.high - one.low)
    base = rng.random(400) < 0.1  # the base has no tuning run
    assert scoring.difference(runs, base).value == pytest.approx(runs.mean() - base.mean())


def test_share_of_gap() -> None:
    base, tuned = np.zeros(200, bool), np.arange(200) < 150
    proxy = np.arange(200) < 120
    estimate = scoring.share_of_gap(base, proxy, tuned)
    assert estimate.value == pytest.approx(0.8)
    assert 0.7 < estimate.low < 0.8 < estimate.high < 0.9
    assert scoring.share_of_gap(base, tuned, tuned) == scoring.Estimate(1.0, 1.0, 1.0)
    assert scoring.share_of_gap(tuned, proxy, base) == scoring.Estimate(None, None, None)
    unsure = scoring.share_of_gap(np.arange(10) < 4, np.arange(10) < 5, np.arange(10)[::-1] < 5)
    assert unsure.value == pytest.approx(1.0) and unsure.low is None and unsure.high is None


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ConfigurationError, match="same problems"):
        scoring.difference([True] * 3, [True] * 4)
    with pytest.raises(ConfigurationError, match="same runs or one"):
        scoring.difference(np.ones((2, 4)), np.ones((3, 4)))
    with pytest.raises(ConfigurationError, match=r"shape \[0\]"):
        scoring.proportion([])


def test_estimates_as_text_and_json() -> None:
    estimate = scoring.Estimate(0.5, 0.25, None)
    assert estimate.format() == "50.0 [25.0, -]"
    assert json.loads(json.dumps(estimate.to_dict())) == {"value": 0.5, "low": 0.25, "high": None}


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_problems_are_the_generators(split: str) -> None:
    assert held_out_file("arithmetic", split).read_text().splitlines()[:40] == problem_lines(split, 40)
    problems = held_out("arithmetic", split)
    assert len(problems) == COUNT
    scores = scoring.score_answers([problem.answer or "" for problem in problems], [p.answer or "" for p in problems])
    assert scores.strict.all() and scores.lenient.all()
    assert held_out("arithmetic", split, 3) == problems[:3]


def test_held_out_python() -> None:
    assert all(problem.prompt.startswith("def ") and problem.answer is None for problem in held_out("python"))
    with pytest.raises(ConfigurationError, match="arithmetic/test, arithmetic/validation, python/test"):
        held_out("python", "validation")


def test_problem_files(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "How many?", "answer": "#### 2"}\n\n{"Question": "Why?", "Best Answer": "So."}\n')
    first, second = load_problems(path, needs_answers=True)
    assert (first.prompt, first.answer) == ("Question: How many?\nAnswer:", "#### 2")
    assert (second.prompt, second.answer) == ("Question: Why?\nAnswer:", "So.")
    path.write_text('{"prompt": "one\u2028line"}\r\n{"prompt": "next"}\n', encoding="utf-8")
    assert [problem.prompt for problem in load_problems(path)] == ["one\u2028line", "next"]
    path.write_text('{"question": "a", "answer": "1"}\n\n{"prompt": "b"}\n')
    assert load_problems(path)[1].answer is None
    with pytest.raises(PromptError, match="line 3 has no text under answer"):
        load_problems(path, needs_answers=True)
    path.write_text("[1]\n")
    with pytest.raises(PromptError, match="line 1 holds a list"):
        load_problems(path)
