"""The few calls into torch.cuda, against a stand-in that keeps their order: what runs without a GPU of code for one."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from specproxy import timing
from specproxy.graphs import Branches, CudaBackend, Graphs
from specproxy.timing import ForwardTimer, can_time_replays

DEVICE = torch.device("cuda", 0)


class Clock:
    """Time passes by one millisecond a mark; work is done where a stream is current."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0.0
        self.capturing = False
        self.marks: list[Any] = []  # of the capture that goes on


class Stream:
    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def wait_stream(self, other: Stream) -> None:
        self.clock.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.clock.log.append(f"wait for {self.name}")


class Event:
    def __init__(self, clock: Clock, external: bool) -> None:
        self.clock, self.external, self.at = clock, external, -1.0

    def record(self) -> None:
        if self.clock.capturing:
            assert self.external, "an event inside a capture that cannot be read"
            self.clock.marks.append(self)
        else:
            self.mark()

    def mark(self) -> None:
        self.clock.now += 1.0
        self.at = self.clock.now

    def query(self) -> bool:
        return self.at >= 0

    def synchronize(self) -> None:
        raise AssertionError("waited for an event that has come")

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


class Graph:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.marks: list[Event] = []

    def capture_begin(self, capture_error_mode: str) -> None:
        self.clock.capturing, self.clock.marks = True, self.marks

    def capture_end(self) -> None:
        self.clock.capturing = False

    def replay(self) -> None:
        self.clock.log.append("replay")
        for event in self.marks:
            event.mark()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = Clock()
    current = [Stream(clock, "main")]

    @contextmanager
    def on(stream: Any) -> Any:
        current.append(stream)
        yield
        current.pop()

    @contextmanager
    def graph(graph: Graph, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        assert pool == "pool" and capture_error_mode == "thread_local"
        with on(stream):
            graph.capture_begin(capture_error_mode)
            yield
            graph.capture_end()

    @contextmanager
    def device(which: Any) -> Any:
        assert which == DEVICE
        yield

    numbers = itertools.count()
    stand_ins = {
        "Stream": lambda *args: Stream(clock, f"side {next(numbers)}"),
        "Event": lambda enable_timing, external=False: Event(clock, external),
        "CUDAGraph": lambda: Graph(clock),
        "stream": on,
        "graph": graph,
        "device": device,
        "current_stream": lambda *args: current[-1],
        "graph_pool_handle": lambda: "pool",
        "is_current_stream_capturing": lambda: clock.capturing,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    can_time_replays.cache_clear()
    yield clock
    can_time_replays.cache_clear()


def test_a_capture_warms_up_on_a_stream_of_its_own_and_replays_report_their_times(clock):
    graphs = Graphs(CudaBackend(DEVICE))
    timer = ForwardTimer("base", DEVICE)
    graphs.timers.append(timer)
    state, capturing = torch.zeros(1), []

    def work() -> torch.Tensor:
        start = timer.begin()
        capturing.append(clock.capturing)
        if not clock.capturing:
            state.add_(1)
        timer.end(start, (2, 5))
        return state

    clock.log.clear()
    assert graphs.run("work", 0, work, changed=[state]) is state
    side = clock.log[0].split(" waits")[0]
    assert clock.log == [f"{side} waits for main", f"main waits for {side}", "replay"]
    assert capturing == [False, False, True]
    assert state.tolist() == [0], "warming up left a trace"
    assert [(time.rows, time.width, time.seconds) for time in timer.take()] == [(2, 5, 1e-3)]
    graphs.run("work", 0, work, changed=[state])
    graphs.run("work", 0, work, changed=[state])
    assert len(capturing) == 3
    assert timer.total == pytest.approx(3e-3), "warming up was counted, or a replay was not"


def test_branches_fork_from_the_current_stream_and_join_it(clock):
    branches = Branches(DEVICE)
    for _ in range(2):
        clock.log.clear()
        names = []
        for _ in range(2):
            with branches.beside():
                names.append(torch.cuda.current_stream().name)
        branches.join()
        assert len(set(names)) == 2 and torch.cuda.current_stream().name == "main"
        assert clock.log == [f"{name} waits for main" for name in names] + [f"main waits for {name}" for name in names]
    with Branches(None).beside():
        assert torch.cuda.current_stream().name == "main"


def test_forwards_outside_of_captures_are_timed_by_events(clock):
    timer = ForwardTimer("expert", DEVICE)
    timer.end(timer.begin())  # a prefill
    timer.end(timer.begin(), (1, 1))
    assert timer.total == pytest.approx(2e-3)
    assert [time.role for time in timer.take()] == ["expert"]
    assert timer.take() == []


def test_where_replays_cannot_be_timed_forwards_inside_go_untimed(clock, monkeypatch):
    def refuse(event: Event, end: Event) -> float:
        raise RuntimeError("not supported")

    monkeypatch.setattr(Event, "elapsed_time", refuse)
    assert not can_time_replays()
    timer = ForwardTimer("base", DEVICE)
    clock.capturing = True
    timer.end(timer.begin(), (1, 1))
    assert timer.take_captured() == []
    assert timing.can_time_replays.cache_info().misses == 1
