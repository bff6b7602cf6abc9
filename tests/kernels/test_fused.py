"""The sampling kernels, interpreted on the CPU: long rows, kept sets, noise, bad tensors, and planted faults.

The pairwise cover of their settings is in `test_fused_cases`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import quick_interpreter
from mutation import Mutant, mutated

from benchmarks.kernel_cases import Case, build, compare, run_cycle
from specproxy_kernels import DraftLaw, LogitPair, NoiseStream, WarpParameters, gumbel_noise, reference, row_keys
from specproxy_kernels.noise import PURPOSE_RESIDUAL, PURPOSE_TOKEN

triton = pytest.importorskip("triton", reason="Triton is published for Linux on x86-64 and ARM alone")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is there: its own suite runs these"),
    # The interpreter computes inf - inf where a compiled kernel does; numpy warns of it.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with quick_interpreter():
        yield


def fused_operations() -> Any:
    """The kernels' entry points, imported afresh where a fault is planted."""
    draft = importlib.import_module("specproxy_kernels.fused.draft")
    verify = importlib.import_module("specproxy_kernels.fused.verify")
    return SimpleNamespace(sample_drafts=draft.sample_drafts, verify_window=verify.verify_window)


def faults(ops: Any, case: Case) -> list[str]:
    problem = build(case)
    expected = run_cycle(reference, problem)
    return compare(problem, expected, run_cycle(ops, problem, expected.tokens)).faults


# Shapes beyond the cover: rows of many splits, large batches, long windows.
LONG = [
    Case(filters="top_k", vocab_size=9001, batch=1, window=2),
    Case(rule="coupled", rows="mixed", filters="top_p", vocab_size=5000, batch=2, window=2, dtype="bfloat16"),
    Case(rule="block", filters="min_p", vocab_size=4097, batch=1, window=3),
    Case(vocab_size=50_257, batch=1, window=2, dtype="bfloat16"),
    Case(rule="coupled", vocab_size=151_936, batch=1, window=1, dtype="float16"),
    Case(rows="greedy", vocab_size=32_000, batch=3, window=2, dtype="bfloat16"),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for rule in reference.RULES
        for case in (
            Case(rule=rule, vocab_size=5, batch=64, window=9),
            Case(rule=rule, vocab_size=1000, batch=8, window=6, filters="top_k_top_p", drafts="ragged"),
            Case(rule=rule, vocab_size=151_936, batch=1, window=4, dtype="bfloat16"),
        )
    ),
]


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_rows(case: Case) -> None:
    assert faults(fused_operations(), case) == []


@pytest.mark.parametrize("filtered", ["top_k", "top_p", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kept_sets_longer_than_the_list(filtered: str, dtype: torch.dtype) -> None:
    """A flat law, so that hundreds of ids are kept: settled by passes over the row, with ties at the threshold."""
    vocab, batch = 1500, 2
    logits = (torch.randn(batch, 1, vocab, generator=torch.Generator().manual_seed(3)) * 0.3).to(dtype)
    logits[1] = (logits[1] * 4).round() / 4
    top_k, top_p = torch.tensor([900, 700]), torch.tensor([0.93, 0.8])
    parameters = WarpParameters(
        torch.tensor([1.0, 0.7]),
        top_k=None if filtered == "top_p" else top_k,
        top_p=None if filtered == "top_k" else top_p,
        any_greedy=False,
        max_top_k=0 if filtered == "top_p" else 900,
    )
    noise = NoiseStream(row_keys([5], [0]).repeat(batch), torch.arange(batch))
    nothing = torch.empty(batch, 0, dtype=torch.long)
    expected, law = reference.sample_drafts(logits, parameters, nothing, noise, vocab)
    got, got_law = fused_operations().sample_drafts(logits, parameters, nothing, noise, vocab)
    assert torch.equal(got, expected)
    assert got_law.tau is not None and law.tau is not None
    z = logits[:, 0].to(dtype) / parameters.temperature[:, None].to(dtype)
    kept = z >= law.tau
    assert bool((kept.sum(-1) > 512).all())
    assert torch.equal(z >= got_law.tau, kept)
    torch.testing.assert_close(got_law.lse, law.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", reference.RULES)
def test_lone_experts_of_either_sign(rule: str) -> None:
    """The first pair too may lack its anti-expert; strengths are strided and differ by position; masks hold at any."""
    vocab, batch, window = 70, 4, 3
    generator = torch.Generator().manual_seed(9)
    base, amateur, other, anti_expert = torch.randn(4, batch, window, vocab, generator=generator).unbind(0)
    base[..., 3] = amateur[..., 5] = other[..., 8] = anti_expert[..., 8] = -torch.inf
    strengths = torch.tensor([[-0.5, 0.7], [0.0, 0.0], [1.5, -1.0]]).double()[None].expand(batch, -1, -1)
    pairs = [LogitPair(amateur, None, strengths[..., 0]), LogitPair(other, anti_expert, strengths[..., 1])]
    parameters = WarpParameters(torch.tensor([0.0, 1.0, 0.7, 1.3]))
    drafts = torch.randint(9, vocab, (batch, window - 1), generator=generator)
    noise = [NoiseStream(row_keys([5], [0]).repeat(batch), torch.arange(batch)) for _ in range(2)]
    count = torch.full((batch,), window - 1)
    arguments = (rule, base, pairs, drafts, count, None, parameters)
    expected = reference.verify_window(*arguments, noise[0], vocab)
    found = fused_operations().verify_window(*arguments, noise[1], vocab)
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    assert not set(expected[1].tolist()) & {3, 5, 8} and not expected[2].any()


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 1024, 3000])
@pytest.mark.parametrize("block_start", [None, 41])
def test_noise_is_the_reference_s(vocab_size: int, block_start: int | None) -> None:
    """Drawn from a flat law, a token is the argmax of the noise alone: every id's noise is seen to be its own."""
    batch = 6
    key, start = row_keys(range(batch), [0] * batch), torch.arange(40, 40 + batch)
    block = None if block_start is None else torch.full((batch,), block_start)
    logits, parameters = torch.zeros(batch, 1, vocab_size), WarpParameters(torch.ones(batch), any_greedy=False)
    nothing = torch.empty(batch, 0, dtype=torch.long)
    noise = NoiseStream(key, start, block)
    token, _ = fused_operations().sample_drafts(logits, parameters, nothing, noise, vocab_size)
    gumbel = gumbel_noise(key, start[:, None], PURPOSE_TOKEN, vocab_size, block)
    assert torch.equal(token, gumbel.argmax(-1))
    # The bonus token of an empty window takes the residual purpose.
    drawn = fused_operations().verify_window(
        "rejection", logits, [], nothing, torch.zeros(batch, dtype=torch.long), None, parameters, noise, vocab_size
    )
    gumbel = gumbel_noise(key, start[:, None], PURPOSE_RESIDUAL, vocab_size, block)
    assert torch.equal(drawn[1], gumbel[:, 0].argmax(-1))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("strided", r"base has stride 2 along the vocabulary.*\.contiguous\(\)"),
        ("narrow", r"base must be a floating tensor \[B, W, >= 8\]"),
        ("integer", r"pairs\[0\]\.expert must be a floating tensor"),
        ("seen", r"seen must be torch\.bool"),
    ],
)
def test_tensors_that_the_kernels_cannot_read(argument: str, message: str) -> None:
    logits = torch.zeros(1, 1, 8)
    base = {"strided": torch.zeros(1, 1, 16)[..., ::2], "narrow": torch.zeros(1, 1, 7)}.get(argument, logits)
    expert = logits.long() if argument == "integer" else logits
    parameters = WarpParameters(torch.ones(1))
    if argument == "seen":
        parameters = replace(parameters, repetition_penalty=torch.ones(1), seen=torch.zeros(1, 8))
    noise = NoiseStream(row_keys([1], [0]), torch.zeros(1, dtype=torch.long))
    nothing = torch.empty(1, 0, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        fused_operations().verify_window(
            "rejection",
            base,
            [LogitPair(expert, logits, torch.ones(1, 1))],
            nothing,
            torch.zeros(1, dtype=torch.long),
            None,
            parameters,
            noise,
            8,
        )


# Faults planted in the kernels, each with a case that must notice it.
# Few ids, so that drafts are often accepted and every position decides something.
PLAIN = Case(vocab_size=5, batch=20, window=4)
BLOCKS = replace(PLAIN, rule="block", batch=60)
PENALISED = replace(PLAIN, penalty="both")


def fault(name: str, module: str, old: str, new: str) -> Mutant:
    return Mutant(name, f"specproxy_kernels.fused.{module}", old, new)


INDEX = "index = (tl.load(keys.start + row) + offset).to(tl.uint32)\n    nonce = zero\n"
NONCE = "nonce = zero + (tl.load(keys.block_start + row) + 1).to(tl.uint32)\n"
AT_ACCEPTED = "position = tl.load(outcome.num_accepted + row).to(tl.int32)"
MUTANTS = [
    (fault("residual shares the drafts' noise", "verify", "_RESIDUAL, first", "_TOKEN, first"), PLAIN),
    (fault("coin shares the drafts' noise", "verify", "tl.constexpr(PURPOSE_COIN)", "_TOKEN"), PLAIN),
    (
        fault("position-only nonce under block", "noise", NONCE, NONCE.replace("row) + 1)", "row) * 0)")),
        BLOCKS,
    ),
    (
        fault(
            "q without penalties",
            "verify",
            "scaled_logits(drafted.law, row, position, ids, inside, 0, FEATURES,",
            "scaled_logits(drafted.law, row, position, ids, inside, 0, SAMPLING,",
        ),
        PENALISED,
    ),
    (
        fault(
            "early stop in block",
            "verify",
            "tl.max(tl.where(kept, i + 1, 0), 0)",
            "tl.min(tl.where(kept, usable, i), 0)",
        ),
        BLOCKS,
    ),
    (
        fault(
            "noise reused past the budget",
            "noise",
            INDEX,
            INDEX.replace("(tl.load(keys.start + row) + offset)", "tl.minimum(tl.load(keys.start + row) + offset, 2)"),
        ),
        PLAIN,
    ),
    (
        fault(
            "next token from the row before",
            "verify",
            AT_ACCEPTED,
            f"{AT_ACCEPTED}\n        position = tl.maximum(position - 1, 0)",
        ),
        PLAIN,
    ),
    (
        fault(
            "anti-expert one position late",
            "laws",
            "_load(pair.anti_expert, row, position,",
            "_load(pair.anti_expert, row, tl.maximum(position - 1, 0),",
        ),
        PLAIN,
    ),
    (
        fault(
            "bonus drawn from the residual",
            "verify",
            "tl.where(refused & has_residual, residual_token, token)",
            "residual_token",
        ),
        PLAIN,
    ),
    (
        fault(
            "ids past the vocabulary left open",
            "laws",
            "mask=inside, other=-INFINITY).to(COMPUTE)",
            "mask=ids < 12, other=-INFINITY).to(COMPUTE)",
        ),
        replace(PLAIN, layout="wider"),
    ),
    (fault("temperature forgotten", "laws", "if SAMPLING & FEATURES:", "if SAMPLING & FEATURES & 1:"), PLAIN),
    (fault("prefix one draft too long", "laws", "(position > j)", "(position >= j)"), PENALISED),
    (
        fault("k-th logit left out", "filters", "counts >= least_count", "counts > least_count"),
        replace(PLAIN, filters="top_k", vocab_size=100, batch=10),
    ),
    (
        fault(
            "a split left out",
            "rows",
            "inside = split < splits\n    at = line * splits + split\n    largest",
            "inside = split < 1\n    at = line * splits + split\n    largest",
        ),
        replace(PLAIN, vocab_size=4400, batch=2),
    ),
]


@pytest.mark.parametrize(("mutant", "case"), MUTANTS, ids=[mutant.name for mutant, _ in MUTANTS])
def test_planted_faults_are_noticed(mutant: Mutant, case: Case) -> None:
    with mutated(mutant):
        ops = fused_operations()
        found = faults(ops, case)
    assert found, f"{mutant} went unnoticed"


# Faults that random laws seldom show, with laws made for them: rule, warp, target and draft laws by position, drafts.
RARE = [
    (
        # min-p keeps one id of q and all of p: the residual must not miss what q never proposes.
        fault("q from unfiltered logits", "verify", "_log_prob(z, tau, lse, FILTERS).to(COMPUTE)", "(z - lse)"),
        ("rejection", {"min_p": 0.5}, [[0.3, 0.25, 0.45]] * 2, [[0.6, 0.2, 0.2]], [0]),
    ),
    (
        # A block is cut after its first draft with P_1 = 0.7, which leaves the residual one id.
        fault("residual without its weight", "verify", "kept - lse + log_weight", "kept - lse"),
        (
            "block",
            {},
            [[0.35, 0.4, 0.25], [0.1, 0.5, 0.4], [0.3, 0.3, 0.4]],
            [[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]],
            [0, 0],
        ),
    ),
]


@pytest.mark.parametrize(("mutant", "law"), RARE, ids=[mutant.name for mutant, _ in RARE])
def test_rare_faults_are_noticed(mutant: Mutant, law: Any) -> None:
    rule, warp, target, drafted, tokens = law
    batch = 60
    base = torch.tensor([target]).log().repeat(batch, 1, 1)
    draft_logits = torch.tensor([drafted]).log().repeat(batch, 1, 1)
    drafts = torch.tensor([tokens]).repeat(batch, 1)
    parameters = WarpParameters(
        torch.ones(batch), any_greedy=False, **{name: torch.full((batch,), value) for name, value in warp.items()}
    )
    start = torch.zeros(batch, dtype=torch.long)
    noise = NoiseStream(row_keys(range(batch), [0] * batch), start, start if rule == "block" else None)
    laws = []
    for i in range(len(tokens)):
        logits = draft_logits[:, i : i + 1]
        laws.append(reference.sample_drafts(logits, parameters, drafts[:, :i], noise, 3)[1])
    tau = None if laws[0].tau is None else torch.cat([law.tau for law in laws], 1)
    draft_law = DraftLaw(draft_logits, tau, torch.cat([law.lse for law in laws], 1))
    count = torch.full((batch,), len(tokens))

    def verdict(ops: Any) -> list[list[int]]:
        outcome = ops.verify_window(rule, base, [], drafts, count, draft_law, parameters, noise, 3)
        return [part.tolist() for part in outcome]

    expected = verdict(reference)
    assert verdict(fused_operations()) == expected
    with mutated(mutant):
        assert verdict(fused_operations()) != expected, f"{mutant} went unnoticed"


# Keys whose first coin is 0, at index 0 and without or with a block's nonce: one in 2^31.
ZERO_COIN = {"rejection": 5679500483, "block": 1546881296}


@pytest.mark.parametrize("rule", ZERO_COIN)
@pytest.mark.parametrize("strict", [True, False])
def test_a_coin_of_zero_accepts_nothing_impossible(rule: str, strict: bool) -> None:
    """A draft that the target forbids is refused even by the coin 0; `<=` for `<` would let it through."""
    base = torch.tensor([[[-torch.inf, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    law = DraftLaw(torch.zeros(1, 1, 3), None, torch.full((1, 1), 3.0).log())
    parameters = WarpParameters(torch.ones(1), any_greedy=False)
    start = torch.zeros(1, dtype=torch.long)
    noise = NoiseStream(torch.tensor([ZERO_COIN[rule]]), start, start if rule == "block" else None)
    assert float(noise.coins(1)) == 0
    old, new = ("coin < tl.exp", "coin <= tl.exp") if rule == "rejection" else ("BLOCKS) < keep", "BLOCKS) <= keep")
    with mutated(None if strict else fault("<= for <", "verify", old, new)):
        kept, _, _ = fused_operations().verify_window(
            rule, base, [], torch.tensor([[0]]), torch.tensor([1]), law, parameters, noise, 3
        )
    assert kept.tolist() == [0 if strict else 1]
