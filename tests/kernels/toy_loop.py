"""A decode loop without models: the runtime's drafting, acceptance and noise over random laws given as tables.

Rows are samples: each has a key of its own, so that one run gives as many independent draws of the joint law as it
has rows. The laws depend on the last two tokens, and the drafts are anti-correlated with the target: expert logits
are minus the target's, so that refusals, residuals and short cycles are frequent and cycles end at different
positions in different rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from enumeration import make_parameters
from numpy_reference import warp
from torch import Tensor


@dataclass(frozen=True)
class Toy:
    """A rule and a sampling setting over random laws of the last two tokens.

    Args:
        settings: keyword arguments of `numpy_reference.warp`.
        num_drafts: G.
        length: tokens per sample whose joint law is compared.
        ragged: every row has its own number of drafts, 0 .. G, fixed in advance.
        stops: every row stops its draft before a "law" of much entropy, which is exact; or before a "token", which is
            not.
        certain: drafts are one-hot: the token after the last one.
        correlation: expert logits are this times the target's.
    """

    rule: str
    vocab_size: int = 5
    num_drafts: int = 2
    length: int = 3
    settings: dict[str, float] = field(default_factory=dict)
    ragged: bool = False
    stops: str = ""
    certain: bool = False
    scale: float = 0.7
    correlation: float = -1.0
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"{self.rule}-V{self.vocab_size}-G{self.num_drafts}-L{self.length}"]
        parts += [f"{name}={value:g}" for name, value in self.settings.items()]
        parts += [name for name in ("ragged", "certain") if getattr(self, name)]
        parts += [f"stops-by-{self.stops}"] * bool(self.stops)
        return "-".join(parts)

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits of base, expert and anti-expert, [contexts, V] each; alpha is 1."""
        rng = np.random.default_rng(self.seed)
        shape = ((self.vocab_size + 1) ** 2, self.vocab_size)
        target = rng.normal(size=shape) * self.scale
        anti_expert = rng.normal(size=shape) * 0.5
        expert = self.correlation * target
        return target - expert + anti_expert, expert, anti_expert

    def context(self, before_last: Any, last: Any) -> Any:
        return before_last * (self.vocab_size + 1) + last

    def joint_law(self) -> np.ndarray:
        """Exact law [V] * length of the first tokens."""
        base, expert, anti_expert = self.tables()
        vocab = self.vocab_size
        law = np.ones(())
        for depth in range(self.length):
            step = np.empty((vocab,) * (depth + 1))
            for prefix in itertools.product(range(vocab), repeat=depth):
                last = (vocab, vocab, *prefix)[-2:]
                row = self.context(*last)
                seen = prefix if "repetition_penalty" in self.settings else ()
                settings: dict[str, Any] = dict(self.settings)
                step[prefix] = warp(base[row] + (expert[row] - anti_expert[row]), **settings, seen=seen).prob
            law = law[..., None] * step
        return law


def sample(
    ops: ModuleType, noise: ModuleType, toy: Toy, rows: int, seed: int = 0, num_drafts: int | None = None
) -> np.ndarray:
    """Tokens [rows, length] of independent rows, by the runtime's functions and its counter noise."""
    chunk = 1 << 15
    parts = [
        _sample_chunk(ops, noise, toy, first, min(chunk, rows - first), seed, num_drafts)
        for first in range(0, rows, chunk)
    ]
    return np.concatenate(parts)


def _sample_chunk(
    ops: ModuleType, noise: ModuleType, toy: Toy, first: int, rows: int, seed: int, num_drafts: int | None
) -> np.ndarray:
    vocab, count = toy.vocab_size, toy.num_drafts if num_drafts is None else num_drafts
    window = count + 1
    base, expert, anti_expert = (torch.tensor(table, dtype=torch.float32) for table in toy.tables())
    keys = noise.row_keys([seed] * rows, range(first, first + rows))
    # Two start symbols, the tokens, and room for a cycle that ends past the last one.
    tokens = torch.full((rows, 2 + toy.length + window), vocab)
    made = torch.zeros(rows, dtype=torch.long)
    active = torch.arange(rows)
    entropy = torch.special.entr(expert.softmax(-1)).sum(-1)  # [contexts]
    row_drafts = torch.full((rows,), count)
    if toy.ragged:
        row_drafts = torch.tensor(np.random.default_rng(seed).integers(0, count + 1, size=rows))
    while len(active):
        batch, start = len(active), made[active]
        seen: Tensor | None = None
        parameters = make_parameters(ops, batch, vocab, toy.settings)
        if "repetition_penalty" in toy.settings:
            column = torch.arange(tokens.shape[1] - 2)
            seen = torch.zeros(batch, vocab + 1, dtype=torch.bool)
            seen.scatter_(1, tokens[active, 2:].masked_fill(column >= start[:, None], vocab), True)
            parameters.seen.copy_(seen[:, :vocab])
        stream = ops.NoiseStream(keys[active], start, start if toy.rule == "block" else None)
        stream.expect(max(count, 1))
        history = tokens[active[:, None], start[:, None] + torch.arange(2)]  # the last two tokens
        drafts = torch.empty(batch, 0, dtype=torch.long)
        laws, contexts = [], []
        goes_on = torch.ones(batch, count + 1, dtype=torch.bool)
        for i in range(window):
            context = toy.context(history[:, 0], history[:, 1])
            contexts.append(context)
            if i == count:
                break
            if toy.stops == "law":
                goes_on[:, i] = entropy[context] < entropy.median()
            if toy.certain:
                token = (history[:, 1:] + 1) % vocab
            else:
                token, law = ops.sample_drafts(expert[context][:, None], parameters, drafts, stream, vocab)
                laws.append(law)
            if toy.stops == "token":
                goes_on[:, i] = token[:, 0] > vocab // 3
            drafts = torch.cat([drafts, token], 1)
            history = torch.cat([history[:, 1:], token], 1)
        draft_law = None
        if laws:
            tau = None if laws[0].tau is None else torch.cat([law.tau for law in laws], 1)
            draft_law = ops.DraftLaw(
                torch.cat([law.logits for law in laws], 1), tau, torch.cat([law.lse for law in laws], 1)
            )
        context = torch.stack(contexts, 1)  # [B, W]
        pair = ops.LogitPair(expert[context], anti_expert[context], torch.ones(batch, window))
        shared = (draft_law, parameters, stream, vocab)
        allowed = row_drafts[active].minimum(goes_on[:, :-1].long().cumprod(-1).sum(-1))
        acceptance = ops.accept_window(toy.rule, base[context], [pair], drafts, allowed, *shared)
        next_token, _ = ops.emit_next_token(toy.rule, base[context], [pair], drafts, acceptance, *shared)
        kept = acceptance.num_accepted
        emitted = torch.cat([drafts, next_token[:, None]], 1).scatter(1, kept[:, None], next_token[:, None])
        # What stands past the kept drafts is overwritten by the next cycle or lies behind the end.
        tokens[active[:, None], 2 + start[:, None] + torch.arange(window)] = emitted
        made[active] = start + kept + 1
        active = active[made[active] < toy.length]
    return tokens[:, 2 : 2 + toy.length].numpy()
