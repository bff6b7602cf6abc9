"""Base, expert, anti-expert, the proxy-tuned model and a directly tuned one, on the same problems, greedily.

Knows models, problems and scores, nothing of files or tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specproxy.batches import left_padded
from specproxy.errors import ConfigurationError
from specproxy.model import ProxyTunedModel
from specproxy.problems import Problem
from specproxy.scoring import Scores, difference, proportion, score_answers, share_of_gap

__all__ = ["PROXY_TUNED", "TUNED_BASE", "Answers", "Comparison", "compare"]

BASE, EXPERT, ANTI_EXPERT = "base", "expert", "anti_expert"
PROXY_TUNED, TUNED_BASE = "proxy_tuned", "tuned_base"
SCORINGS = ("strict", "lenient")

#: (input_ids [B, S], attention_mask [B, S]) -> new tokens of every row, and accepted and verified drafts
Decode = Callable[[Tensor, Tensor], tuple[list[list[int]], int, int]]


@dataclass(frozen=True)
class Answers:
    """What one way of decoding wrote.

    Args:
        texts: an answer per problem.
        scores: which are right.
        num_new_tokens, seconds: over all problems; the time of decoding alone.
        acceptance_rate: of drafts, None where there were none.
    """

    texts: list[str]
    scores: Scores
    num_new_tokens: int
    seconds: float
    acceptance_rate: float | None


@dataclass(frozen=True)
class Comparison:
    """Every way's answers to the same problems.

    Args:
        ways: answers by name.
        sweep: the proxy-tuned model's by alpha.
        settings: of the run.
    """

    ways: dict[str, Answers]
    sweep: dict[float, Answers]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Scores, differences and shares of the gap, each with its 95 % interval, ready for JSON."""
        proxy, base, expert = (self.ways[name].scores for name in (PROXY_TUNED, BASE, EXPERT))
        record: dict[str, Any] = {
            "settings": self.settings,
            "ways": {name: _row(answers) for name, answers in self.ways.items()},
            "sweep": {f"{alpha:g}": _row(answers) for alpha, answers in self.sweep.items()},
            "proxy_tuned_over": {
                name: {s: difference(getattr(proxy, s), getattr(other, s)).to_dict() for s in SCORINGS}
                for name, other in ((BASE, base), (EXPERT, expert))
            },
        }
        if TUNED_BASE in self.ways:
            tuned = self.ways[TUNED_BASE].scores
            record["gap_closed"] = {
                name: {
                    s: share_of_gap(getattr(base, s), getattr(own, s), getattr(tuned, s)).to_dict() for s in SCORINGS
                }
                for name, own in ((PROXY_TUNED, proxy), (EXPERT, expert))
            }
        return record


def _row(answers: Answers) -> dict[str, Any]:
    return {
        **{scoring: proportion(getattr(answers.scores, scoring)).to_dict() for scoring in SCORINGS},
        "num_new_tokens": answers.num_new_tokens,
        "seconds": answers.seconds,
        "tokens_per_second": answers.num_new_tokens / answers.seconds,
        "acceptance_rate": answers.acceptance_rate,
    }


def compare(
    model: ProxyTunedModel,
    problems: Sequence[Problem],
    *,
    tuned_base: PreTrainedModel | None = None,
    alphas: Sequence[float] = (),
    max_new_tokens: int = 160,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    alpha: float | None = None,
    num_draft_tokens: int | str = 4,
    acceptance: str = "rejection",
    **drafting: Any,
) -> Comparison:
    """Answer every problem in every way.

    Single models run under Transformers' `generate`, as they would without this package; the proxy-tuned model here.

    Args:
        model: base, expert and anti-expert, with a tokenizer.
        problems: with answers.
        tuned_base: the base tuned directly, of the same tokenizer.
        alphas: strengths of a sweep beside the one that is compared.
        max_new_tokens, batch_size: of every way.
        stop: texts that end an answer.
        alpha, num_draft_tokens, acceptance: of the proxy-tuned model, as in `ProxyTunedModel.generate`.
        drafting: further arguments of it, such as drafter and num_tree_tokens.

    Raises:
        ConfigurationError: no problems, or one without an answer.
    """
    if not problems or any(problem.answer is None for problem in problems):
        raise ConfigurationError("problems must be given, every one with an answer to compare with.")
    shared: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_strings": list(stop) or None, "do_sample": False}
    roles = [role for role in (BASE, EXPERT, ANTI_EXPERT) if role in model._trio.models]
    decoders = {role: _single(model, partial(model._trio.called, role), shared) for role in roles}
    if tuned_base is not None:
        decoders[TUNED_BASE] = _single(model, partial(nullcontext, tuned_base), shared)
    speculation = {"num_draft_tokens": num_draft_tokens, "acceptance": acceptance, **drafting}

    def steered(strength: float) -> Decode:
        return _proxy_tuned(model, shared | speculation | {"alpha": strength})

    strength = model.alpha if alpha is None else alpha
    decoders[PROXY_TUNED] = steered(strength)
    order = [name for name in (BASE, ANTI_EXPERT, EXPERT, PROXY_TUNED, TUNED_BASE) if name in decoders]
    ways = {name: _answers(model, decoders[name], problems, batch_size, stop) for name in order}
    sweep = {
        each: ways[PROXY_TUNED] if each == strength else _answers(model, steered(each), problems, batch_size, stop)
        for each in sorted(set(alphas))
    }
    settings = {"alpha": strength, **speculation, "num_problems": len(problems), "max_new_tokens": max_new_tokens}
    return Comparison(ways, sweep, settings | {"batch_size": batch_size})


def _answers(
    model: ProxyTunedModel, decode: Decode, problems: Sequence[Problem], batch_size: int, stop: Sequence[str]
) -> Answers:
    texts: list[str] = []
    tokens = accepted = drafted = 0
    seconds = 0.0
    for start in range(0, len(problems), batch_size):
        prompts = [model.tokenizer(problem.prompt).input_ids for problem in problems[start : start + batch_size]]
        ids, mask = left_padded(prompts, model.device)
        _synchronise(model)
        began = perf_counter()
        new, batch_accepted, batch_drafted = decode(ids, mask)
        _synchronise(model)
        seconds += perf_counter() - began
        accepted, drafted = accepted + batch_accepted, drafted + batch_drafted
        tokens += sum(map(len, new))
        for row in new:
            text = model.tokenizer.decode(row, skip_special_tokens=True)
            for ending in stop:
                text = text.split(ending)[0]
            texts.append(text)
    scores = score_answers(texts, [problem.answer or "" for problem in problems])
    return Answers(texts, scores, tokens, seconds, accepted / drafted if drafted else None)


def _single(
    model: ProxyTunedModel, borrow: Callable[[], AbstractContextManager[PreTrainedModel]], shared: dict[str, Any]
) -> Decode:
    """One model alone, by Transformers' generate."""
    eos = sorted(model._trio.eos_token_ids())
    pad = model._trio.pad_token_id()
    pad = pad if pad is not None else eos[0] if eos else 0
    arguments = shared | {"tokenizer": model.tokenizer, "eos_token_id": eos or None, "pad_token_id": pad}

    def decode(ids: Tensor, mask: Tensor) -> tuple[list[list[int]], int, int]:
        with torch.inference_mode(), borrow() as one:
            output = one.generate(ids.to(one.device), attention_mask=mask.to(one.device), **arguments)
        rows = output[:, ids.shape[1] :].tolist()
        return [_cut(row, set(eos), pad) for row in rows], 0, 0

    return decode


def _cut(row: list[int], eos: set[int], pad: int) -> list[int]:
    """Up to and with the first end token; behind a stop string there is padding alone."""
    for i, token in enumerate(row):
        if token in eos:
            return row[: i + 1]
    while row and row[-1] == pad:
        row = row[:-1]
    return row


def _proxy_tuned(model: ProxyTunedModel, arguments: dict[str, Any]) -> Decode:
    def decode(ids: Tensor, mask: Tensor) -> tuple[list[list[int]], int, int]:
        output: Any = model.generate(ids, mask, return_dict_in_generate=True, **arguments)
        stats = output.speculation
        lengths = [len(sources) for sources in stats.token_sources]
        rows = output.sequences[:, ids.shape[1] :].tolist()
        new = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        return new, stats.num_accepted_tokens, stats.num_draft_tokens

    return decode


def _synchronise(model: ProxyTunedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
