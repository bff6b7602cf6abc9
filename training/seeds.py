"""Command: what proxy-tuning reaches over several runs of the tuning, beside the base tuned directly for as long.

For every seed there are two checkpoints of `training.train`, tuned on the same rows for the same number of steps: an
expert that started from the anti-expert, and a base that started from the base. Alpha is chosen on validation problems,
for each seed or beforehand. Everything else is counted on test problems, which every law answers greedily, in float32.
What the record already holds is kept, so that a run may be continued.

The record holds every single verdict, a character a problem, and figures with intervals from `specproxy.scoring`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specproxy.problems import Problem, held_out
from specproxy.scoring import Estimate, difference, proportion, score_answers, share_of_gap
from training.evaluate import answers, load_models
from training.laws import Law
from training.tokenizer import load_tokenizer
from training.train import build

ALPHAS = (1.0, 1.25, 1.5, 1.75, 2.0)
SCORINGS = ("strict", "lenient")
TUNED = ("expert", "proxy-tuned", "tuned-base")
"""Laws that differ from seed to seed."""


def solve(law: Law, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> dict[str, str]:
    """Answers problems greedily.

    Returns:
        For each scoring a ``1`` or a ``0`` for each problem, solved or not.
    """
    texts = answers(law, tokenizer, [problem.prompt for problem in problems])
    right = score_answers(texts, [problem.answer or "" for problem in problems])
    return {name: "".join("01"[solved] for solved in getattr(right, name).astype(int)) for name in SCORINGS}


def verdicts(text: str) -> np.ndarray:
    """The verdicts of `solve` as bool [problems]."""
    return np.array([character == "1" for character in text])


def figures(base: np.ndarray, seeds: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Shares solved; proxy-tuning against the expert alone, and on the way from the base to the directly tuned base.

    Args:
        base: bool [problems].
        seeds: For every seed the same of the laws in `TUNED`. A figure takes the seeds that have all its laws.

    Returns:
        Estimates ready for JSON, each with its number of ``seeds``; without those that no seed has the laws for.
    """
    formulas: dict[str, tuple[tuple[str, ...], Callable[..., Estimate]]] = {law: ((law,), proportion) for law in TUNED}
    formulas["over_expert"] = (("proxy-tuned", "expert"), difference)
    formulas["gap_closed"] = (("proxy-tuned", "tuned-base"), partial(share_of_gap, base))
    formulas["gap_closed_by_expert"] = (("expert", "tuned-base"), partial(share_of_gap, base))
    found = {}
    for name, (laws, formula) in formulas.items():
        rows = [row for row in seeds if set(laws) <= set(row)]
        if rows:
            estimate = formula(*(np.stack([row[law] for row in rows]) for law in laws))
            found[name] = estimate.to_dict() | {"seeds": len(rows)}
    return found


def summarised(record: dict[str, Any]) -> dict[str, Any]:
    """Figures of a record's verdicts, by scoring: of every seed, and of all seeds together."""
    summary: dict[str, Any] = {}
    for scoring in SCORINGS:
        base = verdicts(record["base"][scoring])
        own = {
            seed: {law: verdicts(row[law][scoring]) for law in TUNED if law in row}
            for seed, row in record["seeds"].items()
        }
        summary[scoring] = {
            "base": proportion(base).to_dict(),
            "seeds": {seed: figures(base, [laws]) for seed, laws in own.items()},
            "pooled": figures(base, list(own.values())),
        }
    return summary


def load_checkpoint(path: Path, shape: str) -> LlamaForCausalLM:
    """A model of `training.train`, to evaluate."""
    model = build(shape).eval()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model


def choose_alpha(
    base: LlamaForCausalLM,
    expert: LlamaForCausalLM,
    anti_expert: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
) -> tuple[float, dict[str, float]]:
    """The strength at which most problems are solved (strict scoring; the least of equals), and shares by strength."""
    solved: dict[str, float] = {}
    for alpha in ALPHAS:
        right = solve(Law.proxy(base, expert, anti_expert, alpha), tokenizer, problems)["strict"]
        solved[str(alpha)] = right.count("1") / len(right)
        _tell(f"  alpha {alpha}: {solved[str(alpha)]:.1%} of the validation problems")
    return max(ALPHAS, key=lambda alpha: solved[str(alpha)]), solved


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parses the command line, evaluates what the record lacks and writes it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("specproxy/models"), help="base and anti-expert")
    parser.add_argument("--work", type=Path, default=Path("training/runs"), help="folder of the checkpoints")
    parser.add_argument("--expert", default="expert-{seed}.pt", help="a seed's expert in that folder")
    parser.add_argument("--tuned-base", default="tuned-base-{seed}.pt", help="a seed's directly tuned base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--laws", choices=TUNED, nargs="+", default=TUNED, help="laws to evaluate; all by default")
    parser.add_argument("--problems", type=int, default=500, help="test problems")
    parser.add_argument("--validation", type=int, default=120, help="validation problems, for alpha")
    parser.add_argument("--alpha", type=float, default=None, help="strength chosen before; by default each seed's own")
    parser.add_argument("--recipe", default="", help="how the checkpoints were tuned, for the record")
    parser.add_argument("--out", type=Path, required=True, help="record to write or continue, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(arguments.models / "tokenizer")
    shipped = load_models(arguments.models)
    base, anti_expert = shipped["base"], shipped["anti-expert"]
    validation = held_out("arithmetic", "validation", arguments.validation)
    test = held_out("arithmetic", "test", arguments.problems)

    record: dict[str, Any] = {"num_test": len(test), "num_validation": len(validation), "seeds": {}}
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text())
        if (earlier["num_test"], earlier["num_validation"]) != (len(test), len(validation)):
            raise ValueError(f"{arguments.out} counts other numbers of problems; name another file")
        record = earlier
    record |= {
        "date": datetime.date.today().isoformat(),
        "recipe": arguments.recipe,
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if "base" not in record:
        _tell("base")
        record["base"] = solve(Law.of(base), tokenizer, test)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")

    def evaluate(seed: str, law: str) -> dict[str, Any]:
        if law == "tuned-base":
            tuned_base = load_checkpoint(arguments.work / arguments.tuned_base.format(seed=seed), "base")
            return {law: solve(Law.of(tuned_base), tokenizer, test)}
        expert = load_checkpoint(arguments.work / arguments.expert.format(seed=seed), "small")
        if law == "expert":
            return {law: solve(Law.of(expert), tokenizer, test)}
        if arguments.alpha is None:
            alpha, solved = choose_alpha(base, expert, anti_expert, tokenizer, validation)
        else:
            alpha, solved = arguments.alpha, {}
        right = solve(Law.proxy(base, expert, anti_expert, alpha), tokenizer, test)
        return {law: right, "alpha": alpha, "validation": solved}

    for seed, law in itertools.product(map(str, arguments.seeds), arguments.laws):
        row = record["seeds"].setdefault(seed, {})
        if law not in row:
            _tell(f"seed {seed}: {law}")
            row |= evaluate(seed, law)
            right = row[law]["strict"]
            _tell(f"  {right.count('1') / len(right):.1%} of the test problems")
            record["summary"] = summarised(record)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["summary"], indent=1))


if __name__ == "__main__":
    main()
