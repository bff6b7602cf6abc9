"""From the arguments of `submit` to a request: its row, checked, and what the engine needs to know beside it.

A request is a call of `generate` with one row, so its arguments are `generate`'s, and its noise is that of such a call.
Processors and criteria are guarded: what they raise ends their own request alone. Knows nothing of queues or threads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from specproxy.config import MAX_DRAFT_TOKENS, SamplingParameters, SpeculationParameters, check_integer, check_number
from specproxy.engine.handle import Block, RequestHandle, RequestOutput, TokenLogprob
from specproxy.engine.logprobs import token_logprobs
from specproxy.errors import ConfigurationError, PromptError
from specproxy.grammar import GrammarWalk
from specproxy.options import parse_options
from specproxy.processors import RowLaw
from specproxy.rows import check_assistant, check_ids, check_lengths, end_ids, make_row, pair_strengths
from specproxy.schedule import CONSTANT, AlphaSchedule
from specproxy.state import ASSISTANT, BASE, Row
from specproxy.stats import SpeculationStats
from specproxy.suffix import LookupCorpus
from specproxy.trio import Trio
from specproxy_kernels import kernel_path, row_keys

__all__ = ["MAX_LOGPROBS", "Request", "Terms", "describe", "make_request"]

MAX_LOGPROBS = 100
_SAMPLING = tuple(field.name for field in fields(SamplingParameters))
# Arguments of `generate` that mean nothing to one request of an engine, with what to do instead.
_REFUSED = {
    "max_time": "use deadline",
    "stop_strings": "the engine knows token ids alone; use stopping_criteria or stop_token_ids, or cancel the request",
    "tokenizer": "the engine knows token ids alone",
    "num_return_sequences": "submit the prompt as often as needed, each time with a seed of its own",
    "output_scores": "use logprobs",
    "output_logits": "use logprobs",
    "return_dict_in_generate": "result() always gives everything",
    "pad_token_id": "no request is ever padded",
    "streamer": "iterate over the handle",
    "generator": "use seed",
    "generation_config": "give its values as keywords",
    "acceptance": "it belongs to the engine",
    "cuda_graphs": "it belongs to the engine",
    "drafter": "it belongs to the engine",
    "num_tree_tokens": "it belongs to the engine",
    "corpus": "it belongs to the engine",
}


@dataclass(frozen=True)
class Terms:
    """What an engine holds every request to.

    Args:
        trio: the models.
        speculation: how windows are drafted and verified.
        max_model_len: positions of a request, prompt and new tokens together.
        corpus: texts that lookup may copy from.
    """

    trio: Trio
    speculation: SpeculationParameters
    max_model_len: int
    corpus: LookupCorpus | None = None


@dataclass
class Request:
    """A request on its way through the engine.

    Args:
        row: of the decode loop.
        handle: where its tokens go.
        deadline: when it ends at the latest, on the clock of `time.monotonic`.
        logprobs: how many of the likeliest tokens to name for every new token; None for no logarithms at all.
        prompt_logprobs: likewise for the prompt's tokens.
        fault: what its processors have raised last; it counts once the row has failed.
        failure: what one of its criteria has raised.
    """

    row: Row
    handle: RequestHandle
    deadline: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    fault: str | None = None
    failure: str | None = None
    num_sent: int = 0
    num_drafts_told: int = 0
    num_reused_tokens: int = 0
    sent_logprobs: list[TokenLogprob] = field(default_factory=list)
    scored_prompt: list[TokenLogprob | None] = field(default_factory=lambda: [None])

    @property
    def ending(self) -> tuple[str, str | None]:
        """Why its row has ended, and the error where it did so with one."""
        assert self.row.finish_reason is not None
        if self.failure is not None:
            return "error", self.failure
        if self.row.finish_reason == "error":
            return "error", self.fault or self.row.error
        return self.row.finish_reason, None

    @property
    def positions(self) -> int:
        """Of the caches that it may come to take, in the longest role."""
        return max(map(len, self.row.prompts.values())) + self.row.max_new_tokens

    def take_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Of the tokens that came in the last cycle."""
        if self.logprobs is None:
            return None
        logits, self.row.logits = self.row.logits, []
        if not logits:
            return ()
        new = token_logprobs(torch.stack(logits), self.row.tokens[self.num_sent :], self.logprobs)
        self.sent_logprobs += new
        return tuple(new)

    def take_block(self, logprobs: tuple[TokenLogprob, ...] | None) -> Block | None:
        """The tokens that came in the last cycle; None where none did."""
        row, first = self.row, self.num_sent
        assert row.statistics is not None
        if len(row.tokens) == first:
            return None
        num_drafts = row.statistics.num_draft_tokens - self.num_drafts_told
        self.num_sent, self.num_drafts_told = len(row.tokens), row.statistics.num_draft_tokens
        tokens, sources = tuple(row.tokens[first:]), tuple(row.sources[first:])
        return Block(tokens, sources, logprobs, row.drafter, num_drafts, tuple(row.refused))

    def output(self, reason: str, error: str | None = None) -> RequestOutput:
        """What the request has come to."""
        assert self.row.statistics is not None
        self.row.statistics.token_sources = [list(self.row.sources)]
        return RequestOutput(
            request_id=self.handle.request_id,
            tokens=list(self.row.tokens),
            sources=list(self.row.sources),
            finish_reason=reason,
            error=error,
            statistics=self.row.statistics,
            timings=self.handle.timings,
            num_prompt_tokens=len(self.row.prompts[BASE]),
            num_reused_tokens=self.num_reused_tokens,
            logprobs=None if self.logprobs is None else list(self.sent_logprobs),
            prompt_logprobs=None if self.prompt_logprobs is None else list(self.scored_prompt),
        )


def make_request(
    terms: Terms,
    number: int,
    prompt: Sequence[int] | Tensor,
    wake: Callable[[], None],
    *,
    max_new_tokens: int | None = None,
    sampling: SamplingParameters | None = None,
    alpha: float | Sequence[float] | None = None,
    alpha_schedule: AlphaSchedule | None = None,
    seed: int | None = None,
    num_draft_tokens: int | None = None,
    role_prompts: dict[str, Sequence[int] | Tensor] | None = None,
    eos_token_id: Any = None,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    deadline: float | None = None,
    request_id: str | None = None,
    **arguments: Any,
) -> Request:
    """Check the arguments of `Engine.submit`, which documents them; `number` is the request's own in its engine.

    Raises:
        ConfigurationError, PromptError: naming what is not usable.
    """
    trio, max_model_len = terms.trio, terms.max_model_len
    for name, remedy in _REFUSED.items():
        if arguments.get(name) is not None:
            raise ConfigurationError(f"{name}={arguments[name]!r} is not an argument of a request: {remedy}.")
    prompts = _prompts(trio, prompt, role_prompts or {})
    if sampling is not None:
        if not isinstance(sampling, SamplingParameters):
            raise ConfigurationError(f"sampling={sampling!r} must be SamplingParameters.")
        twice = [name for name in _SAMPLING if arguments.get(name) is not None]
        if twice:
            raise ConfigurationError(f"sampling and {', '.join(twice)} were both given; give one of them.")
        arguments |= {name: getattr(sampling, name) for name in _SAMPLING}
        arguments["top_k"] = sampling.top_k or 0  # None would be Transformers' default, which keeps 50
    scores_only = max_new_tokens == 0 and not isinstance(max_new_tokens, bool)
    given = arguments | {"max_new_tokens": 1 if scores_only else max_new_tokens}
    most_drafts = _most_drafts(num_draft_tokens, terms.speculation.num_draft_tokens)
    options = parse_options(given, None, most_drafts, "rejection", None)
    least, most = (0, 0) if scores_only else options.budget(len(prompts[BASE]))
    check_lengths(trio, {role: [ids] for role, ids in prompts.items()}, most)
    longest = max(map(len, prompts.values()))
    if longest + most > max_model_len:
        raise PromptError(
            f"a prompt of {longest} tokens + max_new_tokens={most} exceeds the engine's max_model_len={max_model_len}; "
            f"shorten the prompt or ask for at most {max(max_model_len - longest, 0)} tokens."
        )
    if terms.speculation.drafter == ASSISTANT:
        check_assistant(trio, [prompts[BASE]], most)
    if not isinstance(ignore_eos, bool):
        raise ConfigurationError(f"ignore_eos={ignore_eos!r} must be True or False.")
    if options.law.grammar is not None and (ignore_eos or least):
        raise ConfigurationError(
            "a grammar decides where the text ends; leave ignore_eos, min_new_tokens and min_length out."
        )
    stops = frozenset(check_integer("stop_token_ids", i, 0, "give token ids") for i in stop_token_ids)
    eos = (frozenset() if ignore_eos else end_ids(trio, eos_token_id)) | stops
    if deadline is not None and check_number("deadline", deadline) <= 0:
        raise ConfigurationError(f"deadline={deadline!r} must be above 0 seconds.")
    for name, value in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
        if value is not None and check_integer(name, value, 0, "0 names no other tokens") > MAX_LOGPROBS:
            raise ConfigurationError(f"{name}={value} must be at most {MAX_LOGPROBS}.")
    if prompt_logprobs is not None and any(ids != prompts[BASE] for ids in prompts.values()):
        raise ConfigurationError("prompt_logprobs needs one prompt for all roles; leave role_prompts out.")
    if alpha_schedule is not None and not isinstance(alpha_schedule, AlphaSchedule):
        raise ConfigurationError(f"alpha_schedule={alpha_schedule!r} is no schedule; give an AlphaSchedule.")
    row = make_row(
        trio,
        0,
        prompts,
        replace(options.law, renormalize_logits=None),  # it changes no law
        alphas=pair_strengths(trio, alpha.tolist() if isinstance(alpha, Tensor) else alpha),
        key=_key(seed, options.law.sampling.do_sample),
        min_new_tokens=least,
        max_new_tokens=most,
        eos_token_ids=eos,
        stopping_criteria=options.stopping_criteria,
        schedule=alpha_schedule or CONSTANT,
        corpus=terms.corpus,
    )
    row.index = number
    row.max_draft_tokens = most_drafts
    row.statistics = SpeculationStats(kernels=kernel_path(trio.device))
    row.keeps_logits = logprobs is not None
    handle = RequestHandle(f"request-{number}" if request_id is None else str(request_id), wake)
    until = None if deadline is None else handle.timings.submitted + deadline
    request = Request(row, handle, until, logprobs, prompt_logprobs)
    _guard(request)
    return request


def _prompts(trio: Trio, prompt: Any, role_prompts: dict[str, Any]) -> dict[str, list[int]]:
    """Every role's own ids, checked; those of the base where it has none."""
    for role in role_prompts:
        if role not in trio.models or role == BASE:
            others = ", ".join(name for name in trio.models if name != BASE)
            raise ConfigurationError(f"role_prompts names {role!r}; the prompt is the base's, others are {others}.")
    prompts = {}
    for role in trio.models:
        own = role_prompts.get(role)
        name = "prompt" if own is None else f"role_prompts[{role!r}]"
        ids = _ids(name, prompt if own is None else own)
        check_ids(trio, role, name, ids)
        prompts[role] = ids
    return prompts


def _ids(name: str, value: Any) -> list[int]:
    if isinstance(value, Tensor):
        if value.is_floating_point() or not (value.ndim == 1 or (value.ndim == 2 and len(value) == 1)):
            raise PromptError(f"{name} is a {value.dtype} tensor of shape {list(value.shape)}; give token ids, [S].")
        value = value.flatten().tolist()
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise PromptError(f"{name}={value!r} must be a non-empty sequence of token ids.")
    wrong = next((i for i in value if isinstance(i, bool) or not isinstance(i, int)), None)
    if wrong is not None:
        raise PromptError(f"{name} holds {wrong!r}, which is no token id.")
    return list(value)


def _most_drafts(given: Any, default: int | str) -> int:
    if given is None:
        return default if isinstance(default, int) else MAX_DRAFT_TOKENS
    return check_integer("num_draft_tokens", given, 0, "a request's is a number; automatic choice is the engine's")


def _key(seed: Any, do_sample: bool) -> int:
    """The noise key of a call of one row with this seed; fresh without one."""
    if seed is None:
        return random.SystemRandom().getrandbits(64) - 2**63 if do_sample else 0
    check_integer("seed", seed, -(2**63), "give an integer")
    return int(row_keys([seed], [0])[0])


def _guard(request: Request) -> None:
    """Turn what processors and criteria raise into the end of their own request."""
    row = request.row
    if row.law.processors:
        law = row.law

        def process(prefix: Tensor, scores: Tensor) -> Tensor:
            try:
                return law.process(prefix, scores[0])[None]
            except Exception as error:
                # No token can be drawn here. Where only a draft led here that is refused, nothing has happened.
                request.fault = f"a processor has failed: {describe(error)}"
                return torch.full_like(scores, torch.nan)

        row.law = RowLaw(law.sampling, (process,), law.bans, law.removes_invalid)

    if row.law.grammar is not None:
        row.law = replace(row.law, grammar=_GuardedWalk(request, row.law.grammar))

    def guarded(criterion: Callable[[Tensor, Any], Any]) -> Callable[[Tensor, Any], Any]:
        def stop(prefix: Tensor, scores: Any) -> Any:
            try:
                return torch.as_tensor(criterion(prefix, scores)).all()
            except Exception as error:
                request.failure = f"a stopping criterion has failed: {describe(error)}"
                return True

        return stop

    row.stopping_criteria = [guarded(criterion) for criterion in row.stopping_criteria]


class _GuardedWalk:
    """A walk that allows nothing once its grammar has failed, so that no token can be drawn there."""

    def __init__(self, request: Request, walk: GrammarWalk) -> None:
        self._request, self._walk = request, walk

    def mask(self, tokens: Sequence[int]) -> Tensor:
        """See `GrammarWalk`."""
        try:
            return self._walk.mask(tokens)
        except Exception as error:
            self._request.fault = f"the grammar has failed: {describe(error)}"
            return torch.zeros(0, dtype=torch.int32)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
