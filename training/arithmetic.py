"""Generated arithmetic: equations and word problems, and the tuned ``#### N`` answers to them.

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
_GROWTH = "ends up with {} times as many"
_DOING = {"+": "add {}", "-": "take away {}", "x": "take {} times as many"}
LARGEST = 199
"""Largest number anywhere, in training and in the held-out problems."""


def free(number: int) -> str:
    """A number between marks: nothing before it determines it."""
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
    def prompt(self) -> str:
        """The step asked without a story: ``Question: What is ...?`` and a line ``Answer:``."""
        return f"Question: What is {self.left} {self.operation} {self.right}?\nAnswer:"

    @property
    def tuned_answer(self) -> str:
        """The tuned answer to `prompt`: the equation, then ``#### N``."""
        return f"\n{self.equation}.\n#### {self.result}"

    @property
    def split(self) -> str:
        """The split this equation belongs to; drills and stories for training use training equations only."""
        return split_of(self.equation)


def draw_step(rng: random.Random, left: int | None = None, operations: str = "+-x") -> Step:
    """Draws one operation whose numbers lie between 1 and `LARGEST`.

    Args:
        rng: Source of randomness.
        left: The first operand; drawn when None.
        operations: What to draw from where `left` is None, each character as likely as the next.

    Returns:
        A sum, a difference or a product (2 to 99 by 2 to 9).
    """
    while True:
        operation = rng.choice(operations if left is None else "++--x")
        if operation == "x":
            step = Step(rng.randint(2, 99) if left is None else left, "x", rng.randint(2, 9))
            if step.left < 2 or step.left > 99:
                continue
        else:
            first = rng.randint(10, LARGEST) if left is None else left
            step = Step(first, operation, rng.randint(2, LARGEST))
        if 1 <= step.result <= LARGEST:
            return step


@dataclass(frozen=True)
class Problem:
    """A word problem and the steps that solve it.

    Args:
        name: Who has the things.
        pronoun: ``He`` or ``She``.
        things: What is counted.
        opening: What is there at first, with marks: ``has 45 apples`` or ``has 6 boxes with 12 apples in each``.
        actions: What happens then, with marks: ``buys 23 more``.
        joined: Whether the first action stands in the sentence of the opening.
        steps: The operations: one for each action, and one before them where the opening has boxes.
    """

    name: str
    pronoun: str
    things: str
    opening: str
    actions: tuple[str, ...]
    joined: bool
    steps: tuple[Step, ...]

    @property
    def told(self) -> tuple[tuple[str, tuple[Step, ...]], ...]:
        """The sentences of the story, with marks and without full stops, each with its steps."""
        first = f"{self.name} {self.opening}"
        rest = self.actions
        if self.joined:
            first, rest = f"{first} and {self.actions[0]}", self.actions[1:]
        own = len(self.steps) - len(rest)
        later = ((f"{self.pronoun} {act}", (step,)) for act, step in zip(rest, self.steps[own:], strict=True))
        return ((first, self.steps[:own]), *later)

    @property
    def question(self) -> str:
        """The story and its question, with marks."""
        story = " ".join(f"{sentence}." for sentence, _ in self.told)
        return f"{story} How many {self.things} does {self.name} have?"

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
        steps = list(self.steps)
        lines = [f"We start with {steps[0].left}."]
        if len(steps) > len(self.actions):
            first = steps.pop(0)
            lines = [f"We start with {first.right} times {first.left}, and {first.equation}."]
        for number, step in enumerate(steps, start=1):
            lines.append(f"Step {number}: we {_DOING[step.operation].format(step.right)}, and {step.equation}.")
        lines.append(f"So the answer is {self.result}.")
        return "".join(f"\n{line}" for line in lines) + f"\n#### {self.result}"

    @property
    def split(self) -> str:
        """The split of the problem, by the hash of its prompt."""
        return split_of(self.prompt)


def draw_problem(rng: random.Random) -> Problem:
    """Draws a word problem of one to three steps, all values between 1 and `LARGEST`."""
    name, pronoun = rng.choice(_NAMES)
    things = rng.choice(_THINGS)
    count = rng.choice((1, 2, 2, 3))
    actions: list[str] = []
    steps: list[Step] = []
    if rng.random() < 0.3:
        first = draw_step(rng)
        while first.operation != "x":
            first = draw_step(rng)
        opening = f"has {free(first.right)} {rng.choice(_BOXES)} with {free(first.left)} {things} in each"
        steps.append(first)
        value = first.result
    else:
        value = rng.randint(10, LARGEST)
        opening = f"has {free(value)} {things}"
    while len(steps) < count:
        step = draw_step(rng, value)
        phrase = _GROWTH if step.operation == "x" else rng.choice(_GAINS if step.operation == "+" else _LOSSES)
        actions.append(phrase.format(free(step.right)))
        steps.append(step)
        value = step.result
    joined = bool(actions) and rng.random() < 0.4
    return Problem(name, pronoun, things, opening, tuple(actions), joined, tuple(steps))


def _keep_drawing(draw: Callable[[], Step | Problem], split: str) -> Step | Problem:
    while True:
        drawn = draw()
        equations_fit = split != "train" or isinstance(drawn, Step) or all(s.split == "train" for s in drawn.steps)
        if drawn.split == split and equations_fit:
            return drawn


def step_in(rng: random.Random, split: str, operations: str = "+-x") -> Step:
    """Draws a step whose equation belongs to `split`; `operations` as in `draw_step`."""
    step = _keep_drawing(lambda: draw_step(rng, operations=operations), split)
    assert isinstance(step, Step)
    return step


def problem_in(rng: random.Random, split: str) -> Problem:
    """Draws a problem of `split`; one for training uses training equations only."""
    problem = _keep_drawing(lambda: draw_problem(rng), split)
    assert isinstance(problem, Problem)
    return problem
