"""Records what `benchmarks/replay.py` replays: decoded texts, and at each token how the expert's candidates stood.

Under greedy decoding and `coupled` sampling the text does not depend on how it is decoded; so one speculative run gives
it, and one plain forward of the expert over it gives every draft that any window would have held on its path, and the
entropy of the expert's law there. Where the draft is a wrong one, the expert goes on from it as a window would, for the
entropies that an early stop would have seen.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from benchmarks.replay import Recording
from specproxy import ProxyTunedModel
from specproxy.attention import borrowed
from specproxy.draft.entropy import expert_entropy
from specproxy.runner import Runner
from specproxy_kernels import gumbel_noise, row_keys
from specproxy_kernels.noise import PURPOSE_TOKEN

__all__ = ["adversarial_model", "record"]

_BEHIND = 12  # entropies that are recorded behind a wrong draft


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
        logits = model.expert(input_ids=output, use_cache=False).logits[:, len(prompt) - 1 : -1]
        size, places = model.vocab_size, new.shape[1]
        noise: Tensor | None = None  # float64 [1, N + _BEHIND, V]
        if seed is not None:
            key = row_keys([seed + number], [0]).to(output.device)
            index = torch.arange(places + _BEHIND, device=output.device)[None]
            noise = gumbel_noise(key, index, PURPOSE_TOKEN, size).double()
        scores = _scores(logits[0], None if noise is None else noise[0, :places], size)
        ranks = (scores > scores.gather(-1, new[0][:, None])).sum(-1).tolist()
        wrong = [place for place, rank in enumerate(ranks) if rank]
        behind = _entropies_behind(model, prompt, new[0], wrong, scores.argmax(-1), noise)
        recordings.append(
            Recording(
                tuple(ranks),
                tuple(prompt),
                tuple(new[0].tolist()),
                tuple(expert_entropy(logits, size)[0].tolist()),
                tuple(tuple(behind.get(place, ())) for place in range(places)),
            )
        )
    return recordings


def _scores(logits: Tensor, noise: Tensor | None, size: int) -> Tensor:
    """What the expert's candidates are ranked by, [N, V]: its logits, under sampling with the positions' noise."""
    scores = logits[..., :size].float()
    return scores if noise is None else scores.double() + noise


def _entropies_behind(
    model: ProxyTunedModel, prompt: list[int], new: Tensor, wrong: list[int], drafts: Tensor, noise: Tensor | None
) -> dict[int, list[float]]:
    """Entropies of the expert's laws behind each wrong draft, as it goes on from there, by the draft's place.

    Args:
        model: the trio.
        prompt: ids.
        new: int64 [N], the text behind it.
        wrong: places of wrong drafts.
        drafts: int64 [N], the expert's draft at every place.
        noise: [1, N + _BEHIND, V] of the places; None in greedy decoding.
    """
    if not wrong:
        return {}
    runner = Runner(model.expert, "expert", len(wrong))
    tokens, found = drafts[wrong][:, None], []
    with borrowed([model.expert]):
        runner.cache.reserve(len(prompt) + len(new) + _BEHIND + 1)
        runner.prefill(0, [[*prompt, *new[:place].tolist()] for place in wrong])
        for depth in range(_BEHIND):
            logits = runner.forward(tokens, offset=depth)
            found.append(expert_entropy(logits, model.vocab_size))
            there = None if noise is None else noise[0, [place + depth + 1 for place in wrong]]
            tokens = _scores(logits[:, 0], there, model.vocab_size).argmax(-1)[:, None]
    return dict(zip(wrong, torch.cat(found, dim=1).tolist(), strict=True))


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
