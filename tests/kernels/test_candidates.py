"""The best guesses of a tree's nodes: what they are, and the kernels against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.interpreter import quick_interpreter

from specproxy_kernels import (
    NoiseStream,
    WarpParameters,
    gumbel_noise,
    pack_allowed_tokens,
    row_keys,
    sample_candidates,
    warp_law,
)
from specproxy_kernels.noise import PURPOSE_TOKEN
from specproxy_kernels.reference import sample_candidates as reference_candidates
from specproxy_kernels.reference import sample_drafts

BATCH, NODES, DEPTH, COUNT = 3, 4, 2, 5


def settings(name: str, vocab_size: int) -> dict[str, Any]:
    """Parameters of three rows, the first one greedy but for the last setting."""
    generator = torch.Generator().manual_seed(vocab_size)
    seen = torch.rand(BATCH, vocab_size, generator=generator) < 0.2
    allowed = torch.rand(BATCH, DEPTH + 1, vocab_size, generator=generator) < 0.6
    penalty = {"repetition_penalty": torch.tensor([1.3, 1.0, 0.7]), "seen": seen}
    filters = {"top_k": torch.tensor([0, 7, 0]), "top_p": torch.tensor([1.0, 0.9, 0.6])}
    return {
        "temperature": torch.tensor([0.0, 1.3, 0.6]),
        **{
            "plain": {},
            "penalty": penalty,
            "filters": filters,
            "all": penalty | filters | {"min_p": torch.tensor([0.0, 0.05, 0.0])},
            "allowed": {"allowed": pack_allowed_tokens(allowed)},
            "shared ids and bias": {
                "allowed": pack_allowed_tokens(allowed[:1, :1]),
                "logit_bias": torch.randn(1, vocab_size, generator=generator),
            },
            "counts": {
                "counts": seen.int() * 2,
                "frequency_penalty": torch.tensor([0.5, 0.0, 1.0]),
                "presence_penalty": torch.tensor([0.0, 0.7, 0.2]),
            },
            "greedy": {"temperature": torch.zeros(BATCH), "any_sampling": False},
        }[name],
    }


SETTINGS = ("plain", "penalty", "filters", "all", "allowed", "shared ids and bias", "counts", "greedy")


def problem(name: str, vocab_size: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(BATCH, NODES, vocab_size + 3, generator=generator)
    drafts = torch.randint(0, vocab_size, (BATCH, NODES, DEPTH), generator=generator)
    noise = NoiseStream(row_keys([3, 5, 7], [0, 1, 0]), torch.tensor([0, 4, 9]))
    return logits.to(dtype), WarpParameters(**settings(name, vocab_size)), drafts, noise, vocab_size, COUNT


@pytest.mark.parametrize("name", SETTINGS)
def test_candidates_are_the_largest_of_logits_and_noise(name: str) -> None:
    """Node by node, as a chain with that node's own drafts before it."""
    logits, parameters, drafts, noise, vocab_size, _ = problem(name, 60)
    got = reference_candidates(*problem(name, 60))
    gumbel = gumbel_noise(noise.key, noise.start[:, None] + DEPTH, PURPOSE_TOKEN, vocab_size)[:, 0]
    gumbel[parameters.greedy] = 0
    position = torch.full((BATCH, 1), DEPTH)
    for node in range(NODES):
        here = logits[:, node : node + 1]
        law = warp_law(here[..., :vocab_size].float(), parameters, drafts[:, node], position)
        order = (law.kept()[:, 0].double() + gumbel).argsort(-1, descending=True)
        kept = (law.kept()[:, 0] > -torch.inf).sum(-1).clamp(max=COUNT)
        for row in range(BATCH):
            assert got[row, node, : kept[row]].tolist() == order[row, : kept[row]].tolist()
            assert len(set(got[row, node].tolist())) == COUNT
        draft, _ = sample_drafts(here, parameters, drafts[:, node], noise, vocab_size)
        assert got[:, node, 0].tolist() == draft[:, 0].tolist()


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "vocab_size", "dtype"),
    [*((name, 60, torch.float32) for name in SETTINGS), ("plain", 4100, torch.bfloat16), ("all", 300, torch.float64)],
)
def test_kernels_equal_the_reference(
    name: str, vocab_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    want = reference_candidates(*problem(name, vocab_size, dtype))
    monkeypatch.setenv("SPECPROXY_KERNELS", "triton")
    with quick_interpreter():
        got = sample_candidates(*problem(name, vocab_size, dtype))
    logits, parameters, drafts, *_ = problem(name, vocab_size, dtype)
    wide = logits[..., :vocab_size].to(torch.promote_types(dtype, torch.float32))
    law = warp_law(wide, parameters, drafts, torch.full((BATCH, NODES), DEPTH))
    is_kept = law.kept().gather(-1, want) > -torch.inf  # behind those, which ids follow is nobody's business
    assert got.masked_fill(~is_kept, 0).tolist() == want.masked_fill(~is_kept, 0).tolist()
    assert is_kept.any(-1).all()


def test_noise_of_a_position_is_the_window_s() -> None:
    noise = NoiseStream(row_keys([3, 5], [0, 0]), torch.tensor([2, 8]))
    fresh = noise.at(torch.tensor([1, 3]), 3).tokens(1, 50)
    drawn = noise.tokens(4, 50)
    assert torch.equal(fresh[:, 0], torch.stack([drawn[0, 1], drawn[1, 3]]))
    assert torch.equal(noise.at(torch.tensor([1, 3]), 3).tokens(1, 50), fresh)
    further = noise.at(torch.tensor([5, 0]), 5).next_token(torch.tensor([0, 0]), "coupled", 1, 50)
    assert torch.equal(further, gumbel_noise(noise.key, torch.tensor([[7], [8]]), PURPOSE_TOKEN, 50)[:, 0])
