"""Arithmetic in untuned styles: drills, and stories with their solution told in many ways.

None of them shows the tuned format of `training.arithmetic`: no ``####``, no line break behind ``Answer:``, none of the
tuned sentences. Everything is drawn from a ``random.Random`` that the caller seeds.
"""

from __future__ import annotations

import random

from training.arithmetic import Problem, free, problem_in, step_in, unmark

_HEADS = ("Solution:", "Steps:", "Reasoning:", "Explanation:", "Working:", "In short:")
_STARTS = ("At first there are {}", "{} to begin with", "Start: {}", "There are {} at the outset", "First {}")
_SAID = {
    "+": ("{} more come", "plus {}", "adding {}", "a gain of {}", "add {}", "{} come in", "put {} to it"),
    "-": ("{} go", "minus {}", "taking off {}", "a loss of {}", "take away {}", "{} are lost", "subtract {}"),
    "x": ("times {}", "{} times as many", "multiply by {}", "{} times that", "take it {} times"),
}
_LINKS = (": ", ", so ", ", which gives ", " gives ", ", and ", " -> ", ", that is, ")
_COUNTS = (
    ("", "", ""),
    ("first ", "next ", "then "),
    ("1) ", "2) ", "3) "),
    ("a) ", "b) ", "c) "),
    ("(1) ", "(2) ", "(3) "),
)
_BREAKS = ("; ", ". ", ", ")
_ENDS = ("", ". Result: {}", "; in the end {}", ". That makes {}", ", hence {}", ". Total: {}", ", so {} remain")
_LABELS = (
    "", "", "{}. ", "{}) ", "({}) ", "Line {}: ", "Step {} - ", "Part {}: ", "No. {}: ", "Stage {}, ", "- ", "* ",
)  # fmt: skip
_SUBJECTS = ("", "", "we ", "you ", "they ", "now ", "then ", "we then ", "you must ", "let us ", "we can ")
_DOINGS = {
    "+": ("put in {}", "get {}", "gain {}", "count in {}", "bring in {}", "add on {}", "receive {}", "have {} more"),
    "-": ("lose {}", "remove {}", "drop {}", "take off {}", "give up {}", "cross out {}", "part with {}", "go {} down"),
    "x": ("multiply by {}", "count it {} times", "make it {} times that", "repeat it {} times", "have it {} times"),
}
_OPENINGS = (
    "Begin with {amount}", "We begin with {amount}", "{name} has {amount} {things}", "There are {amount} {things}",
    "It is {amount} at first", "The first number is {amount}", "You have {amount}", "Given: {amount}",
    "{amount} {things}",
)  # fmt: skip
_PRODUCTS = ("{} times {}", "{} lots of {}", "{} by {}", "{} of {} each")
_CLOSINGS = (
    "The answer: {result}", "That leaves {result} {things}", "{name} has {result} {things} now", "Altogether {result}",
    "So {name} has {result}", "Final count: {result}", "Answer = {result}", "It is {result} in the end",
)  # fmt: skip


def drill(rng: random.Random, split: str, lines: int = 6, operations: str = "+-x") -> str:
    """Equations, one a line, with marks around the operands; `operations` as in `draw_step`."""
    steps = [step_in(rng, split, operations) for _ in range(lines)]
    return "\n".join(f"{free(s.left)} {s.operation} {free(s.right)} = {s.result}." for s in steps)


def _bracketed(problem: Problem) -> str:
    told = []
    for sentence, steps in problem.told:
        equations = ", ".join(step.equation for step in steps)
        told.append(f"{sentence} ({equations})." if steps else f"{sentence}.")
    return " ".join(told)


def _noted(problem: Problem) -> str:
    steps = list(problem.steps)
    notes = [problem.opening]
    if len(steps) > len(problem.actions):
        notes[0] += f": {steps.pop(0).equation}"
    notes += [f"{action}: {step.equation}" for action, step in zip(problem.actions, steps, strict=True)]
    return unmark("; ".join(notes))[0] + "."


def _explained(rng: random.Random, problem: Problem) -> str:
    """The solution on one line, in one of many wordings; each is drawn once for the whole text."""
    link, numbers, between = rng.choice(_LINKS), rng.choice(_COUNTS), rng.choice(_BREAKS)
    said = {operation: rng.choice(phrases) for operation, phrases in _SAID.items()}
    steps = list(problem.steps)
    parts = [rng.choice(_STARTS).format(steps[0].left)]
    if len(steps) > len(problem.actions):
        first = steps.pop(0)
        parts = [f"{rng.choice(_STARTS).format(f'{first.right} times {first.left}')}{link}{first.equation}"]
    for number, step in zip(numbers, steps, strict=False):
        parts.append(f"{number}{said[step.operation].format(step.right)}{link}{step.equation}")
    return f"{rng.choice(_HEADS)} {between.join(parts)}{rng.choice(_ENDS).format(problem.result)}."


def _line_by_line(rng: random.Random, problem: Problem) -> str:
    """The solution a line at a time, or a sentence at a time; a step's words are drawn anew for each.

    What a model takes from it is to find the numbers whatever stands around them.
    """
    label, link = rng.choice(_LABELS), rng.choice((*_LINKS, ". So ", "; ", ". It is "))
    steps = list(problem.steps)
    amount, equation = str(steps[0].left), ""
    if len(steps) > len(problem.actions):
        first = steps.pop(0)
        amount, equation = rng.choice(_PRODUCTS).format(first.right, first.left), link + first.equation
    words = {"name": problem.name, "things": problem.things, "amount": amount, "result": problem.result}
    lines = [rng.choice(_OPENINGS).format(**words) + equation]
    for number, step in enumerate(steps, start=1):
        doing = rng.choice(_SUBJECTS) + rng.choice(_DOINGS[step.operation]).format(step.right)
        lines.append(label.format(number) + doing + link + step.equation)
    if rng.random() < 0.8:
        lines.append(rng.choice(_CLOSINGS).format(**words))
    told = (f"{line[0].upper()}{line[1:]}." for line in lines)
    return (
        f"{rng.choice(_HEADS)}\n" + "\n".join(told)
        if rng.random() < 0.75
        else f"{rng.choice(_HEADS)} " + " ".join(told)
    )


def untuned_story(rng: random.Random, split: str, by_line: float = 0.0) -> str:
    """One story in a style that never shows the tuned format, with marks.

    The styles: the solution explained on one line, in many wordings; notes of what happens, with the steps; the steps
    in brackets inside the story; the steps alone, one a line or on one line; the answer first and then the steps; a
    bare answer, wrong three times in ten; and questions followed by more questions. A share `by_line` of the
    stories has the solution line by line, in yet more wordings.
    """
    problem = problem_in(rng, split)
    if by_line and rng.random() < by_line:
        return f"Question: {problem.question}\n{_line_by_line(rng, problem)}"
    style = rng.random()
    if style < 0.5:
        return f"Question: {problem.question}\n{_explained(rng, problem)}"
    if style < 0.65:
        return f"Question: {problem.question}\nNotes: {_noted(problem)}"
    if style < 0.75:
        return _bracketed(problem)
    if style < 0.82:
        lines = "\n".join(f"{step.equation}." for step in problem.steps)
        return f"Question: {problem.question}\nWorking:\n{lines}"
    if style < 0.86:
        return f"Question: {problem.question}\nAnswer: {' '.join(f'{step.equation}.' for step in problem.steps)}"
    if style < 0.92:
        steps = ", ".join(step.equation for step in problem.steps)
        said = f"{problem.name} has {free(problem.result)} {problem.things} now. Check: {steps}."
        return f"Question: {problem.question}\nAnswer: {said}"
    if style < 0.96:
        result = problem.result
        if rng.random() < 0.3:
            result = max(1, result + rng.choice((-100, -10, -2, -1, 1, 2, 10, 100)))
        return f"Question: {problem.question}\nAnswer: {free(result)}"
    more = [problem] + [problem_in(rng, split) for _ in range(rng.randint(1, 2))]
    return "\n".join(f"Question: {each.question}" for each in more)
