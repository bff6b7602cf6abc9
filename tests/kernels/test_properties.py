"""Random shapes, dtypes, strides and sampling settings against the float64 NumPy reference, and row independence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from enumeration import InjectedTokens
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from numpy_reference import combine, verify, warp
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specproxy_kernels import reference
from specproxy_kernels.laws import (
    LogitPair,
    WarpParameters,
    combine_logits,
    pack_allowed_tokens,
    unpack_allowed_tokens,
    warp_law,
)
from specproxy_kernels.noise import row_keys
from specproxy_kernels.reference import (
    STATUS_EMPTY_RESIDUAL,
    STATUS_EMPTY_SUPPORT,
    STATUS_NON_FINITE,
    DraftLaw,
    NoiseStream,
    emit_next_token,
    sample_drafts,
    verify_window,
)

INF = float("inf")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PROPERTY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def logits(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, extra: int, ties: bool) -> Tensor:
    """Random logits as a view of a wider, oddly strided buffer; the ids behind the shared ones hold huge values."""
    values = rng.normal(size=shape) * 2
    if ties:
        values = np.round(values)
    wide = torch.full((*shape[:-1], shape[-1] + extra + 1), 1e4, dtype=dtype)
    wide[..., : shape[-1]] = torch.tensor(values, dtype=dtype)
    return wide.transpose(0, 1).contiguous().transpose(0, 1)[..., : shape[-1] + extra]


@dataclass
class Rows:
    """A random problem: B rows with their own sampling settings, and everything `verify_window` reads."""

    vocab_size: int
    base: Tensor
    pairs: list[LogitPair]
    parameters: WarpParameters
    drafts: Tensor
    num_drafts: Tensor
    row_settings: list[dict[str, Any]]
    seen: np.ndarray
    allowed: np.ndarray | None

    @property
    def batch(self) -> int:
        return self.base.shape[0]

    def take(self, rows: list[int]) -> Rows:
        """Some rows, in some order. Flags and bounds stay as the host computed them for the whole batch."""
        index = torch.tensor(rows)

        def pick(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] != self.batch else tensor[index]

        fields = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seen", "allowed")
        return replace(
            self,
            base=self.base[index],
            pairs=[LogitPair(*(pick(tensor) for tensor in pair)) for pair in self.pairs],
            parameters=replace(self.parameters, **{name: pick(getattr(self.parameters, name)) for name in fields}),
            drafts=self.drafts[index],
            num_drafts=self.num_drafts[index],
            row_settings=[self.row_settings[row] for row in rows],
            seen=self.seen[rows],
            allowed=self.allowed if self.allowed is None or len(self.allowed) == 1 else self.allowed[rows],
        )

    def scores(self, row: int, position: int) -> tuple[np.ndarray, bool]:
        """Combined logits of one position by the NumPy reference."""
        pairs = [
            (
                pair.expert[row, position].double().numpy(),
                None if pair.anti_expert is None else pair.anti_expert[row, position].double().numpy(),
                float(pair.alpha[row, position]),
            )
            for pair in self.pairs
        ]
        return combine(self.base[row, position].double().numpy(), pairs, self.vocab_size)

    def warp_arguments(self, row: int, position: int) -> dict[str, Any]:
        arguments = dict(self.row_settings[row])
        prefix = self.drafts[row, :position].tolist()
        arguments["seen"] = {*np.flatnonzero(self.seen[row]).tolist(), *prefix}
        if self.allowed is not None:
            words = self.allowed[row % len(self.allowed)]
            arguments["allowed"] = words[position % len(words)]
        return arguments


@st.composite
def problems(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES, greedy: bool = True) -> Rows:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocab = draw(st.one_of(st.integers(1, 12), st.sampled_from([31, 32, 33, 64, 257])))
    batch, window = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(dtypes))
    ties = draw(st.booleans())
    extra = [draw(st.integers(0, 3)) for _ in range(3)]
    base = logits(rng, (batch, window, vocab), dtype, extra[0], ties)
    pairs = []
    for i in range(draw(st.integers(1, 2))):
        expert = logits(rng, (batch, window, vocab), dtype, extra[1], ties)
        anti_expert = logits(rng, (batch, window, vocab), dtype, extra[2], ties)
        alpha = torch.tensor(rng.choice([0.0, 1.0, -0.5, 0.25, 2.0], size=(batch, window)))
        pairs.append(LogitPair(expert, None if i and draw(st.booleans()) else anti_expert, alpha))
    if draw(st.booleans()):  # masked tokens: at least one token per position stays
        for tensor in (base, pairs[0].expert):
            hidden = torch.tensor(rng.random((batch, window, vocab)) < 0.2)
            hidden[..., 0] = False
            tensor[..., :vocab].masked_fill_(hidden, -INF)
            if tensor is not base and pairs[0].anti_expert is not None:
                pairs[0].anti_expert[..., :vocab].masked_fill_(hidden, -INF)

    def column(name: str, values: list[float], off: float) -> np.ndarray | None:
        return rng.choice([*values, off], size=batch) if draw(st.booleans()) else None

    temperature = rng.choice([0.5, 1.0, 1.7, 0.0] if greedy and draw(st.booleans()) else [0.5, 1.0, 1.7], size=batch)
    top_k = column("top_k", [1, 2, 3, vocab, vocab + 5], draw(st.sampled_from([0, 2])))
    top_p = column("top_p", [0.3, 0.61, 0.9], 1.0)
    min_p = column("min_p", [0.05, 0.23, 0.7], 0.0)
    penalty = column("repetition_penalty", [0.7, 1.3, 2.0], 1.0)
    for values, off in ((top_k, 0), (top_p, 1.0), (min_p, 0.0)):
        if values is not None:
            values[temperature == 0] = off  # as the runtime does: greedy rows do not filter
    seen = rng.random((batch, vocab)) < 0.3
    allowed = None
    if draw(st.booleans()):
        allowed = rng.random((draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, window])), vocab)) < 0.7
        allowed[..., 0] = True
    columns = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": penalty,
    }
    row_settings = [
        {name: values[row].item() for name, values in columns.items() if values is not None} for row in range(batch)
    ]
    for row in row_settings:
        if "top_k" in row:
            row["top_k"] = int(row["top_k"])

    def floats(values: np.ndarray | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float64)

    bounded = top_k is not None and (top_k[temperature > 0] > 0).all() and top_k.max() > 0
    parameters = WarpParameters(
        temperature=torch.tensor(temperature, dtype=torch.float64),
        top_k=None if top_k is None else torch.tensor(top_k.astype(int)),
        top_p=floats(top_p),
        min_p=floats(min_p),
        repetition_penalty=floats(penalty),
        seen=None if penalty is None else torch.tensor(seen),
        allowed=None if allowed is None else pack_allowed_tokens(torch.tensor(allowed)),
        max_top_k=int(top_k.max()) if top_k is not None and bounded else 0,
        any_greedy=bool((temperature == 0).any()),
        any_sampling=bool((temperature > 0).any()),
    )
    drafts = torch.tensor(rng.integers(0, vocab, size=(batch, window - 1)))
    num_drafts = torch.tensor(rng.integers(0, window, size=batch))
    return Rows(vocab, base, pairs, parameters, drafts, num_drafts, row_settings, seen, allowed)


@PROPERTY
@given(problems())
def test_combined_logits(rows: Rows) -> None:
    combined, bad = combine_logits(rows.base, rows.pairs, rows.vocab_size)
    assert combined.dtype == torch.promote_types(rows.base.dtype, torch.float32)
    assert not bad.any()
    tolerance = 1e-12 if combined.dtype == torch.float64 else 1e-5
    for row in range(rows.batch):
        for position in range(rows.base.shape[1]):
            want, wrong = rows.scores(row, position)
            assert not wrong
            np.testing.assert_allclose(combined[row, position].double().numpy(), want, rtol=tolerance, atol=tolerance)


@PROPERTY
@given(problems())
def test_warped_law(rows: Rows) -> None:
    batch, window = rows.base.shape[:2]
    combined, _ = combine_logits(rows.base, rows.pairs, rows.vocab_size)
    law = warp_law(combined, rows.parameters, rows.drafts, torch.arange(window).expand(batch, -1))
    log_prob = law.log_prob().double()
    tokens = torch.arange(rows.vocab_size)
    tolerance = 1e-9 if combined.dtype == torch.float64 else 2e-4
    for row in range(batch):
        for position in range(window):
            # From the runtime's own combined logits, so that float32 rounding cannot break or make ties.
            scores = combined[row, position].double().numpy()
            want = warp(scores, **rows.warp_arguments(row, position))
            if rows.row_settings[row]["temperature"] == 0:
                best = int(law.kept()[row, position].argmax())
                assert want.z[best] >= want.z.max() - 1e-6
                assert combined.dtype != torch.float64 or best == int(want.z.argmax())
                continue
            near = np.abs(np.diff(np.unique(want.z[np.isfinite(want.z)])))
            assume(want.margin > 1e-5 and (combined.dtype == torch.float64 or near.min(initial=1) > 1e-5))
            got = log_prob[row, position].numpy()
            np.testing.assert_array_equal(np.isfinite(got), want.kept)
            np.testing.assert_allclose(got, want.log_prob, rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(np.exp(got).sum(), 1, atol=1e-4)
            repeated = law.log_prob_of(tokens[None].expand(batch, -1)) if window == rows.vocab_size else None
            assert repeated is None or torch.equal(repeated[row], law.log_prob()[row].gather(-1, tokens[:, None])[:, 0])


@PROPERTY
@given(
    problems(dtypes=[torch.float64], greedy=False), st.sampled_from(["rejection", "block"]), st.booleans(), st.data()
)
def test_verified_window(rows: Rows, rule: str, certain: bool, data: st.DataObject) -> None:
    """Drafts drawn by the runtime, coins and Gumbel noise injected: kept drafts and the next token of every row."""
    batch, window = rows.base.shape[:2]
    count, vocab = window - 1, rows.vocab_size
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    expert = rows.pairs[0].expert
    laws: list[DraftLaw] = []
    drafts = torch.empty(batch, 0, dtype=torch.long)
    for i in range(count):
        noise = InjectedTokens(torch.tensor(rng.gumbel(size=(batch, vocab))))
        token, law = sample_drafts(expert[:, i : i + 1], rows.parameters, drafts, noise, vocab)
        drafts = torch.cat([drafts, token], 1)
        laws.append(law)
    rows.drafts = drafts
    draft_law = None
    if laws and not certain:
        tau = None if laws[0].tau is None else torch.cat([law.tau for law in laws if law.tau is not None], 1)
        draft_law = DraftLaw(torch.cat([law.logits for law in laws], 1), tau, torch.cat([law.lse for law in laws], 1))
    coins, gumbel = rng.random((batch, count)), rng.gumbel(size=(batch, vocab))

    class Injected:
        def coins(self, count: int) -> Tensor:
            return torch.tensor(coins)

        def next_token(self, *arguments: object) -> Tensor:
            return torch.tensor(gumbel)

    kept, token, status = verify_window(
        rule, rows.base, rows.pairs, drafts, rows.num_drafts, draft_law, rows.parameters, Injected(), vocab
    )
    for row in range(batch):
        used = int(rows.num_drafts[row])
        targets = [warp(rows.scores(row, i)[0], **rows.warp_arguments(row, i)) for i in range(used + 1)]
        one_hot = np.eye(vocab)
        proposals = [warp(expert[row, i, :vocab].double().numpy(), **rows.warp_arguments(row, i)) for i in range(used)]
        draft_probs = [one_hot[drafts[row, i]] if certain else proposals[i].prob for i in range(used)]
        assume(min([law.margin for law in [*targets, *proposals]]) > 1e-9)
        number, weight, margin = verify(
            rule, [law.prob for law in targets], drafts[row, :used].tolist(), draft_probs, coins[row]
        )
        assume(margin > 1e-9)
        assert int(kept[row]) == number
        refused = number < used
        if refused and weight.max() < 1e-9:
            continue  # rounding decides whether anything is left
        event("refused" if refused else "bonus")
        assert int(status[row]) == 0
        with np.errstate(divide="ignore"):
            race = np.log(weight) + gumbel[row]
        best = np.sort(race)[-2:]
        assume(len(best) < 2 or best[1] - best[0] > 1e-7)
        assert int(token[row]) == int(race.argmax())


def outputs(rows: Rows, rule: str, key: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    """Everything a cycle gives, floats included."""
    batch, window = rows.base.shape[:2]
    stream = NoiseStream(key, start, start if rule == "block" else None)
    position = torch.arange(window).expand(batch, -1)
    combined, bad = combine_logits(rows.base, rows.pairs, rows.vocab_size)
    law = warp_law(combined, rows.parameters, rows.drafts, position)
    expert_law = None
    if window > 1:
        expert = rows.pairs[0].expert[:, : window - 1]
        cut = expert[..., : rows.vocab_size]
        warped = warp_law(
            cut.to(torch.promote_types(cut.dtype, torch.float32)),
            rows.parameters,
            rows.drafts,
            position[:, : window - 1],
        )
        expert_law = DraftLaw(expert, warped.tau, warped.lse)
    verified = verify_window(
        rule, rows.base, rows.pairs, rows.drafts, rows.num_drafts, expert_law, rows.parameters, stream, rows.vocab_size
    )
    return combined, bad, law.z, law.lse, law.log_prob(), *verified


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(((first == second) | ((first != first) & (second != second))).all())


@PROPERTY
@given(problems(), st.sampled_from(reference.RULES), st.randoms(use_true_random=False))
def test_rows_do_not_depend_on_their_batch(rows: Rows, rule: str, random: Any) -> None:
    """A permuted batch, and each row alone, give bit-identical rows."""
    key, start = row_keys([3] * rows.batch, range(rows.batch)), torch.arange(rows.batch)
    together = outputs(rows, rule, key, start)
    order = list(range(rows.batch))
    random.shuffle(order)
    for part in (order, *([row] for row in order)):
        alone = outputs(rows.take(part), rule, key[part], start[part])
        assert all(same_bits(a, b[torch.tensor(part)]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [37, 1000, 4099])
def test_rows_do_not_depend_on_their_batch_at_size(vocab_size: int, dtype: torch.dtype) -> None:
    """Vectors longer than a SIMD register and a reduction block, at batch sizes that change how torch splits the
    work."""
    generator = torch.Generator().manual_seed(vocab_size)
    batch, window = 9, 4

    def normal() -> Tensor:
        return (torch.randn(batch, window, vocab_size, generator=generator) * 3).to(dtype)

    ones = torch.ones(batch)
    parameters = WarpParameters(
        temperature=ones * 0.8, top_k=torch.full((batch,), 30), top_p=ones * 0.9, max_top_k=30, any_greedy=False
    )
    pairs = [LogitPair(normal(), normal(), torch.ones(batch, window))]
    drafts = pairs[0].expert[:, :-1].argmax(-1)
    full = torch.full((batch,), window - 1)
    rows = Rows(vocab_size, normal(), pairs, parameters, drafts, full, [{}] * batch, np.zeros((batch, 1)), None)
    key, start = row_keys([3] * batch, range(batch)), torch.arange(batch)
    for rule in reference.RULES:
        together = outputs(rows, rule, key, start)
        for part in ([0], [8], [3, 1], list(range(8, -1, -1))):
            alone = outputs(rows.take(part), rule, key[part], start[part])
            assert all(same_bits(a, b[torch.tensor(part)]) for a, b in zip(alone, together, strict=True))


@PROPERTY
@given(
    st.integers(0, 2**32),
    st.floats(0.3, 2.5),
    st.integers(1, 40),
    st.floats(0.05, 0.99),
    st.floats(0.01, 0.9),
    st.floats(0.5, 2.0),
)
def test_warp_equals_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    """The whole chain against Transformers' own classes, where no value lies on a boundary."""
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.normal(size=(2, 37)) * 3)
    ids = torch.tensor(rng.integers(0, 37, size=(2, 6)))
    want = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    want = TemperatureLogitsWarper(temperature)(ids, want)
    want = TopKLogitsWarper(top_k)(ids, want)
    want = TopPLogitsWarper(top_p)(ids, want)
    want = MinPLogitsWarper(min_p)(ids, want).log_softmax(-1)
    # The window's tokens: two seen in the prompt, four drafted before window position 4.
    seen = torch.zeros(2, 37, dtype=torch.bool).scatter_(1, ids[:, :2], True)
    full = torch.ones(2, dtype=torch.float64)
    parameters = WarpParameters(
        temperature=full * temperature,
        top_k=torch.full((2,), top_k),
        top_p=full * top_p,
        min_p=full * min_p,
        repetition_penalty=full * penalty,
        seen=seen,
        max_top_k=top_k,
        any_greedy=False,
    )
    for row in range(2):
        arguments = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        plain = warp(scores[row].numpy(), **arguments, repetition_penalty=penalty, seen=ids[row].tolist())
        assume(plain.margin > 1e-7)
        np.testing.assert_array_equal(plain.kept, np.isfinite(want[row].numpy()))
    got = warp_law(scores[:, None], parameters, ids[:, 2:], torch.full((2, 1), 4)).log_prob()[:, 0]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_prefix_holds_the_drafts_before_its_position_only() -> None:
    """Penalties read prompt and earlier drafts: not the draft at the position itself, none behind it."""
    parameters = WarpParameters(
        temperature=torch.ones(1),
        repetition_penalty=torch.full((1,), 2.0),
        seen=torch.tensor([[True, *[False] * 4]]),
        any_greedy=False,
    )
    z = warp_law(torch.ones(1, 4, 5), parameters, torch.tensor([[2, 2, 4]]), torch.arange(4)[None]).z
    penalised = [
        [True, False, False, False, False],
        *[[True, False, True, False, False]] * 2,
        [True, False, True, False, True],
    ]
    assert (z[0] == 0.5).tolist() == penalised
    late = warp_law(torch.ones(1, 1, 5), parameters, torch.tensor([[2, 2, 4]]), torch.tensor([[1]])).z
    assert (late[0] == 0.5).tolist() == [penalised[1]]


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 65])
def test_packed_tokens_unpack(vocab_size: int) -> None:
    allowed = torch.rand(3, 2, vocab_size, generator=torch.Generator().manual_seed(0)) < 0.5
    allowed[0], allowed[1, 0] = True, False
    words = pack_allowed_tokens(allowed)
    assert words.dtype == torch.int32 and words.shape == (3, 2, -(-vocab_size // 32))
    assert torch.equal(unpack_allowed_tokens(words, vocab_size), allowed)


# --- Status bits -----------------------------------------------------------------------------------------------------


def window_of(
    batch: int = 3, window: int = 3, vocab: int = 6
) -> tuple[Tensor, LogitPair, Tensor, DraftLaw, WarpParameters, Tensor]:
    generator = torch.Generator().manual_seed(4)

    def normal() -> Tensor:
        return torch.randn(batch, window, vocab, generator=generator)

    pair = LogitPair(normal(), normal(), torch.ones(batch, window))
    parameters = WarpParameters(temperature=torch.ones(batch), any_greedy=False)
    drafts = torch.tensor([[0, 1]] * batch)
    law = DraftLaw(pair.expert[:, :-1], None, pair.expert[:, :-1].logsumexp(-1))
    return normal(), pair, drafts, law, parameters, row_keys([1] * batch, range(batch))


def run(
    rule: str,
    base: Tensor,
    pair: LogitPair,
    drafts: Tensor,
    law: DraftLaw,
    parameters: WarpParameters,
    key: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    start = torch.zeros_like(key)
    stream = NoiseStream(key, start, start if rule == "block" else None)
    num_drafts = torch.full_like(start, drafts.shape[1])
    return verify_window(rule, base, [pair], drafts, num_drafts, law, parameters, stream, base.shape[-1])


FAULTS = {
    "base NaN": ("base", torch.nan, STATUS_NON_FINITE),
    "base +inf": ("base", INF, STATUS_NON_FINITE),
    "expert NaN": ("expert", torch.nan, STATUS_NON_FINITE),
    "expert +inf": ("expert", INF, STATUS_NON_FINITE),
    "anti-expert NaN": ("anti_expert", torch.nan, STATUS_NON_FINITE),
    "anti-expert +inf": ("anti_expert", INF, STATUS_NON_FINITE),
    "anti-expert -inf": ("anti_expert", -INF, STATUS_NON_FINITE),
}


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize("alpha", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_unusable_logits_set_the_status_of_their_row_alone(fault: str, greedy: bool, alpha: float, rule: str) -> None:
    role, value, bit = FAULTS[fault]
    base, pair, drafts, law, parameters, key = window_of()
    pair.alpha.fill_(alpha)
    if greedy:
        parameters = replace(parameters, temperature=torch.zeros(3), any_greedy=True, any_sampling=False)
    good = run(rule, base, pair, drafts, law, parameters, key)
    assert not good[2].any()
    (base if role == "base" else getattr(pair, role))[1, :, 3] = value
    kept, token, status = run(rule, base, pair, drafts, law, parameters, key)
    assert int(status[1]) & bit
    assert int(kept[1]) == 0 and 0 <= int(token[1]) < 6
    for got, want in zip((kept, token, status), good, strict=True):
        assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("rule", reference.RULES)
def test_one_bad_token_anywhere_in_the_vocabulary_is_found(rule: str) -> None:
    for v in range(6):
        base, pair, drafts, law, parameters, key = window_of()
        base[2, 0, v] = torch.nan
        _, _, status = run(rule, base, pair, drafts, law, parameters, key)
        assert int(status[2]) & STATUS_NON_FINITE and not status[:2].any()


@pytest.mark.parametrize("rule", reference.RULES)
def test_a_fault_counts_where_it_is_reached(rule: str) -> None:
    """Logits behind the emitted tokens are never read: a fault at the bonus position of a refused window is no
    fault."""
    base, pair, drafts, law, parameters, key = window_of(batch=200)
    kept, token, _ = run(rule, base, pair, drafts, law, parameters, key)
    base[:, 2] = torch.nan
    again, second, status = run(rule, base, pair, drafts, law, parameters, key)
    assert torch.equal(again, kept)
    assert torch.equal(status & STATUS_NON_FINITE != 0, kept == 2)
    assert torch.equal(second[kept < 2], token[kept < 2])
    assert 2 < int((kept == 2).sum()) < 180
    base[:, 1] = torch.nan
    third, _, status = run(rule, base, pair, drafts, law, parameters, key)
    assert torch.equal(status & STATUS_NON_FINITE != 0, third == 1)
    assert int(third.max()) == 1


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize("how", ["base", "expert", "allowed"])
def test_no_token_left(how: str, rule: str) -> None:
    base, pair, drafts, law, parameters, key = window_of()
    if how == "base":
        base[1] = -INF
    elif how == "expert":
        pair.expert[1] = -INF
    else:
        allowed = torch.ones(3, 1, 6, dtype=torch.bool)
        allowed[1] = False
        parameters = replace(parameters, allowed=pack_allowed_tokens(allowed))
    kept, token, status = run(rule, base, pair, drafts, law, parameters, key)
    assert int(status[1]) & STATUS_EMPTY_SUPPORT and not status[[0, 2]].any()
    assert int(kept[1]) == 0 and 0 <= int(token[1]) < 6


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize("setting", ["temperature", "repetition_penalty"])
def test_a_warp_that_overflows_sets_the_status(setting: str, rule: str) -> None:
    """Finite logits divided by almost nothing are infinite in float32: no law is left to draw from."""
    base, pair, drafts, law, parameters, key = window_of()
    tiny = torch.tensor([1.0, 1e-46, 1.0], dtype=torch.float64)
    seen = torch.ones(3, 6, dtype=torch.bool)
    parameters = replace(parameters, **{setting: tiny}, seen=seen if setting == "repetition_penalty" else None)
    _, token, status = run(rule, base, pair, drafts, law, parameters, key)
    assert int(status[1]) & STATUS_NON_FINITE and not status[[0, 2]].any()
    assert 0 <= int(token[1]) < 6


def test_combined_dtype_is_the_widest() -> None:
    third = torch.full((1, 1, 2), 1 / 3, dtype=torch.float64)
    for base in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        pair = LogitPair(third, None, torch.ones(1, 1))
        combined, _ = combine_logits(torch.zeros(1, 1, 2, dtype=base), [pair], 2)
        assert combined.dtype == torch.float64 and torch.equal(combined, third)


def test_masked_tokens_are_never_emitted() -> None:
    for rule in reference.RULES:
        base, pair, drafts, law, parameters, key = window_of(batch=500)
        base[..., 0], pair.expert[..., 4], pair.anti_expert[..., 4] = -INF, -INF, -INF
        law = DraftLaw(law.logits, None, law.logits.logsumexp(-1))
        kept, token, status = run(rule, base, pair, drafts, law, parameters, key)
        assert not status.any() and not kept.any()  # the first draft is token 0
        assert {*token.tolist()} == {1, 2, 3, 5}


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_an_empty_residual_draws_from_the_target(rule: str) -> None:
    """A refusal that rounding alone explains (p = q) leaves nothing of (p - q)+: draw from p, and say so."""
    count = 4000
    base, pair, drafts, law, parameters, key = window_of(batch=count, window=2)
    pair = LogitPair(pair.expert, base, pair.alpha)  # base + expert - base
    base = torch.zeros_like(base)
    pair = LogitPair(pair.expert[:1, :1].expand(count, 2, -1), torch.zeros_like(base), pair.alpha)
    law = DraftLaw(pair.expert[:, :1], None, pair.expert[:, :1].logsumexp(-1))
    drafts = drafts[:, :1]
    refused = reference.Acceptance(
        torch.zeros(count, dtype=torch.long), torch.zeros(count), torch.zeros(count, dtype=torch.bool)
    )
    stream = NoiseStream(key, torch.zeros_like(key))
    token, status = emit_next_token(rule, base, [pair], drafts, refused, law, parameters, stream, 6)
    assert (status == STATUS_EMPTY_RESIDUAL).all()
    frequency = torch.bincount(token, minlength=6) / count
    assert float((frequency - pair.expert[0, 0].softmax(-1)).abs().sum()) < 0.1


def test_extreme_but_finite_logits() -> None:
    """Logits of very different sizes: no NaN, no status, tokens of the right support."""
    for scale in (1e-30, 1e3, 1e30):
        for rule in reference.RULES:
            base, pair, drafts, law, parameters, key = window_of(batch=50)
            base = base * scale
            kept, token, status = run(rule, base, pair, drafts, law, parameters, key)
            assert not (status & ~STATUS_EMPTY_RESIDUAL).any()
            if scale >= 1e3:
                best = base[torch.arange(50), kept].argmax(-1)
                assert torch.equal(token, best)
