"""The training data of the embedded trio: deterministic, split without overlap, arithmetic right, digits as tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from training import data
from training.arithmetic import FREE_WEIGHT, problem_in, step_in, unmark
from training.split import SPLITS, split_of
from training.styles import drill, untuned_story

TOKENIZER = Path(__file__).parents[1] / "specproxy" / "models" / "tokenizer"
EQUATION = re.compile(r"(\d+) ([+\-x]) (\d+) = (\d+)")
SOURCES = {"wordnet": data.wordnet_glosses, "jargon": data.jargon_entries, "python": data.python_source}


def _source(read: Callable[[str], list[str]], split: str) -> list[str]:
    try:
        return read(split)
    except data.SourceMissingError as error:
        pytest.skip(str(error))


def _assert_equations_hold(text: str) -> int:
    found = EQUATION.findall(text)
    for left, operation, right, result in found:
        a, b = int(left), int(right)
        assert {"+": a + b, "-": a - b, "x": a * b}[operation] == int(result), text
    return len(found)


def test_split_is_a_function_of_the_text_and_covers_every_split() -> None:
    splits = [split_of(f"text {number}") for number in range(2_000)]
    assert splits == [split_of(f"text {number}") for number in range(2_000)]
    assert set(splits) == set(SPLITS)
    assert 0.93 < splits.count("train") / len(splits) < 0.99


def test_raw_arithmetic_is_deterministic_and_follows_its_seed() -> None:
    first = data.raw_arithmetic("train", 50, seed=3)
    assert first == data.raw_arithmetic("train", 50, seed=3)
    assert first != data.raw_arithmetic("train", 50, seed=4)
    assert first != data.raw_arithmetic("validation", 50, seed=3)


@pytest.mark.parametrize("split", SPLITS)
def test_equations_of_drills_are_right_and_of_their_split(split: str) -> None:
    rng = random.Random(1)
    for _ in range(10):
        text, _ = unmark(drill(rng, split))
        assert _assert_equations_hold(text) == 6
        assert all(split_of(line.removesuffix(".")) == split for line in text.splitlines())


@pytest.mark.parametrize("split", SPLITS)
def test_problems_belong_to_their_split_and_answers_follow_from_the_steps(split: str) -> None:
    rng = random.Random(2)
    for _ in range(40):
        problem = problem_in(rng, split)
        assert split_of(problem.prompt) == split
        answer = problem.tuned_answer
        assert _assert_equations_hold(answer) == len(problem.steps)
        assert re.fullmatch(rf"(\n[A-Z][^\n]+\.)+\n#### {problem.result}", answer)
        for earlier, later in zip(problem.steps, problem.steps[1:], strict=False):
            assert later.left == earlier.result
        numbers = sorted(int(number) for number in re.findall(r"\d+", problem.prompt))
        given = sorted([problem.steps[0].left, *(step.right for step in problem.steps)])
        assert numbers == given
        if split == "train":
            assert all(split_of(step.equation) == "train" for step in problem.steps)


def test_a_step_asked_without_a_story_is_answered_in_the_tuned_format() -> None:
    step = step_in(random.Random(4), "train")
    assert step.prompt.startswith("Question: What is ") and step.prompt.endswith("?\nAnswer:")
    assert step.tuned_answer == f"\n{step.equation}.\n#### {step.result}"


def test_untuned_stories_never_show_the_tuned_format_and_their_equations_hold() -> None:
    rng = random.Random(5)
    for by_line in (0.0, 1.0):
        stories = [unmark(untuned_story(rng, "train", by_line))[0] for _ in range(300)]
        assert not any("####" in story or "Answer:\n" in story or "We start with" in story for story in stories)
        assert not any(re.search(r"Step \d: we", story) for story in stories)
        assert sum(_assert_equations_hold(story) for story in stories) > 100


def test_unmark_weighs_free_numbers_less_and_leaves_plain_text() -> None:
    step = step_in(random.Random(7), "train")
    text, weights = unmark(drill(random.Random(7), "train", lines=1))
    assert text == f"{step.equation}."
    assert len(text) == len(weights)
    operands = len(str(step.left)) + len(str(step.right))
    assert weights.count(FREE_WEIGHT) == operands
    assert weights[text.index("=") :] == [1.0] * (len(text) - text.index("="))


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_text_sources_split_without_overlap_or_copies(source: str) -> None:
    documents = {split: _source(SOURCES[source], split) for split in SPLITS}
    assert all(documents.values())
    keys = {split: [" ".join(text.split()) for text in texts] for split, texts in documents.items()}
    for split, found in keys.items():
        if source != "python":  # blocks of different modules may agree; whole modules are what is split there
            assert len(set(found)) == len(found), split
    held_out = set(keys["validation"]) | set(keys["test"])
    assert len(held_out & set(keys["train"])) <= len(held_out) // 50
    assert documents["test"] == SOURCES[source]("test")


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_a_missing_text_source_says_what_to_install_or_name(source: str, tmp_path: Path) -> None:
    with pytest.raises(data.SourceMissingError, match=r"name its|name the"):
        SOURCES[source]("train", tmp_path / "absent")


def test_shipped_tokenizer_gives_each_digit_a_token_and_decodes_to_the_text() -> None:
    if not (TOKENIZER / "tokenizer.json").exists():
        pytest.skip("specproxy/models/tokenizer is absent; run training.export first")
    tokenizer = pytest.importorskip("training.tokenizer").load_tokenizer(TOKENIZER)
    assert len(tokenizer) == 2048
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert len(tokenizer("1234567890")["input_ids"]) == 10
    samples = ["347 + 68 = 415.\n#### 415", "def f(x):\n    return x  # \u00e9\n", "\u6f22\u5b57 \t\r\n  end"]
    for sample in [*samples, problem_in(random.Random(3), "test").prompt]:
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many?"}], tokenize=False, add_generation_prompt=True
    )
    assert shown == "Question: How many?\nAnswer:"
