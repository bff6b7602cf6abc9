"""Next-token laws to evaluate: one model, or a base steered by an expert minus an anti-expert.

A plain second statement of proxy-tuning (Liu et al., arXiv 2401.08565) for measuring; it knows nothing of tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Law:
    """A sum of logits, one weight for each model."""

    terms: tuple[tuple[float, LlamaForCausalLM], ...]

    @staticmethod
    def of(model: LlamaForCausalLM) -> Law:
        """The law of one model."""
        return Law(((1.0, model),))

    @staticmethod
    def proxy(base: LlamaForCausalLM, expert: LlamaForCausalLM, anti_expert: LlamaForCausalLM, alpha: float) -> Law:
        """The proxy-tuned law: base + alpha (expert - anti-expert)."""
        return Law(((1.0, base), (alpha, expert), (-alpha, anti_expert)))

    def logits(self, **inputs: Any) -> torch.Tensor:
        """Logits [B, S, V] of the law on whole sequences."""
        with torch.inference_mode():
            return sum(weight * model(**inputs, use_cache=False).logits for weight, model in self.terms)

    def greedy(self, prompts: list[list[int]], new_tokens: int, eos: int, pad: int) -> list[list[int]]:
        """Continues prompts greedily.

        Args:
            prompts: Token ids of each prompt; they may differ in length.
            new_tokens: Most tokens to add.
            eos: Id that ends a continuation.
            pad: Id that fills up the left of shorter prompts (masked).

        Returns:
            The continuation of each prompt, without the `eos`.
        """
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        caches: list[Any] = [None] * len(self.terms)
        written: list[torch.Tensor] = []
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        with torch.inference_mode():
            for _ in range(new_tokens):
                positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.size(1) :]
                total: torch.Tensor | float = 0.0
                for index, (weight, model) in enumerate(self.terms):
                    out = model(
                        input_ids=ids,
                        attention_mask=mask,
                        position_ids=positions,
                        past_key_values=caches[index],
                        use_cache=True,
                        logits_to_keep=1,
                    )
                    caches[index] = out.past_key_values
                    total = total + weight * out.logits[:, -1]
                assert isinstance(total, torch.Tensor)
                token = total.argmax(-1)
                written.append(token)
                ended |= token == eos
                if bool(ended.all()):
                    break
                ids = token[:, None]
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        rows = torch.stack(written, dim=1).tolist()
        return [row[: row.index(eos)] if eos in row else row for row in rows]
