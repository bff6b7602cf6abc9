"""The whole `generate()` with the Triton kernels forced onto CPU tensors (interpreted): the reference's tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from kernels.interpreter import quick_interpreter
from support import PAD, FavourOdd, role_prompts
from toy_grammar import END, Steps

from specproxy import ProxyTunedModel

pytest.importorskip("triton", reason="Triton is published for Linux on x86-64 and ARM alone")

# The interpreter computes inf - inf where a compiled kernel does; numpy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")

PROMPTS = role_prompts([3, 9, 1], seed=31)


LAWS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "greedy with a penalty": {"do_sample": False, "repetition_penalty": 1.4},
    "plain": {"top_k": 0},
    "top-k": {"top_k": 5, "temperature": 1.3},
    "top-p": {"top_k": 0, "top_p": 0.8},
    "min-p": {"top_k": 0, "min_p": 0.1},
    "all": {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "temperature": 1.2, "repetition_penalty": 1.3},
    "banned": {"top_k": 0, "suppress_tokens": [1, 5, 8], "min_new_tokens": 4, "eos_token_id": 3},
    "grammar": {"top_k": 12, "grammar": Steps(), "eos_token_id": END},
    "processor": {"top_k": 6, "logits_processor": [FavourOdd()]},
}


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    return ProxyTunedModel(*tiny.shared_trio("llama").models)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with quick_interpreter():
        yield


def run(model: ProxyTunedModel, monkeypatch: pytest.MonkeyPatch, path: str, **settings: Any) -> Any:
    monkeypatch.setenv("SPECPROXY_KERNELS", path)
    return model.generate(
        **PROMPTS.kwargs(),
        **{"do_sample": True, "max_new_tokens": 9, "seed": 4, "num_draft_tokens": 3, **settings},
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize(
    ("rule", "law"),
    [*(("rejection", law) for law in LAWS), *itertools.product(("block", "coupled"), ("plain", "all", "processor"))],
)
def test_forced_kernels_give_the_tokens_of_the_reference(model, monkeypatch, rule, law):
    expected = run(model, monkeypatch, "torch", acceptance=rule, **LAWS[law])
    got = run(model, monkeypatch, "triton", acceptance=rule, **LAWS[law])
    assert (expected.speculation.kernels, got.speculation.kernels) == ("torch", "triton")
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert got.speculation.token_sources == expected.speculation.token_sources
    assert got.speculation.num_draft_tokens > 0


@pytest.mark.parametrize(
    "law",
    ["plain", *(pytest.param(law, marks=pytest.mark.slow) for law in ("greedy with a penalty", "all", "processor"))],
)
def test_forced_kernels_walk_trees_like_the_reference(model, monkeypatch, law):
    settings = {"acceptance": "coupled", "num_tree_tokens": 5, "max_new_tokens": 4, **LAWS[law]}
    expected = run(model, monkeypatch, "torch", **settings)
    got = run(model, monkeypatch, "triton", **settings)
    assert (expected.speculation.kernels, got.speculation.kernels) == ("torch", "triton")
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert got.speculation.token_sources == expected.speculation.token_sources
    assert got.speculation.num_accepted_tokens > 0


def test_per_step_and_mixed_rows(model, monkeypatch):
    """W = 1, and a batch in which alpha differs by row."""
    settings = {"num_draft_tokens": 0, "alpha": [0.5, 1.0, 1.5]}
    expected = run(model, monkeypatch, "torch", **settings)
    assert run(model, monkeypatch, "triton", **settings).sequences.tolist() == expected.sequences.tolist()


def test_unknown_path_is_refused(model, monkeypatch):
    with pytest.raises(ValueError, match="SPECPROXY_KERNELS='cuda' is not known"):
        run(model, monkeypatch, "cuda")
