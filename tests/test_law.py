"""Sampling through the real models, caches and decode loop follows the exact joint law of plain proxy-tuning.

Two prompts of unequal length share every batch, each role reads its own, and three tokens cross a cycle boundary. The
law is the oracle's, with Transformers' own processors; false alarms and power are those of `chi_square`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from chi_square import LEVEL, p_value, power

from specproxy import ProxyTunedModel

VOCAB = 3
TOKENS = 3
ROWS = 4096  # per call, half of them for either prompt
ALPHA = 1.3
PROMPTS = {
    "base": ([2, 1, 0, 1, 1], [2, 0]),
    "expert": ([0, 2], [1, 2, 0, 1, 1, 0, 2]),
    "anti_expert": ([0], [2, 2, 1]),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "all": {"temperature": 1.4, "top_k": 2, "top_p": 0.97, "min_p": 0.02, "repetition_penalty": 1.3},
}


def trio() -> tiny.Trio:
    """Three ids, and a pair tuned far enough apart that drafts are refused often."""
    return tiny.make_trio("llama", seed=7, vocab_sizes=(VOCAB,) * 3, tuning=0.6, drift=0.6)


def joint_law(models: Any, settings: dict[str, Any]) -> np.ndarray:
    """The exact law of (prompt, first tokens after it), both prompts equally often: [2] + [V] * TOKENS."""
    return np.stack([_law_after(models, index, settings) for index in (0, 1)]) / 2


def _law_after(models: Any, index: int, settings: dict[str, Any]) -> np.ndarray:
    law = np.zeros((VOCAB,) * TOKENS)
    own = {name: prompts[index] for name, prompts in PROMPTS.items()}

    def extend(tokens: tuple[int, ...], weight: float) -> None:
        following = oracle.target_law(
            models,
            own["base"],
            tokens,
            expert_prompt=own["expert"],
            anti_expert_prompt=own["anti_expert"],
            alpha=ALPHA,
            **settings,
        ).numpy()
        for token in np.flatnonzero(following):
            if len(tokens) + 1 == TOKENS:
                law[(*tokens, token)] = weight * following[token]
            else:
                extend((*tokens, int(token)), weight * following[token])

    extend((), 1.0)
    return law


def draw(models: Any, calls: int, **settings: Any) -> tuple[np.ndarray, float]:
    """Draws [N, 1 + TOKENS] of (prompt, new tokens), and the acceptance rate."""
    arguments: dict[str, torch.Tensor] = {}
    for name, prompts in PROMPTS.items():
        ids, mask = tiny.left_pad(list(prompts))
        prefix = "" if name == "base" else f"{name}_"
        arguments[f"{prefix}input_ids"] = ids.repeat(ROWS // 2, 1)
        arguments[f"{prefix}attention_mask"] = mask.repeat(ROWS // 2, 1)
    which = torch.arange(ROWS)[:, None] % 2
    model = ProxyTunedModel(*models, alpha=ALPHA)
    new, accepted, drafted = [], 0, 0
    for seed in range(calls):
        output = model.generate(
            **arguments,
            max_new_tokens=TOKENS + 1,
            do_sample=True,
            seed=seed,
            return_dict_in_generate=True,
            **settings,
        )
        new.append(torch.cat([which, output.sequences[:, 5 : 5 + TOKENS]], dim=1))
        accepted += output.speculation.num_accepted_tokens
        drafted += output.speculation.num_draft_tokens
    return torch.cat(new).numpy(), accepted / max(drafted, 1)


def check(rule: str, num_draft_tokens: int, setting: str, calls: int) -> None:
    models = trio().models
    settings = SETTINGS[setting]
    new, acceptance = draw(models, calls, acceptance=rule, num_draft_tokens=num_draft_tokens, **settings)
    if num_draft_tokens:
        assert 0.1 < acceptance < 0.9
    law = joint_law(models, settings)
    assert law.sum() == pytest.approx(1.0)
    assert p_value(new, law) > LEVEL


def test_joint_law():
    check("rejection", 2, "all", calls=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "num_draft_tokens", "setting"),
    [
        ("rejection", 1, "plain"),
        ("rejection", 3, "all"),
        ("block", 2, "plain"),
        ("block", 3, "all"),
        ("coupled", 0, "plain"),
        ("coupled", 2, "all"),
    ],
)
def test_joint_law_with_power(rule, num_draft_tokens, setting):
    assert power(30 * ROWS, 2 * VOCAB**TOKENS, 0.02) > 0.999
    check(rule, num_draft_tokens, setting, calls=30)


def test_a_wrong_law_is_noticed():
    """The law with the prompts exchanged, and tokens drawn without the pair, both fail."""
    models = trio().models
    law = joint_law(models, SETTINGS["plain"])
    right, _ = draw(models, 1, num_draft_tokens=2, **SETTINGS["plain"])
    wrong, _ = draw((models[0], models[2], models[2]), 1, num_draft_tokens=2, **SETTINGS["plain"])
    assert p_value(right, law) > LEVEL
    assert p_value(right, law[::-1]) < LEVEL
    assert p_value(wrong, law) < LEVEL
