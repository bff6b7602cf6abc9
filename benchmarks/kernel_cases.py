"""Problems for the fused operations, and what counts as the same answer: one list for tests, compilation and the GPU.

A case names a setting; `build` makes its tensors on any device, `run_cycle` takes one decode cycle through the
operations of a module, `compare` holds two outcomes against each other. A cycle is `sample_drafts` at every drafted
position and `verify_window`; both sides are given the reference's drafts, so that one deviation is not counted twice.

Cases are chosen pairwise: every two settings of two factors occur together in at least one case. This module knows
the public operations, not how they are computed.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specproxy_kernels import (
    RULES,
    DraftLaw,
    LogitPair,
    NoiseStream,
    WarpParameters,
    pack_allowed_tokens,
    row_keys,
)
from specproxy_kernels import reference as torch_reference
from specproxy_kernels.laws import penalised

__all__ = [
    "ATTENTION_FACTORS",
    "QUICK",
    "QUICK_ATTENTION",
    "SAMPLING_FACTORS",
    "AttentionCase",
    "AttentionProblem",
    "Case",
    "Comparison",
    "Outcome",
    "Problem",
    "attention_cases",
    "build",
    "build_attention",
    "compare",
    "draw",
    "draw_all",
    "pairwise",
    "run_attention",
    "run_candidates",
    "run_compact",
    "run_cycle",
    "run_write",
    "sampling_cases",
    "verify",
]

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


# Which cases.


@dataclass(frozen=True)
class Case:
    """A setting of one decode cycle.

    Args:
        rule: one of `RULES`.
        rows: `sampling`, `greedy`, or `mixed`: every third row is greedy.
        filters: `none`, `top_k` (every row at most 50), `top_k_some` (some row keeps all), `top_p`, `min_p`, or
            `top_k_top_p`, or `all`.
        penalty: `none`, `repetition` (with the tokens seen so far), `counts` (frequency and presence), or `both`.
        bias: on the combined logits: `none`, `shared` or `own` (one per row).
        mask: allowed tokens: `none`, `shared` (one mask for all) or `own` (one per row and position).
        pairs: `one`, `two`, `lone` (the second without an anti-expert), or `dense` (rows already processed).
        dtype: of all logits; `mixed` is a float32 base over a bfloat16 pair.
        vocab_size, batch, window: V, B, W.
        drafts: `drawn` from the expert, `certain` (one-hot), or `ragged`: drawn, rows with fewer than W - 1.
        content: `plain`; `ties`: logits are integers; `masked`: some ids are -inf; `broken`: every second row holds
            a NaN, an infinity or the anti-expert's -inf alone, the last row among them.
        layout: `plain`; `wider`: views of wider buffers with other strides and ids past the shared ones.
    """

    rule: str = "rejection"
    rows: str = "sampling"
    filters: str = "none"
    penalty: str = "none"
    bias: str = "none"
    mask: str = "none"
    pairs: str = "one"
    dtype: str = "float32"
    vocab_size: int = 257
    batch: int = 2
    window: int = 5
    drafts: str = "drawn"
    content: str = "plain"
    layout: str = "plain"

    def __str__(self) -> str:
        default = Case()
        named = [f"{self.rule}-B{self.batch}-W{self.window}-V{self.vocab_size}-{self.dtype}"]
        for field in fields(self):
            value, named_above = getattr(self, field.name), ("rule", "batch", "window", "vocab_size", "dtype")
            if field.name not in named_above and value != getattr(default, field.name):
                named.append(f"{field.name}={value}")
        return "-".join(named)


@dataclass(frozen=True)
class AttentionCase:
    """A setting of window attention.

    Args:
        heads, kv_heads, head_size: H, H_kv, D.
        batch, window: B, T.
        longest: keys before the window of the longest row; the others are spread below it, the first has none.
        buffer: `tight` (S = longest + T), or `roomy`: longer. What lies behind a row's window is NaN.
        sliding_window: keys a query sees, or 0 for all.
        softcap: c of c * tanh(x / c), or 0 for none.
        dtype: of query, keys and values.
        layout: `plain`; `transposed`: queries as they leave a projection, [B, T, H, D] transposed.
        tree: the window is a random token tree, T at most 64.
    """

    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    batch: int = 2
    window: int = 5
    longest: int = 100
    buffer: str = "roomy"
    sliding_window: int = 0
    softcap: float = 0.0
    dtype: str = "float32"
    layout: str = "plain"
    tree: bool = False

    def __str__(self) -> str:
        shape = f"H{self.heads}of{self.kv_heads}-D{self.head_size}-B{self.batch}-T{self.window}-L{self.longest}"
        named = [shape, self.dtype, self.buffer, self.layout]
        if self.sliding_window:
            named.append(f"sliding={self.sliding_window}")
        if self.softcap:
            named.append(f"softcap={self.softcap:g}")
        if self.tree:
            named.append("tree")
        return "-".join(named)


_SETTINGS: dict[str, tuple[Any, ...]] = {
    # In one factor, so that every rule meets every filter with rows that sample.
    "law": (
        *((rule, "sampling") for rule in RULES),
        *((rule, "mixed") for rule in RULES),
        ("rejection", "greedy"),
    ),
    "filters": ("none", "top_k", "top_k_some", "top_p", "min_p", "top_k_top_p", "all"),
    "penalty": ("none", "repetition", "counts", "both"),
    "bias": ("none", "shared", "own"),
    "mask": ("none", "shared", "own"),
    "pairs": ("one", "two", "lone", "dense"),
    "dtype": ("bfloat16", "float32", "float16", "mixed", "float64"),
    "drafts": ("drawn", "ragged", "certain"),
    "content": ("plain", "ties", "masked", "broken"),
    "layout": ("plain", "wider"),
}
# By scale. `interpreted`: a program of Triton's interpreter takes milliseconds. `compiled`: nothing runs, sizes only
# choose a specialisation (divisible by 16, equal to 1). `device`: a GPU runs them.
SAMPLING_FACTORS: dict[str, dict[str, tuple[Any, ...]]] = {
    "interpreted": _SETTINGS | {"vocab_size": (257, 33, 1000, 2051), "batch": (2, 1, 3), "window": (3, 1, 2)},
    # Few levels, since machine code for one kernel takes seconds: those that change the code most.
    "compiled": {
        "law": tuple((rule, "mixed") for rule in RULES),
        "filters": ("none", "all", "top_p"),
        "penalty": ("none", "both"),
        "bias": ("none", "own"),
        "mask": ("none", "own"),
        "pairs": ("one", "two", "dense"),
        "dtype": ("bfloat16", "float32", "float64"),
        "vocab_size": (151_936, 32_000),
        "batch": (2, 1),
        "window": (5, 9),
        "drafts": ("drawn", "certain"),
        "layout": ("plain", "wider"),
    },
    "device": _SETTINGS
    | {"vocab_size": (32_000, 33, 2051, 50_257, 151_936, 262_144), "batch": (3, 1, 8), "window": (5, 1, 2, 9)},
}
# What every run of the tests compiles: each kernel plain, as most calls have it, and with everything at once.
QUICK = (
    Case(rule="rejection", dtype="bfloat16", vocab_size=151_936),
    Case(rule="rejection", rows="greedy", dtype="bfloat16", vocab_size=32_000),
    Case(rule="block", rows="mixed", filters="all", penalty="both", bias="own", mask="own", pairs="two",
         dtype="bfloat16", vocab_size=32_000),
    Case(rule="coupled", filters="top_p", dtype="bfloat16", vocab_size=151_936),
)  # fmt: skip
QUICK_ATTENTION = (
    AttentionCase(28, 4, 128, batch=8, longest=4096, dtype="bfloat16", layout="transposed"),
    AttentionCase(8, 4, 256, window=9, longest=300, dtype="float32", sliding_window=100, softcap=2.5),
)
PREFILL = (  # windows whose parallelism lies in their queries
    AttentionCase(28, 4, 128, batch=2, window=200, longest=0, dtype="bfloat16", layout="transposed"),
    AttentionCase(8, 4, 64, batch=3, window=100, longest=500, dtype="float32", sliding_window=150, softcap=2.5),
)
_ATTENTION: dict[str, tuple[Any, ...]] = {
    "buffer": ("roomy", "tight"),
    "softcap": (0.0, 2.5),
    "dtype": ("bfloat16", "float16", "float32"),
    "layout": ("transposed", "plain"),
    "tree": (False, True),
}
ATTENTION_FACTORS: dict[str, dict[str, tuple[Any, ...]]] = {
    "interpreted": _ATTENTION
    | {
        "shape": ((4, 2, 16), (2, 2, 32), (6, 1, 64)),
        "batch": (2, 1, 3),
        "window": (3, 1, 5),
        "longest": (40, 0, 130, 300),
        "sliding_window": (0, 20, 1),
    },
    "compiled": _ATTENTION
    | {
        "shape": ((28, 4, 128), (32, 8, 128), (8, 8, 64), (8, 4, 256), (6, 2, 80)),
        "batch": (8, 1),
        "window": (5, 1, 9),
        "longest": (4096, 300),
        "sliding_window": (0, 1024),
    },
    "device": _ATTENTION
    | {
        "shape": ((28, 4, 128), (32, 8, 128), (8, 8, 64), (8, 4, 256), (6, 2, 80)),
        "batch": (3, 1, 8),
        "window": (5, 1, 2, 9, 33),
        "longest": (700, 0, 33, 4096),
        "sliding_window": (0, 100, 1),
    },
}


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Settings in which every two levels of two factors occur together, few of them, the same on every call.

    Args:
        factors: levels by name, at least two factors.
        seed: of the search.

    Returns:
        One mapping per setting, every factor in each. The first holds every factor's first level.
    """
    names = list(factors)
    rng = random.Random(seed)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}

    def covers(setting: Mapping[str, Any]) -> set[Any]:
        return set(itertools.combinations([(name, setting[name]) for name in names], 2)) & missing

    def completed(setting: dict[str, Any]) -> dict[str, Any]:
        """Further factors in random order, each at the level that covers most with those chosen so far."""
        order = [name for name in names if name not in setting]
        rng.shuffle(order)
        for name in order:
            gains = [
                (sum((old, (name, level)) in missing or ((name, level), old) in missing for old in setting.items()), i)
                for i, level in enumerate(factors[name])
            ]
            most = max(gain for gain, _ in gains)
            setting[name] = factors[name][rng.choice([i for gain, i in gains if gain == most])]
        return {name: setting[name] for name in names}

    settings = [{name: levels[0] for name, levels in factors.items()}]
    missing -= covers(settings[0])
    while missing:
        ordered = sorted(missing, key=repr)
        candidates = [completed(dict(rng.choice(ordered))) for _ in range(25)]
        settings.append(max(candidates, key=lambda setting: len(covers(setting))))
        missing -= covers(settings[-1])
    return settings


@cache
def sampling_cases(scale: str) -> tuple[Case, ...]:
    """The cover of the sampling operations at a scale of `SAMPLING_FACTORS`."""
    cases = []
    for setting in pairwise(SAMPLING_FACTORS[scale]):
        rule, rows = setting.pop("law")
        cases.append(Case(rule=rule, rows=rows, **setting))
    return tuple(cases)


@cache
def attention_cases(scale: str) -> tuple[AttentionCase, ...]:
    """The cover of window attention at a scale of `ATTENTION_FACTORS`."""
    cases = []
    for setting in pairwise(ATTENTION_FACTORS[scale]):
        heads, kv_heads, head_size = setting.pop("shape")
        cases.append(AttentionCase(heads=heads, kv_heads=kv_heads, head_size=head_size, **setting))
    return tuple(cases) + (() if scale == "interpreted" else PREFILL)


# A decode cycle.


@dataclass
class Problem:
    """What a cycle reads. Tensors as `verify_window` takes them; the drafter's logits are the first pair's expert's.

    Args:
        draft_logits: [B, W, V_draft].
        num_drafts: int64 [B].
        certain: the drafts are one-hot: there is no draft law.
        key, start: int64 [B], of the noise.
    """

    case: Case
    base: Tensor
    pairs: list[LogitPair]
    draft_logits: Tensor
    parameters: WarpParameters
    num_drafts: Tensor
    certain: bool
    key: Tensor
    start: Tensor

    def noise(self) -> NoiseStream:
        """A fresh stream of the cycle's noise."""
        return NoiseStream(self.key, self.start, self.start if self.case.rule == "block" else None)

    def take(self, rows: Tensor) -> Problem:
        """Some rows in some order, int64 [N]. Flags and bounds stay as the host computed them for the whole batch."""
        batch = self.case.batch

        def pick(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] != batch else tensor[rows]

        own = {field.name: getattr(self.parameters, field.name) for field in fields(self.parameters)}
        return Problem(
            self.case,
            self.base[rows],
            [LogitPair(*(pick(tensor) for tensor in pair)) for pair in self.pairs],  # type: ignore[arg-type]
            self.draft_logits[rows],
            WarpParameters(**{name: pick(v) if isinstance(v, Tensor) else v for name, v in own.items()}),
            self.num_drafts[rows],
            self.certain,
            self.key[rows],
            self.start[rows],
        )

    def logit_bytes(self) -> int:
        """Bytes of all logits of the window."""
        tensors = [self.base, *(t for pair in self.pairs for t in (pair.expert, pair.anti_expert) if t is not None)]
        return sum(t.numel() * t.element_size() for t in tensors)


def _seed(case: Any, salt: int) -> int:
    return zlib.crc32(repr((*astuple(case), salt)).encode())


def build(case: Case, device: torch.device | str = "cpu", salt: int = 0) -> Problem:
    """The tensors of a case, drawn on the device.

    Args:
        salt: another draw of the same case.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(_seed(case, salt))
    batch, window, vocab = case.batch, case.window, case.vocab_size
    base_dtype = DTYPES["float32" if case.dtype == "mixed" else case.dtype]
    dtype = DTYPES["bfloat16" if case.dtype == "mixed" else case.dtype]

    def logits(dtype: torch.dtype, extra: int) -> Tensor:
        values = torch.randn(batch, window, vocab, generator=generator, device=device).mul_(2)
        if case.content == "ties":
            values.round_()
        if case.layout == "plain":
            return values.to(dtype)
        # Ids past the shared ones hold values that would win every draw; rows and positions change places in memory.
        wide = torch.full((window, batch, vocab + extra + 3), 1e4, dtype=dtype, device=device)
        wide[..., :vocab] = values.transpose(0, 1)
        return wide.transpose(0, 1)[..., : vocab + extra]

    def chance(*shape: int, p: float) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) < p

    def per_row(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([values[row % len(values)] for row in range(batch)], dtype=dtype, device=device)

    base = logits(base_dtype, extra=2)
    pairs = []
    for i in range({"one": 1, "two": 2, "lone": 2, "dense": 0}[case.pairs]):
        expert = logits(dtype, extra=0)
        anti_expert = None if i == 1 and case.pairs == "lone" else logits(dtype, extra=1)
        if i == 0:  # one strength for all positions, as the runtime hands it over: a view of stride 0
            alpha = per_row(1.0, 0.5, 1.5)[:, None].expand(-1, window)
        else:
            alpha = torch.rand(batch, window, generator=generator, device=device) - 0.5
        pairs.append(LogitPair(expert, anti_expert, alpha))
    draft_logits = pairs[0].expert if pairs else logits(dtype, extra=0)
    if case.content == "masked":
        hidden = chance(batch, window, vocab, p=0.3)
        hidden[..., vocab // 2] = False
        base[..., :vocab].masked_fill_(hidden, -torch.inf)
        for pair in pairs[:1]:  # the expert masks more, and its anti-expert only what the expert masks as well
            more = chance(batch, window, vocab, p=0.1)
            more[..., vocab // 2] = False
            pair.expert[..., :vocab].masked_fill_(more, -torch.inf)
            if pair.anti_expert is not None:
                pair.anti_expert[..., :vocab].masked_fill_(more & chance(vocab, p=0.5), -torch.inf)
    if case.content == "broken":
        culprit = pairs[0].anti_expert if pairs else None
        for number, row in enumerate(range(batch - 1, -1, -2)):
            position = number % window
            if number % 3 == 2 and culprit is not None:
                culprit[row, position, vocab // 3] = -torch.inf
            else:
                base[row, position, vocab // 3] = torch.inf if number % 3 else torch.nan

    filters = case.filters
    bounded = filters in ("top_k", "top_k_top_p", "all")
    temperature = per_row(0.7, 1.0, 1.3)
    if case.rows == "mixed":
        temperature[::3] = 0
    elif case.rows == "greedy":
        temperature.zero_()
    allowed = None
    if case.mask != "none":
        shape = (1, 1, vocab) if case.mask == "shared" else (batch, window, vocab)
        free = chance(*shape, p=0.6)
        free[..., vocab // 2] = True
        allowed = pack_allowed_tokens(free)
    top_k = None
    if bounded:
        top_k = per_row(5, 50, 1, 20, dtype=torch.long)
    elif filters == "top_k_some":
        top_k = per_row(0, 7, 200, dtype=torch.long)
    repeats = case.penalty in ("repetition", "both")
    counts = bias = None
    if case.penalty in ("counts", "both"):
        counts = (torch.rand(batch, vocab, generator=generator, device=device) * 5 - 3).clamp_(min=0).to(torch.int32)
    if case.bias != "none":
        shape = (1 if case.bias == "shared" else batch, vocab)
        bias = torch.randn(shape, generator=generator, device=device).masked_fill_(chance(*shape, p=0.9), 0)
    parameters = WarpParameters(
        temperature,
        top_k=top_k,
        top_p=per_row(0.9, 0.5, 1.0) if filters in ("top_p", "top_k_top_p", "all") else None,
        min_p=per_row(0.05, 0.0, 0.3) if filters in ("min_p", "all") else None,
        repetition_penalty=per_row(1.3, 1.0, 0.8) if repeats else None,
        seen=chance(batch, vocab, p=0.2) if repeats else None,
        frequency_penalty=per_row(0.4, 0.0, -0.2) if counts is not None else None,
        presence_penalty=per_row(0.3, 0.5, 0.0) if counts is not None else None,
        counts=counts,
        logit_bias=bias,
        allowed=allowed,
        max_top_k=int(max((5, 50, 1, 20)[: min(batch, 4)])) if bounded else 0,
        any_greedy=case.rows == "greedy" or case.rows == "mixed",
        any_sampling=case.rows == "sampling" or (case.rows == "mixed" and batch > 1),
    )
    num_drafts = torch.full((batch,), window - 1, device=device)
    if case.drafts == "ragged":
        num_drafts = num_drafts - torch.arange(batch, device=device) % window
    seeds = [_seed(case, salt) + row for row in range(batch)]
    return Problem(
        case,
        base,
        pairs,
        draft_logits,
        parameters,
        num_drafts,
        case.drafts == "certain",
        row_keys(seeds, [0] * batch).to(device),
        torch.tensor([(7 * row) % 100 for row in range(batch)], device=device),
    )


class Outcome(NamedTuple):
    """What a cycle gave: drafts drawn at each position [B, G] with their law, and the answer of `verify_window`."""

    tokens: Tensor
    law: DraftLaw | None
    num_accepted: Tensor
    next_token: Tensor
    status: Tensor


def draw(ops: Any, problem: Problem, drafts: Tensor, noise: NoiseStream) -> tuple[Tensor, DraftLaw]:
    """`sample_drafts` of a module at the window position after the drafts [B, i]."""
    position = drafts.shape[1]
    logits = problem.draft_logits[:, position : position + 1]
    return ops.sample_drafts(logits, problem.parameters, drafts, noise, problem.case.vocab_size)


def draw_all(ops: Any, problem: Problem, drafts: Tensor | None, noise: NoiseStream) -> tuple[Tensor, DraftLaw | None]:
    """The drafts [B, G] of a window and their law; `drafts` stand in the prefixes where given, else those drawn."""
    batch, count = problem.base.shape[0], problem.case.window - 1
    tokens = torch.empty(batch, 0, dtype=torch.long, device=problem.base.device)
    laws: list[DraftLaw] = []
    for i in range(count):
        prefix = tokens if drafts is None else drafts[:, :i]
        token, law = draw(ops, problem, prefix, noise)
        tokens = torch.cat([tokens, token], dim=1)
        laws.append(law)
    if not laws:
        return tokens, None
    tau = None if laws[0].tau is None else torch.cat([law.tau for law in laws if law.tau is not None], dim=1)
    lse = torch.cat([law.lse for law in laws], dim=1)
    return tokens, DraftLaw(problem.draft_logits[:, :count], tau, lse)


def verify(ops: Any, problem: Problem, drafts: Tensor, law: DraftLaw | None, noise: NoiseStream) -> tuple[Tensor, ...]:
    """`verify_window` of a module: num_accepted, next_token, status, each [B]."""
    law = None if problem.certain else law
    return ops.verify_window(
        problem.case.rule,
        problem.base,
        problem.pairs,
        drafts,
        problem.num_drafts,
        law,
        problem.parameters,
        noise,
        problem.case.vocab_size,
    )


def run_candidates(ops: Any, problem: Problem) -> Tensor:
    """`sample_candidates` of a module at every position of the window, as nodes of one level: int64 [B, W, k].

    Each node has two drafts of its own before it, as far as the window has so many positions.
    """
    case, logits = problem.case, problem.draft_logits
    depth = min(2, case.window - 1)
    generator = torch.Generator().manual_seed(_seed(case, 1))
    drafts = torch.randint(0, case.vocab_size, (*logits.shape[:2], depth), generator=generator).to(logits.device)
    parameters, count = problem.parameters, min(8, case.vocab_size)
    return ops.sample_candidates(logits, parameters, drafts, problem.noise(), case.vocab_size, count)


def run_cycle(ops: Any, problem: Problem, drafts: Tensor | None = None) -> Outcome:
    """One decode cycle.

    Args:
        ops: a module with `sample_drafts` and `verify_window`.
        problem: from `build`.
        drafts: int64 [B, G], verified in place of those drawn.
    """
    noise = problem.noise()
    tokens, law = draw_all(ops, problem, drafts, noise)
    return Outcome(tokens, law, *verify(ops, problem, tokens if drafts is None else drafts, law, noise))


# The same answer.


@dataclass
class Comparison:
    """What is wrong with an outcome, and how many of its decisions stood on a rounding's edge.

    Args:
        faults: one line per finding; empty where the outcomes agree.
        decisions: draws and verdicts that were compared.
        near: those that differ, and that the reference itself changes when its noise moves by `SHAKE`.
    """

    faults: list[str]
    decisions: int
    near: int


SHAKE = 1e-4  # moves of coins and Gumbel noise that rounding may account for
_LAW_TOLERANCE = 2e-4  # of kept mass and its logarithm: rounding of a sum over the vocabulary in float32


class _Shaken(NoiseStream):
    """A stream whose coins move by `coin`, the noise of drafts [B, N] by `draft[1]`, of the last token by `SHAKE`."""

    def __init__(self, problem: Problem, coin: float, draft: tuple[Tensor, float] | None, last: Tensor | None) -> None:
        noise = problem.noise()
        super().__init__(noise.key, noise.start, noise.block_start)
        self.coin, self.draft, self.last = coin, draft, last

    def coins(self, count: int) -> Tensor:
        return super().coins(count) + self.coin

    def tokens(self, count: int, vocab_size: int) -> Tensor:
        drawn = super().tokens(count, vocab_size)
        if self.draft is None:
            return drawn
        token, move = self.draft
        here = min(token.shape[1], drawn.shape[1])
        index = token[:, :here, None]
        return drawn.scatter_add(-1, index, torch.full_like(drawn[:, :1, :1], move).expand(index.shape))

    def next_token(self, num_accepted: Tensor, rule: str, window: int, vocab_size: int) -> Tensor:
        drawn = super().next_token(num_accepted, rule, window, vocab_size)
        if self.last is None:
            return drawn
        index = self.last[:, None]
        return drawn.scatter_add(-1, index, torch.full_like(drawn[:, :1], SHAKE).expand(index.shape))


def _explained(problem: Problem, drafts: Tensor, law: DraftLaw | None, got: Sequence[Tensor]) -> Tensor:
    """bool [B]: rows whose verdict the reference gives as well under noise moved by `SHAKE`."""
    explained = torch.zeros(drafts.shape[0], dtype=torch.bool, device=drafts.device)
    safe = got[1].clamp(0, problem.case.vocab_size - 1)
    for coin, draft, last in itertools.product((0.0, SHAKE, -SHAKE), (0.0, SHAKE, -SHAKE), (None, safe)):
        shaken = _Shaken(problem, coin, (drafts, draft) if draft and drafts.shape[1] else None, last)
        expected = verify(torch_reference, problem, drafts, law, shaken)
        explained |= torch.stack([a == b for a, b in zip(expected, got, strict=True)]).all(0)
    return explained


def _law_faults(problem: Problem, expected: DraftLaw, got: DraftLaw, drafts: Tensor, usable: Tensor) -> list[str]:
    """Draft laws that differ: in the ids they keep, weighed by their mass, or in the logarithm of the kept mass.

    A threshold may stand anywhere between the last id that is kept and the first that is not. Greedy rows have a law
    that nothing is drawn from.
    """
    if (expected.tau is None) != (got.tau is None):
        return [f"tau is {'absent' if got.tau is None else 'present'} in the draft law"]
    if problem.parameters.any_sampling and problem.parameters.any_greedy:
        usable = usable & ~problem.parameters.greedy[:, None]
    faults = []
    gap = ((expected.lse.double() - got.lse.double()).abs() / (1 + expected.lse.double().abs()))[usable]
    if gap.numel() and not float(gap.max()) <= _LAW_TOLERANCE:
        faults.append(f"lse of the draft law is off by {float(gap.max()):.3g}")
    if expected.tau is not None and got.tau is not None:
        logits = problem.draft_logits[:, : drafts.shape[1], : problem.case.vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        position = torch.arange(drafts.shape[1], device=drafts.device).expand(drafts.shape[0], -1)
        z = penalised(logits, problem.parameters, drafts, position)
        kept = z >= expected.tau[..., None]
        edge = got.tau[..., None]
        margin = 1e-5 * (1 + edge.abs().masked_fill(~edge.isfinite(), 0))
        misplaced = (kept & ~(z >= edge - margin)) | (~kept & ~(z < edge + margin))
        mass = ((z - expected.lse[..., None]).exp() * misplaced).sum(-1)[usable]
        if mass.numel() and not float(mass.max()) <= _LAW_TOLERANCE:
            faults.append(f"tau of the draft law misplaces a mass of {float(mass.max()):.3g}")
    return faults


def compare(problem: Problem, expected: Outcome, got: Outcome) -> Comparison:
    """Hold an outcome against the reference's.

    Tokens and verdicts must be equal; one that differs is forgiven, and counted, where the reference gives it too once
    its noise has moved by `SHAKE`. Values under an error status are not compared beyond the status.

    Args:
        problem: of both; `got` must have been run on the drafts of `expected`.
        expected: of `specproxy_kernels.reference`.
        got: of the kernels.
    """
    faults = []
    near = decisions = 0
    case = problem.case
    errors = torch_reference.STATUS_NON_FINITE | torch_reference.STATUS_EMPTY_SUPPORT
    drafts = expected.tokens
    # A drafter's own logits may be unusable; its tokens then say nothing, and verification reports the row.
    usable = torch.ones_like(drafts, dtype=torch.bool)
    if expected.law is not None and got.law is not None:
        usable = expected.law.lse.isfinite()
        decisions += int(usable.sum())
        faults += _law_faults(problem, expected.law, got.law, drafts, usable)
    wrong = (expected.tokens != got.tokens) & usable
    for i in wrong.any(0).nonzero()[:, 0].tolist():
        safe = got.tokens.clamp(0, case.vocab_size - 1)
        token, _ = draw(torch_reference, problem, drafts[:, :i], _Shaken(problem, 0.0, (safe, SHAKE), None))
        same = token[:, 0] == got.tokens[:, i]
        near += int((wrong[:, i] & same).sum())
        for row in (wrong[:, i] & ~same).nonzero()[:, 0].tolist():
            faults.append(f"row {row}, draft {i}: {int(got.tokens[row, i])} is not {int(expected.tokens[row, i])}")
    verdicts = (expected.num_accepted, expected.next_token, expected.status)
    answer = (got.num_accepted, got.next_token, got.status)
    decisions += 2 * drafts.shape[0]
    failed = (expected.status & errors) != 0
    comparable = [answer[0] != verdicts[0], (answer[1] != verdicts[1]) & ~failed, answer[2] != verdicts[2]]
    wrong_rows = torch.stack(comparable).any(0)
    outside = (answer[1] < 0) | (answer[1] >= case.vocab_size)
    faults += [f"row {row}: next token {int(answer[1][row])} is no id" for row in outside.nonzero()[:, 0].tolist()]
    if bool(wrong_rows.any()):
        explained = _explained(problem, drafts, expected.law, answer) & ~outside
        near += int((wrong_rows & explained).sum())
        for row in (wrong_rows & ~explained).nonzero()[:, 0].tolist():
            left, right = ([int(t[row]) for t in side] for side in (answer, verdicts))
            faults.append(f"row {row}: accepted, next token, status {left} are not {right}")
    return Comparison(faults, decisions, near)


# Window attention.


@dataclass
class AttentionProblem:
    """Query [B, H, T, D], buffers of keys and values [B, H_kv, S, D], lengths int64 [B] before the window.

    Args:
        ancestors: int64 [B, T], the words of a token tree, or None.
    """

    case: AttentionCase
    query: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    scaling: float
    ancestors: Tensor | None = None

    def kv_bytes(self) -> int:
        """Bytes of keys and values that some query of a chain sees."""
        seen = self.lengths + self.case.window
        if self.case.sliding_window:
            seen = seen.clamp(max=self.case.sliding_window + self.case.window - 1)
        row = self.case.kv_heads * (self.keys.shape[-1] + self.values.shape[-1]) * self.keys.element_size()
        return int(seen.sum()) * row

    def take(self, rows: Tensor) -> AttentionProblem:
        """Some rows in some order, int64 [N]."""
        return replace(
            self,
            query=self.query[rows],
            keys=self.keys[rows],
            values=self.values[rows],
            lengths=self.lengths[rows],
            ancestors=None if self.ancestors is None else self.ancestors[rows],
        )


def random_tree(window: int, rng: random.Random) -> list[int]:
    """Ancestor words of a random tree of `window` nodes, the first its root."""
    words = [1]
    for node in range(1, window):
        words.append(words[rng.randrange(node)] | 1 << node)
    return [word - 2**64 if word >= 2**63 else word for word in words]


def build_attention(
    case: AttentionCase, device: torch.device | str = "cpu", salt: int = 0, full: bool = False
) -> AttentionProblem:
    """The tensors of a case, drawn on the device.

    Args:
        full: every row is as long as the longest, as benchmarks have it.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(_seed(case, salt))
    dtype = DTYPES[case.dtype]
    num_keys = case.longest + case.window + (0 if case.buffer == "tight" else 37)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    if case.layout == "transposed":
        query = normal(case.batch, case.window, case.heads, case.head_size).transpose(1, 2)
    else:
        query = normal(case.batch, case.heads, case.window, case.head_size)
    keys, values = (normal(case.batch, case.kv_heads, num_keys, case.head_size) for _ in range(2))
    last = max(case.batch - 1, 1)
    lengths = [case.longest if full or case.batch == 1 else case.longest * row // last for row in range(case.batch)]
    for row, length in enumerate(lengths):
        keys[row, :, length + case.window :] = torch.nan
        values[row, :, length + case.window :] = torch.nan
    ancestors = None
    if case.tree:
        rng = random.Random(_seed(case, salt))
        words = [random_tree(case.window, rng) for _ in range(case.batch)]
        ancestors = torch.tensor(words, dtype=torch.long, device=device)
    scaling = case.head_size**-0.5
    return AttentionProblem(case, query, keys, values, torch.tensor(lengths, device=device), scaling, ancestors)


def run_attention(attention: Callable[..., Tensor], problem: AttentionProblem) -> Tensor:
    """`ragged_attention`, or its reference: [B, T, H, D]."""
    return attention(
        problem.query,
        problem.keys,
        problem.values,
        problem.lengths,
        scaling=problem.scaling,
        softcap=problem.case.softcap or None,
        sliding_window=problem.case.sliding_window or None,
        ancestors=problem.ancestors,
    )


def run_compact(compact: Callable[..., None], problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """`compact_window`, or its reference: copies of the buffers in which every other token of the window has moved."""
    keys, values = problem.keys.clone(), problem.values.clone()
    slots = torch.arange(0, problem.case.window, 2, device=keys.device).repeat(problem.case.batch, 1)
    compact(keys, values, problem.lengths, slots)
    return keys, values


def run_write(write: Callable[..., None], problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """`write_window`, or its reference: copies of the buffers with a window written, taken from the queries."""
    keys, values = problem.keys.clone(), problem.values.clone()
    states = problem.query[:, : problem.case.kv_heads]
    write(states, states * 2, keys, values, problem.lengths)
    return keys, values
