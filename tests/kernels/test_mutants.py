"""Faults that speculative samplers have had, put into the source on purpose: each must be caught, by a detector that
is silent on the unmutated code. The test prints the kill matrix.

Detectors
    zero coin     an impossible draft meets a coin of 0 (both rules)
    enumeration   exact law of one cycle, total variation above 1e-12
    sampling      chi-square of three tokens through the toy loop, counter noise included
    window        `coupled` tokens of the toy loop against W = 1
    greedy        greedy tokens through `ProxyTunedModel.generate` against plain forwards
    loop window   `coupled` tokens through `generate` against W = 1
    loop law      chi-square of three tokens through `generate`
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import chi_square
import loop_law
import numpy as np
import pytest
import torch
from enumeration import InjectedNoise, Scenario, compare, make_parameters
from loop_law import LoopCase
from mutation import Mutant, mutated
from toy_loop import Toy, sample

NOISE, LAWS, REFERENCE = "specproxy_kernels.noise", "specproxy_kernels.laws", "specproxy_kernels.reference"

KERNEL_MUTANTS = [
    Mutant("residual shares the drafts' noise", NOISE, "PURPOSE_RESIDUAL = 2", "PURPOSE_RESIDUAL = 0"),
    Mutant("coin shares the drafts' noise", NOISE, "PURPOSE_COIN = 1", "PURPOSE_COIN = 0"),
    Mutant("coin shares the residual's noise", NOISE, "PURPOSE_COIN = 1", "PURPOSE_COIN = 2"),
    Mutant(
        "position-only nonce under block",
        NOISE,
        "(block_start[:, None] + 1).expand_as(index)",
        "torch.zeros_like(index)",
    ),
    Mutant(
        "<= under rejection", REFERENCE, "coins < log_ratio.clamp(max=0).exp()", "coins <= log_ratio.clamp(max=0).exp()"
    ),
    Mutant("<= under block", REFERENCE, "coins < keep_probability", "coins <= keep_probability"),
    Mutant(
        "q from unwarped logits",
        REFERENCE,
        "WarpedLaw(penalised(logits, parameters, drafts, position), law.tau, law.lse)",
        "WarpedLaw(logits, None, logits.logsumexp(-1))",
    ),
    Mutant("early stop in block", REFERENCE, "((column + 1) * kept).amax(-1)", "_leading(kept)"),
    Mutant(
        "noise reused past the budget",
        REFERENCE,
        "self.start[:, None] + torch.arange(count, device=self.start.device)",
        "(self.start[:, None] + torch.arange(count, device=self.start.device)).clamp(max=2)",
    ),
    Mutant(
        "next token from the row before",
        REFERENCE,
        "row = acceptance.num_accepted\n",
        "row = (acceptance.num_accepted - 1).clamp(min=0)\n",
    ),
    Mutant(
        "anti-expert one position late",
        LAWS,
        "pair.anti_expert[:, positions]",
        "pair.anti_expert.roll(1, 1)[:, positions]",
    ),
    Mutant(
        "residual without its weight",
        REFERENCE,
        "log_target + acceptance.log_weight[:, None], log_draft",
        "log_target, log_draft",
    ),
    Mutant(
        "target instead of residual",
        REFERENCE,
        "torch.where((from_target | empty)[:, None], scores, residual)",
        "torch.where((from_target | empty)[:, None], scores, scores)",
    ),
    Mutant("penalty of the draft on itself", LAWS, "token) | (position > j)", "token) | (position >= j)"),
    Mutant(
        "coupled bonus from another purpose",
        REFERENCE,
        'PURPOSE_TOKEN if rule == "coupled" else PURPOSE_RESIDUAL',
        "PURPOSE_RESIDUAL",
    ),
]

LOOP_MUTANTS = [
    Mutant(
        "draft discarded because of its token",
        "specproxy.draft.expert",
        "return Draft(drafts, num_drafts, joined, expert_logits)",
        "return Draft(drafts, (drafts != 0).long().cumprod(-1).sum(-1), joined, expert_logits)",
    ),
    Mutant(
        "bonus step one position early", "specproxy.verify", "offset=draft.count)", "offset=max(draft.count - 1, 0))"
    ),
    Mutant(
        "anti-expert reads one token late",
        "specproxy.verify",
        "by_role[role] = score(role, tokens)",
        "by_role[role] = score(role, tokens.roll(1, 1))",
    ),
    Mutant(
        "rollback one too few",
        "specproxy.decode",
        "runner.cache.follow([line[-3] + 1 for line in packed])",
        "runner.cache.set_lengths(0, [length + line[-3] + 2"
        " for length, line in zip(runner.cache.host_lengths, packed)])",
    ),
    Mutant(
        "rollback one too few after a refusal",
        "specproxy.decode",
        "runner.cache.follow([line[-3] + 1 for line in packed])",
        "runner.cache.set_lengths(0, [length + min(line[-3] + 2, result.window.window)"
        " for length, line in zip(runner.cache.host_lengths, packed)])",
    ),
    Mutant(
        "padded ids left open", "specproxy.vocab", "return SharedVocabulary(size)", "return SharedVocabulary(width)"
    ),
    Mutant(
        "unknown ids left open",
        "specproxy.vocab",
        "allowed = torch.zeros(size, dtype=torch.bool)",
        "allowed = torch.ones(size, dtype=torch.bool)",
    ),
    Mutant(
        "position-only nonce in the loop",
        "specproxy.state",
        "self.start if is_own else None",
        "None",
    ),
    Mutant(
        "noise of the wrong position",
        "specproxy.state",
        "self.start += advance",
        "self.start += advance - 1",
    ),
    Mutant(
        "window ignores ragged lengths",
        "specproxy.cache",
        "return self.lengths[:, None] + torch.arange(self.size, device=self.lengths.device)",
        "return self.lengths.max() + torch.arange(self.size, device=self.lengths.device).expand(self.count, -1)",
    ),
]

TOY_ROWS, LOOP_ROWS = 12_000, 1_500
_WARPED = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.5}


def _kernels() -> tuple[Any, Any]:
    return importlib.import_module(REFERENCE), importlib.import_module(NOISE)


def _model_class() -> Any:
    return importlib.import_module("specproxy.model").ProxyTunedModel


def zero_coin() -> bool:
    """A draft of target probability 0 must be refused by every coin, 0 included."""
    ops, _ = _kernels()
    zeros = torch.zeros(1, 2, 3, dtype=torch.float64)
    base = zeros.clone()
    base[..., 1] = -math.inf
    pair = ops.LogitPair(zeros, zeros, torch.ones(1, 2))
    law = ops.DraftLaw(zeros[:, :1], None, torch.full((1, 1), math.log(3.0)))
    noise = InjectedNoise(torch.zeros(1, 1), torch.zeros(1, 3))
    for rule in ("rejection", "block"):
        acceptance = ops.accept_window(
            rule, base, [pair], torch.tensor([[1]]), torch.tensor([1]), law, make_parameters(ops, 1, 3, {}), noise, 3
        )
        if acceptance.num_accepted.tolist() != [0]:
            return True
    return False


def enumeration() -> bool:
    ops, _ = _kernels()
    for rule in ("rejection", "block"):
        for scenario in (Scenario(rule, 3, 3, seed=1), Scenario(rule, 3, 3, _WARPED, seen=(1,), seed=2)):
            if compare(ops, scenario).total_variation > 1e-12:
                return True
    return False


_TOYS = [
    Toy("rejection", seed=1),
    Toy("block", num_drafts=3, scale=1.0, seed=3),
    Toy("coupled", settings={"temperature": 0.8, "top_k": 4}, seed=2),
]


def sampling() -> bool:
    ops, noise = _kernels()
    return any(
        chi_square.p_value(sample(ops, noise, toy, TOY_ROWS, seed=21), toy.joint_law()) < chi_square.LEVEL
        for toy in _TOYS
    )


def window() -> bool:
    ops, noise = _kernels()
    toy = Toy("coupled", settings={"repetition_penalty": 1.4}, length=5, seed=7)
    rows = [sample(ops, noise, toy, 300, seed=22, num_drafts=count) for count in (0, 3)]
    return not np.array_equal(*rows)


def greedy() -> bool:
    """Argmax paths of both prompts, which stand in one ragged batch."""
    found = []
    for ids in ((0, 1, 2, 3, 4), (0, 1, 2, 4, 5)):
        case = LoopCase("rejection", 3, ids=ids, correlation=0.6, alpha=0.5)
        found.append(loop_law.greedy_tokens(_model_class(), case, 12) == loop_law.greedy_path(case, 12))
    return not all(found)


def loop_window() -> bool:
    settings = {"temperature": 1.2, "top_p": 0.95}
    rows = [
        loop_law.sample(_model_class(), LoopCase("coupled", count, settings, correlation=0.5, length=8), 60, seed=23)
        for count in (0, 3)
    ]
    return not np.array_equal(np.stack(rows[0]), np.stack(rows[1]))


_LOOP_CASES = [
    LoopCase("rejection", 2, ids=(0, 1, 2, 4, 5), correlation=0.3, extra=1),
    LoopCase("block", 3, ids=(0, 1, 2), correlation=-1.0, length=4),
]


def loop_sampling() -> bool:
    return any(
        loop_law.smallest_p_value(_model_class(), case, LOOP_ROWS, seed=24) < chi_square.LEVEL for case in _LOOP_CASES
    )


KERNEL_DETECTORS: dict[str, Callable[[], bool]] = {
    "zero coin": zero_coin,
    "enumeration": enumeration,
    "sampling": sampling,
    "window": window,
}
LOOP_DETECTORS: dict[str, Callable[[], bool]] = {
    "greedy": greedy,
    "loop window": loop_window,
    "loop law": loop_sampling,
}


def verdicts(mutant: Mutant | None, detectors: dict[str, Callable[[], bool]]) -> dict[str, bool]:
    """Which detectors see the fault. A crash counts as nothing: a mutant must run to be worth catching."""
    with mutated(mutant):
        return {name: detect() for name, detect in detectors.items()}


def show(matrix: dict[str, dict[str, bool]], capsys: pytest.CaptureFixture[str]) -> None:
    columns = list(next(iter(matrix.values())))
    width = max(map(len, matrix))
    with capsys.disabled():
        print(f"\n\n{'kill matrix':{width}}  " + "  ".join(columns))
        for name, row in matrix.items():
            print(f"{name:{width}}  " + "  ".join(f"{'caught' if row[c] else '-':^{len(c)}}" for c in columns))


@pytest.mark.parametrize(
    ("mutants", "detectors"),
    [(KERNEL_MUTANTS, KERNEL_DETECTORS), (LOOP_MUTANTS, LOOP_DETECTORS)],
    ids=["kernels", "loop"],
)
def test_kill_matrix(
    mutants: list[Mutant], detectors: dict[str, Callable[[], bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = {"(unmutated)": verdicts(None, detectors)}
    matrix |= {mutant.name: verdicts(mutant, detectors) for mutant in mutants}
    show(matrix, capsys)
    assert not any(matrix.pop("(unmutated)").values())
    survivors = [name for name, row in matrix.items() if not any(row.values())]
    assert not survivors
    idle = [detector for detector in detectors if not any(row[detector] for row in matrix.values())]
    assert not idle, "a detector that catches nothing proves nothing"


def test_a_mutant_must_match_its_source() -> None:
    with (
        pytest.raises(AssertionError, match="occurs 0 times"),
        mutated(Mutant("gone", NOISE, "no such text", "")),
    ):
        importlib.import_module(NOISE)


def test_modules_are_put_back() -> None:
    before = {name: importlib.import_module(name) for name in (NOISE, REFERENCE, "specproxy.model")}
    with mutated(KERNEL_MUTANTS[0]):
        assert importlib.import_module(NOISE).PURPOSE_RESIDUAL == 0
        assert importlib.import_module("specproxy.model") is not before["specproxy.model"]
    assert {name: importlib.import_module(name) for name in before} == before
    assert before[NOISE].PURPOSE_RESIDUAL == 2
