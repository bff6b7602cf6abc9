"""Records what `benchmarks/replay.py` replays: decoded texts, and at each token how the expert's candidates stood.

Under greedy decoding and `coupled` sampling the text does not depend on how it is decoded; so one speculative run gives
it, and one plain forward of the expert over it gives every draft that any window would have held on its path.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from benchmarks.replay import Recording
from specproxy import ProxyTunedModel
from specproxy_kernels import gumbel_noise, row_keys
from specproxy_kernels.noise import PURPOSE_TOKEN

__all__ = ["adversarial_model", "record"]


@torch.inference_mode()
def record(
    model: ProxyTunedModel, prompts: list[list[int]], max_new_tokens: int, seed: int | None = None
) -> list[Recording]:
    """Decode each prompt by itself and rank every token among the expert's candidates.

    Args:
        model: the trio.
        prompts: token ids.
        max_new_tokens: of each; rows go on past ends of text, so that all are as long.
        seed: of `coupled` sampling at temperature 1 without filters, counted on from prompt to prompt; None is greedy.
    """
    recordings = []
    for number, prompt in enumerate(prompts):
        input_ids = torch.tensor([prompt], device=model.device)
        law: dict[str, Any] = {}
        if seed is not None:
            law = {"do_sample": True, "top_k": 0, "acceptance": "coupled", "seed": seed + number}
        never = model.vocab_size + max(m.get_output_embeddings().weight.shape[0] for m in (model.base, model.expert))
        output = model.generate(input_ids, max_new_tokens=max_new_tokens, eos_token_id=never, pad_token_id=0, **law)
        assert isinstance(output, Tensor)
        new = output[:, len(prompt) :]  # [1, N]
        logits = model.expert(input_ids=output, use_cache=False).logits[:, len(prompt) - 1 : -1, : model.vocab_size]
        scores = logits.float()
        if seed is not None:
            key = row_keys([seed + number], [0]).to(scores.device)
            index = torch.arange(new.shape[1], device=scores.device)[None]
            scores = scores.double() + gumbel_noise(key, index, PURPOSE_TOKEN, model.vocab_size)
        own = scores.gather(-1, new[..., None])
        ranks = (scores > own).sum(-1)[0]
        recordings.append(Recording(tuple(ranks.tolist()), tuple(prompt), tuple(new[0].tolist())))
    return recordings


def adversarial_model(kind: str) -> ProxyTunedModel:
    """A trio whose expert drafts badly.

    Args:
        kind: "foreign" (the Python base steered by the arithmetic pair, whose expert knows no Python) or "random" (the
            Python base, with a pair of random weights).
    """
    python, sums = ProxyTunedModel.demo("python"), ProxyTunedModel.demo("arithmetic")
    if kind == "foreign":
        return ProxyTunedModel(python.base, sums.expert, sums.anti_expert, python.tokenizer, alpha=0.3)
    torch.manual_seed(0)
    pair = [type(python.expert)(deepcopy(python.expert.config)).eval() for _ in range(2)]
    return ProxyTunedModel(python.base, *pair, python.tokenizer, alpha=0.3)
