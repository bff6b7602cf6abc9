"""The engine's loop, one turn at a time: end what is to end, read prompts in pieces, run a cycle, hand out tokens.

Rows in flight stand in the leading slots of the caches, dense, as the decode loop wants them. One prompt at a time is
read into a slot of its own behind them all, at most `prefill_chunk` tokens a turn, so that a long one holds nobody up;
once read it is copied behind the rows in flight. One thread runs the turns and touches nothing but this; what it shares
with others are the queue and the handles.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from time import monotonic

import torch

from specproxy.decode import evict_finished, step
from specproxy.engine.prefixes import PrefixStore
from specproxy.engine.prompts import PromptReader, Reading
from specproxy.engine.queue import Queue
from specproxy.engine.requests import Request, describe
from specproxy.engine.windows import RowWindows
from specproxy.policy import WindowPolicy
from specproxy.state import BASE, FINISHED, DecodeState, Row
from specproxy.stats import SpeculationStats
from specproxy.trio import Trio, TrioRunners
from specproxy_kernels import kernel_path

__all__ = ["Counts", "Queue", "Scheduler"]

_MAX_FAULTS = 3  # cycles, or prompts, that may fail in a row before the loop gives up


@dataclass
class Counts:
    """What the loop has done so far.

    Args:
        cycles: of the decode loop.
        failed_turns: cycles and prefills that broke off with an exception.
        prompt_tokens: of the base's prompts, of all requests begun.
        reused_tokens: those of them whose keys and values were copied.
        finished: requests by the reason of their end.
        windows: cycles by their number of drafts.
        speculation: counts over all requests.
    """

    cycles: int = 0
    failed_turns: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    windows: Counter[int] = field(default_factory=Counter)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)


class Scheduler:
    """Runs requests through the rows of one decode state.

    Args:
        trio: the models.
        runners: theirs, with at least `staging` + 1 rows.
        queue: where requests come from.
        policy: chooses windows, within what some row in flight wants.
        has_assistant: whether the assistant may draft.
        rule: acceptance rule.
        max_batch_size: rows in flight at most.
        staging: the slot in which prompts are read, behind every slot that a cycle may touch.
        max_total_tokens: positions that the requests in flight may come to take, all together.
        prefill_chunk: prompt tokens read between two cycles.
        prefixes: keys and values of earlier requests.
    """

    def __init__(
        self,
        trio: Trio,
        runners: TrioRunners,
        queue: Queue,
        *,
        policy: WindowPolicy,
        has_assistant: bool,
        rule: str,
        max_batch_size: int,
        staging: int,
        max_total_tokens: int,
        prefill_chunk: int,
        prefixes: PrefixStore,
    ) -> None:
        self.runners, self.queue, self.prefixes = runners, queue, prefixes
        self.max_batch_size = max_batch_size
        self.max_total_tokens, self.prefill_chunk = max_total_tokens, prefill_chunk
        self.state = DecodeState(
            runners.max_rows,
            trio.device,
            trio.vocabulary.size,
            trio.vocabulary.allowed,
            rule,
            tuple(trio.models),
            buffers=runners.state_buffers,
        )
        self.counts = Counts(speculation=SpeculationStats(kernels=kernel_path(trio.device)))
        self.running: dict[int, Request] = {}  # by the number of their row
        self._prompts = PromptReader(runners, self.state, staging, prefixes, has_assistant)
        self._policy = RowWindows(policy, self.counts.windows, self.state)
        self._faults = Counter[str]()  # in a row, over prompts and in cycles

    @property
    def reading(self) -> Reading | None:
        """The request whose prompt is being read."""
        return self._prompts.reading

    @property
    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self.running or self.reading or self.queue)

    @property
    def num_positions(self) -> int:
        """Of the base's cache that are taken."""
        return sum(self.runners.base.cache.host_lengths)

    def turn(self) -> None:
        """End what is to end, read prompts, run one cycle, hand out its tokens.

        Raises:
            Exception: the loop cannot go on; what its requests have been told is up to the caller.
        """
        self._end_unwanted()
        self._read_prompts()
        if self.state.rows:
            self._run_cycle()

    # Ends.

    def _end_unwanted(self) -> None:
        """Take out what has been cancelled or is too late, waiting requests among them."""
        now = monotonic()
        with self.queue.changed:
            waiting = list(self.queue.requests)
        late = [(request, reason) for request in waiting if (reason := _unwanted(request, now))]
        if late:
            self.queue.take({request.row.index for request, _ in late})
        for request, reason in late:
            self._finish(request, reason)
        if self.reading is not None and (reason := _unwanted(self.reading.request, now)):
            self._drop_reading(reason)
        leaving = [request for request in self.running.values() if (reason := _unwanted(request, now))]
        if leaving:
            for request in leaving:
                request.row.finish_reason = _unwanted(request, now)
            evict_finished(self.state, self.runners)
            for request in leaving:
                self._finish(request, str(request.row.finish_reason))

    def _finish(self, request: Request, reason: str, error: str | None = None) -> None:
        self.running.pop(request.row.index, None)
        self.counts.finished[reason] += 1
        request.handle.finish(request.output(reason, error))

    def end_all(self, reason: str, error: str | None) -> None:
        """End every request that has begun; the loop runs no more."""
        for request in [*self.running.values(), *([self.reading.request] if self.reading else [])]:
            self._finish(request, reason, error)
        self._prompts.reading = None

    # Prompts.

    def _read_prompts(self) -> None:
        """Read prompts, the oldest first, and admit those that have been read."""
        budget = self.prefill_chunk
        while budget > 0:
            if self.reading is None and not self._begin_reading():
                return
            assert self.reading is not None
            request = self.reading.request
            try:
                budget -= self._prompts.read(budget)
                if self.reading.is_done:
                    self._prompts.reading = None
                    self._admit(request)
                self._faults["prompt"] = 0
            except Exception as error:
                self._drop_reading("error", f"its prompt could not be read: {describe(error)}", request)
                self._count_fault("prompt", error)

    def _begin_reading(self) -> bool:
        """Give the oldest waiting request the slot for prompts, where there is a row for it."""
        if len(self.state) >= self.max_batch_size:
            return False
        with self.queue.changed:
            if not self.queue.requests:
                return False
            taken = sum(request.positions for request in self.running.values())
            if taken and taken + self.queue.requests[0].positions > self.max_total_tokens:
                return False
            request = self.queue.requests.popleft()
        request.handle.timings.started = monotonic()
        try:
            self._prompts.begin(request)
        except Exception as error:
            self._drop_reading("error", f"its prompt could not be read: {describe(error)}", request)
            self._count_fault("prompt", error)
            return self._begin_reading()
        self.counts.prompt_tokens += len(request.row.prompts[BASE])
        self.counts.reused_tokens += request.num_reused_tokens
        return True

    def _admit(self, request: Request) -> None:
        """Move a prompt that has been read behind the rows in flight."""
        row = request.row
        if row.remaining == 0:
            self._prompts.empty()
            self._finish(request, "length")
            return
        self._prompts.move(row)
        self._prompts.empty()
        self.running[row.index] = request
        self.state.admit([row])

    def _drop_reading(self, reason: str, error: str | None = None, request: Request | None = None) -> None:
        """End the request whose prompt is being read, or has just been."""
        if self.reading is not None:
            request, self._prompts.reading = self.reading.request, None
        assert request is not None
        self._prompts.empty(clears=True)
        if any(row is request.row for row in self.state.rows):
            request.row.finish_reason = reason
            self._recover()
        self._finish(request, reason, error)

    # Cycles.

    def _run_cycle(self) -> None:
        before = self._progress()
        try:
            rows = step(self.state, self.runners, self._policy, self.counts.speculation, self._retain)
        except Exception as error:
            self._end_after_fault(error, is_settled=self._progress() != before)
            self._count_fault("cycle", error)
            return
        self._faults["cycle"] = 0
        self.counts.cycles += 1
        for row in rows:
            self._deliver(self.running[row.index])
        evict_finished(self.state, self.runners)  # whoever could not be delivered to

    def _retain(self, row: Row, slot: int) -> None:
        if row.finish_reason in FINISHED:
            self._prompts.keep(row, slot)

    def _deliver(self, request: Request) -> None:
        """Hand a row's new tokens out, and its end where it has come."""
        row, logprobs = request.row, None
        try:
            logprobs = request.take_logprobs()
        except Exception as error:
            row.finish_reason, request.failure = "error", f"its logprobs could not be made: {describe(error)}"
        block = request.take_block(logprobs)
        if block is not None:
            request.handle.put(block)
        if row.finish_reason is not None:
            self._finish(request, *request.ending)

    # Faults.

    def _progress(self) -> tuple[int, ...]:
        """What settling a cycle changes on the host, and nothing else does."""
        return (*self.runners.base.cache.host_lengths, sum(len(row.tokens) for row in self.state.rows))

    def _end_after_fault(self, error: Exception, is_settled: bool) -> None:
        """Choose who ends with a cycle that broke off.

        Until a cycle is settled the host still knows every row as it was. So where memory has run out, the row that
        came last is given up and the others go on; after anything else none of the rows can be trusted.
        """
        if _is_out_of_memory(error) and not is_settled:
            requests = [max(self.running.values(), key=lambda request: request.row.index)]
            message = "memory ran out during a cycle, and this request was the last to come"
        else:
            requests = list(self.running.values())
            message = "a cycle has failed"
        for request in requests:
            request.row.finish_reason = "error"
        self._recover()
        for request in requests:
            self._finish(request, "error", f"{message}: {describe(error)}")

    def _recover(self) -> None:
        """Bring caches and state back to what the host knows, and take out the rows that have ended."""
        if self.runners.graphs is not None:
            self.runners.graphs.clear()
        for runner in self.runners:
            runner.cache.set_lengths(0, runner.cache.host_lengths[: len(self.state)])
        self.runners.assistant_rows = []  # it may have stopped anywhere: it reads the rows anew
        self.state.reload()
        evict_finished(self.state, self.runners)

    def _count_fault(self, place: str, error: Exception) -> None:
        """Give the loop up where nothing but faults comes; lack of memory is over once requests have gone."""
        self.counts.failed_turns += 1
        if not _is_out_of_memory(error):
            self._faults[place] += 1
        if self._faults[place] >= _MAX_FAULTS:
            raise error


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, on a device or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _unwanted(request: Request, now: float) -> str | None:
    """Why a request is to end before its text does."""
    if request.handle.is_cancelled:
        return "cancelled"
    return "deadline" if request.deadline is not None and now >= request.deadline else None
