"""`Engine`: requests in, tokens out, at any time and from any thread; one thread of its own runs the decode loop."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from specproxy.config import MAX_DRAFT_TOKENS, SamplingParameters, SpeculationParameters, check_integer
from specproxy.draft import ExpertDrafter
from specproxy.engine.handle import RequestHandle
from specproxy.engine.prefixes import PrefixStore
from specproxy.engine.queue import Queue
from specproxy.engine.requests import Terms, describe, make_request
from specproxy.engine.scheduler import Scheduler
from specproxy.engine.status import EngineStats, Health
from specproxy.errors import ConfigurationError, EngineClosed, EngineFull
from specproxy.graphs import bucket
from specproxy.model import ProxyTunedModel
from specproxy.policy import FixedWindow, WindowPolicy, fixed_tree
from specproxy.rows import assistant_of, check_corpus
from specproxy.runner import position_limit
from specproxy.schedule import AlphaSchedule
from specproxy.state import ASSISTANT
from specproxy.suffix import LookupCorpus
from specproxy.trio import Trio, TrioRunners

__all__ = ["Engine", "EngineStats", "Health"]

_DEFAULT_MODEL_LEN = 4096  # where no model names a limit of its own
_FIRST_CAPACITY = 256  # positions of the caches to begin with; they grow with the texts


@dataclass
class _Shared:
    """What the loop's thread needs. It must not hold the engine itself, so that one nobody uses can go."""

    terms: Terms
    max_batch_size: int
    max_total_tokens: int
    prefill_chunk: int
    prefix_cache: int
    queue: Queue
    is_closing: bool = False  # end everything now
    is_draining: bool = False  # take no more
    failure: str | None = None
    scheduler: Scheduler | None = None  # while the loop runs
    final_stats: EngineStats | None = None  # once it has ended
    thread: threading.Thread | None = None
    idle: threading.Event = field(default_factory=threading.Event)

    @property
    def health(self) -> Health:
        """See `Engine.health`."""
        if self.failure is not None:
            return Health("dead", self.failure)
        return Health("closed" if self.is_closing else "draining" if self.is_draining else "ready")

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        scheduler = self.scheduler
        if scheduler is None:
            return self.final_stats or EngineStats(waiting=len(self.queue), free_rows=self.max_batch_size)
        counts, running = scheduler.counts, len(scheduler.running)
        speculation = counts.speculation
        return EngineStats(
            running=running,
            reading=int(scheduler.reading is not None),
            waiting=len(self.queue),
            free_rows=self.max_batch_size - running,
            kv_usage=scheduler.num_positions / (self.max_batch_size * self.terms.max_model_len),
            cycles=counts.cycles,
            failed_turns=counts.failed_turns,
            prompt_tokens=counts.prompt_tokens,
            reused_tokens=counts.reused_tokens,
            kept_prefixes=len(scheduler.prefixes),
            kept_positions=scheduler.prefixes.positions,
            finished=dict(counts.finished),
            windows=dict(counts.windows),
            speculation=replace(
                speculation,
                accepted_per_position=list(speculation.accepted_per_position),
                drafted_per_position=list(speculation.drafted_per_position),
            ),
        )

    def end(self, reason: str, error: str | None) -> None:
        """Behind the loop: end what is left, and let caches and kept prefixes go."""
        if self.scheduler is not None:
            self.scheduler.end_all(reason, error)
        while (request := self.queue.pop()) is not None:
            request.handle.finish(request.output(reason, error))
        if self.scheduler is not None:
            last = replace(self.stats(), free_rows=self.max_batch_size, kv_usage=0.0, kept_prefixes=0, kept_positions=0)
            self.final_stats, self.scheduler = last, None
        self.idle.set()


class Engine:
    """Continuous batching for a `ProxyTunedModel`: requests join and leave between the cycles of one decode loop.

    A request is a call of `generate` with one row. Its law never depends on its neighbours, nor do its tokens, whoever
    drafts: with a fixed number of drafts under every rule, with "auto" where it is greedy or the rule is "coupled". The
    loop runs in a thread that starts with the first request; until `close` the models belong to it. No reader holds it
    up: tokens that nobody has read yet are kept, at most `max_new_tokens` of each request.

    Args:
        model: what generates.
        max_batch_size: requests that decode together, at most.
        max_model_len: positions of a request, prompt and new tokens together; by default what the models were built
            for. Caches grow with the texts up to `max_batch_size + 1` rows of as many positions.
        max_queue: requests that may wait; `submit` refuses more.
        num_draft_tokens: drafts a cycle, or "auto"; a request may ask for another number, under "auto" for fewer.
        acceptance: "rejection", "block" or "coupled".
        drafter: as in `generate`.
        num_tree_tokens: nodes of a token tree, at most 63, that cycles draft in place of a chain, up to
            `num_draft_tokens` deep, as long as the rule is "coupled" or every request in flight is greedy; beside a
            request that samples under another rule all of them draft chains.
        corpus: texts beside a request's own that lookup may copy from; the model's `corpus` by default. A refused draft
            that was copied from there shows in `Block.refused`.
        prefill_chunk: prompt tokens read between two cycles: fewer hold up the others less.
        prefix_cache: positions of ended requests whose keys and values are kept for prompts that begin alike; 0 reads
            every prompt anew.
        max_total_tokens: positions that the requests in flight may come to take, all together; by default what rows and
            lengths allow.
        cuda_graphs: as in `generate`.

    Raises:
        ConfigurationError: for an unusable value.

    Example:
        >>> with Engine(ProxyTunedModel.demo()) as engine:
        ...     ids = engine.model.tokenizer("Question: What is 3 + 4?\\nAnswer:").input_ids
        ...     output = engine.submit(ids, max_new_tokens=24).result()
        >>> output.finish_reason in ("stop", "length")
        True
    """

    def __init__(
        self,
        model: ProxyTunedModel,
        *,
        max_batch_size: int = 8,
        max_model_len: int | None = None,
        max_queue: int = 256,
        num_draft_tokens: int | Literal["auto"] = 4,
        acceptance: str = "rejection",
        drafter: str | None = None,
        num_tree_tokens: int = 0,
        corpus: LookupCorpus | None = None,
        prefill_chunk: int = 256,
        prefix_cache: int = 4096,
        max_total_tokens: int | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        if not isinstance(model, ProxyTunedModel):
            raise ConfigurationError(f"model={model!r} must be a ProxyTunedModel.")
        if not model._trio.ranks.is_alone:
            raise ConfigurationError(
                "model: its base is sharded over processes, and a request reaches only one; give a base in one piece."
            )
        speculation = SpeculationParameters(num_draft_tokens, acceptance, cuda_graphs, num_tree_tokens, drafter)
        corpus = model.corpus if corpus is None else corpus
        check_corpus(corpus)
        check_integer("max_batch_size", max_batch_size, 1, "at least one request has to decode")
        check_integer("max_queue", max_queue, 1, "at least one request has to wait for the loop")
        check_integer("prefill_chunk", prefill_chunk, 1, "prompts have to be read")
        check_integer("prefix_cache", prefix_cache, 0, "0 keeps nothing")
        named = [*model._trio.position_limits.values()]
        named += [position_limit(assistant_of(model._trio))] if drafter == ASSISTANT else []
        limits = [limit for limit in named if limit is not None]
        if max_model_len is None:
            max_model_len = min(limits, default=_DEFAULT_MODEL_LEN)
        check_integer("max_model_len", max_model_len, 2, "a prompt token and a new one have to fit")
        if limits and max_model_len > min(limits):
            raise ConfigurationError(f"max_model_len={max_model_len} exceeds the {min(limits)} positions of a model.")
        if max_total_tokens is None:
            max_total_tokens = max_batch_size * max_model_len
        check_integer("max_total_tokens", max_total_tokens, 1, "a request has to fit")
        self.model = model
        self.max_model_len = max_model_len
        self._shared = _Shared(
            Terms(model._trio, speculation, max_model_len, corpus),
            max_batch_size,
            max_total_tokens,
            prefill_chunk,
            prefix_cache,
            Queue(max_queue),
        )
        self._numbers = itertools.count()
        self._shared.idle.set()
        self._close = weakref.finalize(self, _stop, self._shared)  # at the interpreter's end too

    # Requests.

    def submit(
        self,
        prompt: Sequence[int] | Tensor,
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParameters | None = None,
        alpha: float | Sequence[float] | None = None,
        alpha_schedule: AlphaSchedule | None = None,
        seed: int | None = None,
        num_draft_tokens: int | None = None,
        role_prompts: dict[str, Sequence[int] | Tensor] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        deadline: float | None = None,
        request_id: str | None = None,
        **arguments: Any,
    ) -> RequestHandle:
        """Put a request in the queue; returns at once.

        With a seed its tokens are those of `model.generate(prompt, seed=...)` with one row and the same arguments.

        Args:
            prompt: token ids, not empty.
            max_new_tokens: 20 by default; 0 only reads the prompt, for `prompt_logprobs`.
            sampling: in place of do_sample, temperature, top_k, top_p, min_p and the penalties.
            alpha: strength of the first pair, or one number per pair; the model's by default.
            alpha_schedule: how the strengths change over the new tokens.
            seed: an integer; without one a sampled text cannot be repeated.
            num_draft_tokens: drafts a cycle for this request, where not the engine's.
            role_prompts: prompts of their own for roles ("expert", "anti_expert"), others read `prompt`.
            eos_token_id: tokens that end it; by default the models'.
            stop_token_ids: further ones.
            ignore_eos: let only `stop_token_ids` end it.
            logprobs: for every new token its logarithm in the combined law (before processors, temperature and
                filters), and those of as many of the likeliest tokens.
            prompt_logprobs: likewise for the prompt's tokens; needs one prompt for all roles.
            deadline: seconds from now after which it ends, wherever it is.
            request_id: its name; made where not given.
            arguments: of `generate` that shape the law or the end of a row: do_sample, temperature, min_new_tokens,
                logits_processor, prefix_allowed_tokens_fn, sequence_bias, grammar, stopping_criteria, ... They run in
                the engine's thread, between others' tokens; what one raises ends this request alone.

        Returns:
            The handle to read from.

        Raises:
            ConfigurationError, PromptError: naming what is not usable.
            EngineFull: the queue has no room.
            EngineClosed: the engine takes no more requests.
        """
        shared, queue = self._shared, self._shared.queue
        self._check_room()  # both before the work of checking arguments, and again behind it
        request = make_request(
            shared.terms,
            next(self._numbers),
            prompt,
            queue.wake,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            alpha=alpha,
            alpha_schedule=alpha_schedule,
            seed=seed,
            num_draft_tokens=num_draft_tokens,
            role_prompts=role_prompts,
            eos_token_id=eos_token_id,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            deadline=deadline,
            request_id=request_id,
            **arguments,
        )
        with queue.changed:
            self._check_room()
            queue.requests.append(request)
            shared.idle.clear()
            if shared.thread is None:
                shared.thread = threading.Thread(target=_run, args=(shared,), name="specproxy-engine", daemon=True)
                shared.thread.start()
            queue.changed.notify_all()
        return request.handle

    def _check_room(self) -> None:
        health = self.health
        if health.state != "ready":
            reason = f" ({health.reason})" if health.reason else ""
            raise EngineClosed(f"the engine is {health.state}{reason} and takes no more requests; make another one.")
        queue = self._shared.queue
        if len(queue) >= queue.size:
            raise EngineFull(f"{len(queue)} requests wait, as many as max_queue={queue.size} allows; try later.")

    # Watching and ending.

    @property
    def health(self) -> Health:
        """How the engine is."""
        return self._shared.health

    @property
    def max_batch_size(self) -> int:
        """Rows that decode together, at most."""
        return self._shared.max_batch_size

    def stats(self) -> EngineStats:
        """What it does and has done."""
        return self._shared.stats()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and finish those that run or wait.

        Args:
            timeout: seconds to wait at most.

        Returns:
            Whether all have ended.
        """
        self._shared.is_draining = True
        return self._shared.idle.wait(timeout)

    def close(self) -> None:
        """Cancel what has not ended, stop the thread and give the models back. May be called again."""
        self._close.detach()  # else whoever collects the engine later, in any thread, would come to wait here too
        _stop(self._shared)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.drain()
        self.close()


def _stop(shared: _Shared) -> None:
    """Let the loop end, and wait for it."""
    shared.is_closing = True
    shared.queue.wake()
    thread = shared.thread
    if thread is not None and thread is not threading.current_thread():
        thread.join()


@contextmanager
def _serving(shared: _Shared) -> Iterator[Scheduler]:
    """Borrow the models, and make what runs the requests; in the thread that runs them."""
    trio, speculation, count = shared.terms.trio, shared.terms.speculation, shared.max_batch_size
    staging = bucket(count, 2 * count)  # a captured cycle runs over a power of two of rows; prompts stand behind them
    capacity = min(shared.terms.max_model_len, _FIRST_CAPACITY)
    with (
        torch.cuda.device(trio.device) if trio.device.type == "cuda" else nullcontext(),
        torch.inference_mode(),
        trio.runners(staging + 1, capacity, speculation.cuda_graphs) as runners,
        _policy(trio, speculation, runners) as policy,
    ):
        shared.scheduler = Scheduler(
            trio,
            runners,
            shared.queue,
            policy=policy,
            has_assistant=speculation.drafter == ASSISTANT,
            rule=speculation.acceptance,
            max_batch_size=count,
            staging=staging,
            max_total_tokens=shared.max_total_tokens,
            prefill_chunk=shared.prefill_chunk,
            prefixes=PrefixStore(shared.prefix_cache),
        )
        yield shared.scheduler


def _policy(
    trio: Trio, speculation: SpeculationParameters, runners: TrioRunners
) -> AbstractContextManager[WindowPolicy]:
    """Who chooses windows: the policy that learns, or what is fixed, as wide as some request in flight wants."""
    if speculation.num_draft_tokens == "auto":
        return trio.policy(speculation.drafter, captured=runners.graphs is not None)
    drafter = speculation.drafter or ExpertDrafter.name
    return nullcontext(FixedWindow(MAX_DRAFT_TOKENS, drafter, fixed_tree(speculation, trio.vocabulary.size)))


def _run(shared: _Shared) -> None:
    """The loop's thread."""
    queue = shared.queue
    reason, failure = "cancelled", None
    try:
        with _serving(shared) as scheduler:
            while not shared.is_closing:
                with queue.changed:
                    if not scheduler.has_work:
                        shared.idle.set()
                        if not shared.is_closing:
                            queue.changed.wait()
                        continue
                scheduler.turn()
    except BaseException as error:
        reason, failure = "error", describe(error)
        with queue.changed:  # from here on nobody enters the queue
            shared.failure = failure
    shared.end(reason, failure and f"the engine's loop has ended: {failure}")
