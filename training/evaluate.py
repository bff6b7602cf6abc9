"""Command: measure the exported trio on held-out text and held-out problems.

Alpha is chosen on the validation split and everything is reported on the test split. Acceptance is teacher-forced: the
mean, over the answers' positions, of 1 - TV(target, draft) with the proxy-tuned law as target and the expert as draft.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from training import data
from training.arithmetic import Problem, Step, problem_in, step_in
from training.laws import Law
from training.rows import Document, encode, encode_problem
from training.tokenizer import load_tokenizer
from training.train import build

ALPHAS = {"arithmetic": (1.0, 1.25, 1.5, 1.75, 2.0), "python": (0.2, 0.3, 0.5, 0.7, 1.0)}
LONGEST_ANSWER = 160
"""Most tokens of a greedy answer; the longest right one has about 115."""
_EQUATION = re.compile(r"\d+ [+\-x] \d+ = \d+")


def load_models(folder: Path, tuned_base: Path | None = None) -> dict[str, LlamaForCausalLM]:
    """Loads every exported model in float32, and the directly tuned base from its checkpoint where one is given."""
    roles = ("base", "anti-expert", "expert-arithmetic", "expert-python")
    models = {role: LlamaForCausalLM.from_pretrained(folder / role, dtype=torch.float32).eval() for role in roles}
    if tuned_base is not None and tuned_base.exists():
        model = build("base").eval()
        model.load_state_dict(torch.load(tuned_base, weights_only=True)["model"])
        models["tuned-base"] = model
    return models


class Scorer:
    """Teacher-forced scores of several models on the same documents; each model runs once.

    Args:
        models: The models by role.
        documents: Token ids and weights; positions of weight below 1 do not count.
        length: Longest prefix of a document to read.
    """

    def __init__(self, models: dict[str, LlamaForCausalLM], documents: Sequence[Document], length: int = 256) -> None:
        self.logits: dict[str, torch.Tensor] = {}
        collected: dict[str, list[torch.Tensor]] = {role: [] for role in models}
        targets: list[torch.Tensor] = []
        for start in range(0, len(documents), 16):
            chunk = [(ids[: length + 1], weights[: length + 1]) for ids, weights in documents[start : start + 16]]
            longest = max(len(ids) for ids, _ in chunk)
            ids = torch.tensor([d + [1] * (longest - len(d)) for d, _ in chunk])
            counts = torch.tensor([w + [0.0] * (longest - len(w)) for _, w in chunk])[:, 1:] >= 1.0
            targets.append(ids[:, 1:][counts])
            for role, model in models.items():
                collected[role].append(Law.of(model).logits(input_ids=ids[:, :-1])[counts])
        self.targets = torch.cat(targets)
        self.logits = {role: torch.cat(parts) for role, parts in collected.items()}

    def proxy(self, expert: str, alpha: float) -> torch.Tensor:
        """Logits [N, V] of the proxy-tuned law."""
        return self.logits["base"] + alpha * (self.logits[expert] - self.logits["anti-expert"])

    def loss(self, logits: torch.Tensor) -> float:
        """Mean cross entropy in nats."""
        return torch.nn.functional.cross_entropy(logits, self.targets).item()

    def acceptance(self, expert: str, alpha: float) -> tuple[float, float]:
        """Expected acceptance at temperature 1, and the share of positions where the greedy tokens agree."""
        target, draft = self.proxy(expert, alpha), self.logits[expert]
        overlap = torch.minimum(target.softmax(-1), draft.softmax(-1)).sum(-1).mean().item()
        return overlap, (target.argmax(-1) == draft.argmax(-1)).float().mean().item()


def answers(law: Law, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], rows: int = 64) -> list[str]:
    """Greedy continuations of prompts, so many at a time: those of one length together, since they end together."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    texts = [""] * len(encoded)
    for start in range(0, len(order), rows):
        places = order[start : start + rows]
        continued = law.greedy([encoded[i] for i in places], LONGEST_ANSWER, eos, pad)
        for i, ids in zip(places, continued, strict=True):
            texts[i] = tokenizer.decode(ids)
    return texts


def score_problems(law: Law, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> dict[str, float]:
    """Greedy answers to problems.

    Returns:
        ``exact``: share with the right number after ``####``; ``steps``: share of the steps written as expected, each
        in its place among the answer's equations; ``format``: share that ends in a line ``#### N`` at all.
    """
    exact = steps_right = steps = formatted = 0
    texts = answers(law, tokenizer, [problem.prompt for problem in problems])
    for problem, text in zip(problems, texts, strict=True):
        final = re.search(r"#### (\d+)\s*$", text)
        formatted += final is not None
        exact += final is not None and int(final.group(1)) == problem.result
        written = _EQUATION.findall(text)
        steps_right += sum(found == step.equation for found, step in zip(written, problem.steps, strict=False))
        steps += len(problem.steps)
    return {"exact": exact / len(problems), "steps": steps_right / steps, "format": formatted / len(problems)}


def score_drills(law: Law, tokenizer: PreTrainedTokenizerFast, split: str, count: int = 100) -> dict[str, float]:
    """Share of held-out equations whose result is the greedy one, by operation, after three solved equations."""
    right: dict[str, float] = {}
    for operation in "+-x":
        rng = random.Random(f"{split}/{operation}/drills")
        found: list[Step] = []
        while len(found) < count:
            step = step_in(rng, split)
            if step.operation == operation:
                found.append(step)
        correct = 0
        for start in range(0, count, 20):
            texts, prefixes = [], []
            for step in found[start : start + 20]:
                before = "".join(f"{step_in(rng, 'train').equation}.\n" for _ in range(3))
                texts.append(f"{before}{step.equation}.")
                prefixes.append(f"{before}{step.left} {operation} {step.right} =")
            rows = tokenizer(texts, padding=True, padding_side="right")["input_ids"]
            best = law.logits(input_ids=torch.tensor(rows)).argmax(-1).tolist()
            for ids, guesses, prefix in zip(rows, best, prefixes, strict=True):
                first = len(tokenizer(prefix)["input_ids"])
                end = ids.index(1) if 1 in ids else len(ids)
                correct += all(guesses[i - 1] == ids[i] for i in range(first, end))
        right[operation] = correct / count
    return right


def documents_of(task: str, split: str, tokenizer: PreTrainedTokenizerFast, count: int) -> list[Document]:
    """Held-out documents of a task: tuned answers, Python source, or glosses."""
    if task == "arithmetic":
        return [encode_problem(tokenizer, problem) for problem in problems_of(split, count)]
    texts = data.python_source(split) if task == "python" else data.wordnet_glosses(split)
    return encode(tokenizer, texts[:count])


def problems_of(split: str, count: int) -> list[Problem]:
    """Held-out problems, always the same."""
    rng = random.Random(f"{split}/problems")
    return [problem_in(rng, split) for _ in range(count)]


def evaluate_text(
    models: dict[str, LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, task: str, count: int
) -> Any:
    """Losses and acceptance of one task on the test split, for every alpha; alpha with the least validation loss."""
    expert = f"expert-{task}"
    models = {role: model for role, model in models.items() if role == expert or not role.startswith("expert-")}
    validation = Scorer(models, documents_of(task, "validation", tokenizer, count))
    by_loss = min(ALPHAS[task], key=lambda alpha: validation.loss(validation.proxy(expert, alpha)))
    test = Scorer(models, documents_of(task, "test", tokenizer, count))
    report: dict[str, Any] = {"positions": len(test.targets), "alpha_of_least_validation_loss": by_loss}
    report["loss"] = {role: test.loss(logits) for role, logits in test.logits.items()}
    report["proxy"] = {}
    for alpha in ALPHAS[task]:
        accepted, greedy = test.acceptance(expert, alpha)
        loss = test.loss(test.proxy(expert, alpha))
        report["proxy"][str(alpha)] = {"loss": loss, "acceptance": accepted, "greedy_match": greedy}
    return report


def main() -> None:
    """Parses the command line, prints the report and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder in the layout of specproxy/models")
    parser.add_argument("--tuned-base", type=Path, default=None, help="checkpoint of the directly tuned base")
    parser.add_argument("--out", type=Path, default=None, help="where to write the report as JSON")
    parser.add_argument("--count", type=int, default=200, help="held-out problems, and documents of each text")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(arguments.models / "tokenizer")
    models = load_models(arguments.models, arguments.tuned_base)
    base, anti_expert = models["base"], models["anti-expert"]
    expert = models["expert-arithmetic"]

    report: dict[str, Any] = {"drills": {}}
    glosses = Scorer(
        {role: models[role] for role in ("base", "anti-expert")},
        documents_of("wordnet", "test", tokenizer, arguments.count),
    )
    report["wordnet"] = {"loss": {role: glosses.loss(logits) for role, logits in glosses.logits.items()}}
    for role in ("base", "anti-expert"):
        report["drills"][role] = score_drills(Law.of(models[role]), tokenizer, "test")
    for task in ("arithmetic", "python"):
        report[task] = evaluate_text(models, tokenizer, task, arguments.count)
    validation = problems_of("validation", arguments.count)
    laws = {alpha: Law.proxy(base, expert, anti_expert, alpha) for alpha in ALPHAS["arithmetic"]}
    chosen = {alpha: score_problems(law, tokenizer, validation) for alpha, law in laws.items()}
    report["problems_validation"] = {str(alpha): scores for alpha, scores in chosen.items()}
    best = max(ALPHAS["arithmetic"], key=lambda alpha: chosen[alpha]["exact"])
    report["alpha_of_most_validation_matches"] = best
    test = problems_of("test", arguments.count)
    single = {role: Law.of(model) for role, model in models.items() if role != "expert-python"}
    named = single | {f"proxy {alpha}": laws[alpha] for alpha in sorted({best, 1.0})}
    report["problems"] = {name: score_problems(law, tokenizer, test) for name, law in named.items()}
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
