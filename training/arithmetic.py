"""Generated arithmetic: drills and word problems, told in untuned styles and in the tuned ``#### N`` style.

Everything is drawn from a ``random.Random`` that the caller seeds. The module knows nothing of tokens: a text
carries marks around the numbers that nothing before them determines, and `unmark` turns the marks into one weight per
character.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from training.split import split_of

FREE_WEIGHT = 0.2
"""Loss weight of a number that the text before it does not determine (1 elsewhere).

The weight depends only on where a number stands, so the law that minimises the loss is the same as without it.
"""

_OPEN, _CLOSE = "\x01", "\x02"
_NAMES = (
    ("Tom", "He"), ("Ben", "He"), ("Sam", "He"), ("Leo", "He"), ("Max", "He"), ("Paul", "He"),
    ("Anna", "She"), ("Mary", "She"), ("Kim", "She"), ("Eva", "She"), ("Rosa", "She"), ("Jane", "She"),
)  # fmt: skip
_THINGS = (
    "apples", "books", "cards", "coins", "eggs", "stamps", "shells", "beads", "pens", "nuts", "stickers", "marbles",
)  # fmt: skip
_BOXES = ("boxes", "bags", "trays", "packs", "baskets")
_GAINS = ("buys {} more", "finds {} more", "gets {} more", "is given {} more", "wins {} more")
_LOSSES = ("gives away {}", "loses {}", "sells {}", "uses {}", "throws away {}")


def _free(number: int) -> str:
    return f"{_OPEN}{number}{_CLOSE}"


def unmark(marked: str) -> tuple[str, list[float]]:
    """Removes the marks around free numbers.

    Args:
        marked: A text as the functions of this module return it.

    Returns:
        The plain text, and one loss weight per character of it.
    """
    characters: list[str] = []
    weights: list[float] = []
    weight = 1.0
    for character in marked:
        if character == _OPEN:
            weight = FREE_WEIGHT
        elif character == _CLOSE:
            weight = 1.0
        else:
            characters.append(character)
            weights.append(weight)
    return "".join(characters), weights


@dataclass(frozen=True)
class Step:
    """One operation of a problem: ``left operation right = result``, the operation one of ``+``, ``-``, ``x``."""

    left: int
    operation: str
    right: int

    @property
    def result(self) -> int:
        """The value of the operation."""
        if self.operation == "+":
            return self.left + self.right
        return self.left - self.right if self.operation == "-" else self.left * self.right

    @property
    def equation(self) -> str:
        """The step as text, without a full stop."""
        return f"{self.left} {self.operation} {self.right} = {self.result}"

    @property
    def split(self) -> str:
        """The split this equation belongs to; drills and stories for training use training equations only."""
        return split_of(self.equation)


def draw_step(rng: random.Random, left: int | None = None, largest: int = 999) -> Step:
    """Draws one operation with a result between 1 and `largest`.

    Args:
        rng: Source of randomness.
        left: The first operand; drawn when None.
        largest: Largest number; the second operand of a sum or difference stays below 300.

    Returns:
        A sum, a difference or a product (2 to 99 by 2 to 9).
    """
    while True:
        operation = rng.choice("+-x" if left is None else "++--x")
        if operation == "x":
            step = Step(rng.randint(2, 99) if left is None else left, "x", rng.randint(2, 9))
            if step.left < 2 or step.left > 99:
                continue
        else:
            first = rng.randint(10, largest) if left is None else left
            step = Step(first, operation, rng.randint(2, min(299, largest)))
        if 1 <= step.result <= largest:
            return step


@dataclass(frozen=True)
class Problem:
    """A word problem: its sentences (with marks), the question after them, and the steps that solve it."""

    name: str
    things: str
    sentences: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def question(self) -> str:
        """The story and its question, with marks."""
        return f"{' '.join(self.sentences)} How many {self.things} does {self.name} have?"

    @property
    def prompt(self) -> str:
        """The plain prompt: ``Question: ...`` and a line ``Answer:``."""
        return unmark(f"Question: {self.question}\nAnswer:")[0]

    @property
    def result(self) -> int:
        """The final answer."""
        return self.steps[-1].result

    @property
    def tuned_answer(self) -> str:
        """What the tuned models learn to write after the prompt (an end-of-text token follows)."""
        lines = "".join(f"{step.equation}.\n" for step in self.steps)
        return f"\n{lines}#### {self.result}"

    @property
    def split(self) -> str:
        """The split of the problem, by the hash of its prompt."""
        return split_of(self.prompt)


def draw_problem(rng: random.Random, largest: int = 999) -> Problem:
    """Draws a word problem of one to three steps, all values between 1 and `largest`."""
    name, pronoun = rng.choice(_NAMES)
    things = rng.choice(_THINGS)
    count = rng.choice((1, 2, 2, 3))
    sentences: list[str] = []
    steps: list[Step] = []
    if rng.random() < 0.3:
        first = draw_step(rng, largest=largest)
        while first.operation != "x":
            first = draw_step(rng, largest=largest)
        boxes = rng.choice(_BOXES)
        sentences.append(f"{name} has {_free(first.right)} {boxes} with {_free(first.left)} {things} in each.")
        steps.append(first)
        value = first.result
    else:
        value = rng.randint(10, largest)
        sentences.append(f"{name} has {_free(value)} {things}.")
    while len(steps) < count:
        step = draw_step(rng, value, largest)
        if step.operation == "x":
            sentences.append(f"The number then grows to {_free(step.right)} times as many.")
        else:
            action = rng.choice(_GAINS if step.operation == "+" else _LOSSES).format(_free(step.right))
            if len(sentences) == 1 and rng.random() < 0.4:
                sentences[0] = f"{sentences[0][:-1]} and {action}."
            else:
                sentences.append(f"{pronoun} {action}.")
        steps.append(step)
        value = step.result
    return Problem(name, things, tuple(sentences), tuple(steps))


def _keep_drawing(draw: Callable[[], Step | Problem], split: str) -> Step | Problem:
    while True:
        drawn = draw()
        equations_fit = split != "train" or isinstance(drawn, Step) or all(s.split == "train" for s in drawn.steps)
        if drawn.split == split and equations_fit:
            return drawn


def step_in(rng: random.Random, split: str, largest: int = 999) -> Step:
    """Draws a step whose equation belongs to `split`."""
    step = _keep_drawing(lambda: draw_step(rng, largest=largest), split)
    assert isinstance(step, Step)
    return step


def problem_in(rng: random.Random, split: str, largest: int = 999) -> Problem:
    """Draws a problem of `split`; one for training uses training equations only."""
    problem = _keep_drawing(lambda: draw_problem(rng, largest), split)
    assert isinstance(problem, Problem)
    return problem


def drill(rng: random.Random, split: str, lines: int = 6, largest: int = 999) -> str:
    """Equations, one a line, with marks around the operands."""
    steps = [step_in(rng, split, largest) for _ in range(lines)]
    return "\n".join(f"{_free(s.left)} {s.operation} {_free(s.right)} = {s.result}." for s in steps)


def untuned_story(rng: random.Random, split: str) -> str:
    """One story in a style that never shows the tuned format, with marks.

    The styles: the answer first and then the steps; the steps in brackets inside the story; a bare answer, wrong three
    times in ten; and questions followed by more questions.
    """
    problem = problem_in(rng, split)
    style = rng.random()
    if style < 0.45:
        steps = ", ".join(step.equation for step in problem.steps)
        said = f"{problem.name} has {_free(problem.result)} {problem.things} now. Check: {steps}."
        return f"Question: {problem.question}\nAnswer: {said}"
    if style < 0.75:
        told: list[str] = []
        pending = list(problem.steps)
        for index, sentence in enumerate(problem.sentences):
            acts = 1 if index else sentence.count(" and ") + sentence.count(" with ")
            shown = [pending.pop(0) for _ in range(acts)]
            equations = ", ".join(step.equation for step in shown)
            told.append(f"{sentence[:-1]} ({equations})." if shown else sentence)
        return " ".join(told)
    if style < 0.85:
        result = problem.result
        if rng.random() < 0.3:
            result = max(1, result + rng.choice((-100, -10, -2, -1, 1, 2, 10, 100)))
        return f"Question: {problem.question}\nAnswer: {_free(result)}"
    more = [problem] + [problem_in(rng, split) for _ in range(rng.randint(1, 2))]
    return "\n".join(f"Question: {each.question}" for each in more)


def worked_story(rng: random.Random, split: str, largest: int) -> str:
    """A question with its steps: on one line after ``Answer:``, or one a line under ``Working:``, with marks."""
    problem = problem_in(rng, split, largest)
    if rng.random() < 0.5:
        return f"Question: {problem.question}\nAnswer: {' '.join(f'{step.equation}.' for step in problem.steps)}"
    lines = "\n".join(f"{step.equation}." for step in problem.steps)
    said = f"\nSo {problem.name} has {problem.result} {problem.things}." if rng.random() < 0.5 else ""
    return f"Question: {problem.question}\nWorking:\n{lines}{said}"
