"""Two replicas under Ray Serve on one machine: their tokens, their load, and what the death of one costs.

Ray brings some forty packages and starts several processes, so these run in an environment of their own
(`make test-ray`). The folder is not called ray: pytest puts tests/ on the path, and `import ray` would find it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from specproxy import ProxyTunedModel

if importlib.util.find_spec("ray") is None:
    pytest.skip(
        "Ray is not installed: it brings some forty packages; `make test-ray` makes an environment for it",
        allow_module_level=True,
    )

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray gives up on its proxy after three looks of 5 seconds, which a busy machine needs to start it; 60 is its limit.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "20")

import ray
from ray import serve

from specproxy.integrations.ray_serve import build_app
from specproxy.integrations.ray_serve.options import parse_replica_options
from specproxy.integrations.ray_serve.replica import HEADER, Replica, bind

# In float64 greedy tokens are those of per-step decoding, whatever else a replica decodes beside them.
OPTIONS = {"demo": "arithmetic", "dtype": "float64", "num_cpus": 0.5, "health_check_period": 1.0}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
SUM = "Question: What is 347 + 68?\nAnswer:"
LONG = 1200
NEVER = 10**6  # an end id that no model yields


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Ray with its proxy on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        configure_logging=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def pair(address: str) -> Iterator[str]:
    """The address of two replicas."""
    serve.run(build_app(OPTIONS | {"num_replicas": "2"}), name="pair", route_prefix="/pair")
    yield f"{address}/pair"
    serve.delete("pair")


@cache
def expected(prompt: str, count: int, *, ends: bool = True) -> list[int]:
    """New tokens of `generate`, per step and alone."""
    model = ProxyTunedModel.demo("arithmetic", dtype=torch.float64)
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    end = {} if ends else {"eos_token_id": NEVER}
    return model.generate(ids, max_new_tokens=count, num_draft_tokens=0, **end)[0, ids.shape[1] :].tolist()


def body(prompt: str, count: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": count, "temperature": 0, "return_token_ids": True, **fields}


def complete(address: str, prompt: str, count: int) -> tuple[str, list[int]]:
    """Who answered, and the new tokens."""
    response = httpx.post(f"{address}/v1/completions", json=body(prompt, count), timeout=120)
    assert response.status_code == 200, response.text
    return response.headers[HEADER], response.json()["choices"][0]["token_ids"]


class Stream(threading.Thread):
    """A stream of `count` tokens that is read in a thread."""

    def __init__(self, address: str, count: int = LONG) -> None:
        super().__init__(daemon=True)
        self.address, self.count = address, count
        self.replica = ""
        self.chunks: list[list[int]] = []
        self.is_complete = False
        self.first = threading.Event()

    def run(self) -> None:
        """Read until the end, or until it breaks off."""
        long = body(SUM, self.count, stream=True, ignore_eos=True, num_draft_tokens=0)
        try:
            with httpx.stream("POST", f"{self.address}/v1/completions", json=long, timeout=120) as response:
                self.replica = response.headers.get(HEADER, "")
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.is_complete = True
                    elif line.startswith("data: "):
                        content = json.loads(line.removeprefix("data: "))
                        if "choices" not in content:
                            return
                        self.chunks.append(content["choices"][0].get("token_ids", []))
                        if self.tokens:
                            self.first.set()
        except httpx.HTTPError:
            pass
        finally:
            self.first.set()

    @property
    def tokens(self) -> list[int]:
        """Those that have come."""
        return [token for chunk in self.chunks for token in chunk]


def running(address: str, replica: str) -> float:
    """Requests that a replica decodes, by its own figures."""
    while True:
        response = httpx.get(f"{address}/metrics", timeout=60)
        if response.headers[HEADER] == replica:
            lines = response.text.splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith("specproxy:num_requests_running{"))


def replicas(address: str) -> set[str]:
    """Those that answer."""
    return {httpx.get(f"{address}/version", timeout=60).headers[HEADER] for _ in range(16)}


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> float:
    """Until something is so; how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, "waited in vain"
        time.sleep(0.2)
    return time.monotonic() - began


def kill(replica: str) -> None:
    """End a replica's process at once."""
    actors = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["name"].endswith(replica)]
    (actor,) = actors
    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


def test_streams_arrive_while_the_replica_decodes(pair: str) -> None:
    # Ray asks the replica that has less to do: its figures come while it decodes only where the other is as busy.
    streams: list[Stream] = []
    while len({stream.replica for stream in streams}) < 2:
        assert len(streams) < 6, "one replica got every stream"
        streams.append(stream := Stream(pair))
        stream.start()
        assert stream.first.wait(120) and stream.chunks
    assert running(pair, stream.replica) == 1
    for each in streams:
        each.join()
        assert each.is_complete
    assert stream.tokens == expected(SUM, LONG, ends=False)
    assert len(stream.chunks) > LONG // 2  # a chunk a token, but for those that make no text yet
    print(f"\n{LONG} tokens in {len(stream.chunks)} chunks")


def test_requests_are_balanced(pair: str) -> None:
    prompts = [f"Question: What is {300 + i} + {60 + i}?\nAnswer:" for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: complete(pair, prompt, 32), prompts))
    counts = {replica: sum(name == replica for name, _ in answers) for replica, _ in answers}
    print(f"\nanswers by replica: {counts}")
    assert len(counts) == 2
    assert [tokens for _, tokens in answers] == [expected(prompt, 32) for prompt in prompts]


def test_a_killed_replica_is_replaced_and_only_its_own_requests_fail(pair: str) -> None:
    wait_for(lambda: len(replicas(pair)) == 2)
    before = replicas(pair)
    streams = [Stream(pair) for _ in range(6)]
    for stream in streams:
        stream.start()
    for stream in streams:
        assert stream.first.wait(120) and stream.chunks
    assert {stream.replica for stream in streams} == before
    victim = streams[0].replica
    kill(victim)
    for stream in streams:
        stream.join()
    whole = expected(SUM, LONG, ends=False)
    for stream in streams:
        if stream.replica == victim:
            assert not stream.is_complete
            assert stream.tokens == whole[: len(stream.tokens)]
        else:
            assert stream.is_complete and stream.tokens == whole
    seconds = wait_for(lambda: len(replicas(pair) - {victim}) == 2)
    assert complete(pair, SUM, 32)[1] == expected(SUM, 32)
    lost = sum(stream.replica == victim for stream in streams)
    print(
        f"\n{lost} of {len(streams)} streams were the killed replica's; replaced {seconds:.1f} s after the others' end"
    )


def test_a_dead_engine_has_its_replica_replaced(address: str) -> None:
    class Mortal(Replica):
        async def poison(self) -> None:
            def fail() -> None:
                raise RuntimeError("the device is gone")

            self._engine._shared.scheduler.turn = fail  # of the loop, which ends with the next request

    handle = serve.run(bind(Mortal, parse_replica_options(OPTIONS)), name="mortal", route_prefix="/mortal")
    mortal = f"{address}/mortal"
    first, tokens = complete(mortal, SUM, 8)
    handle.poison.remote().result()
    assert httpx.post(f"{mortal}/v1/completions", json=body(SUM, 8), timeout=60).status_code >= 500

    def is_replaced() -> bool:
        response = httpx.get(f"{mortal}/health", timeout=60)
        return response.status_code == 200 and response.headers[HEADER] != first

    seconds = wait_for(is_replaced)
    second, again = complete(mortal, SUM, 8)
    print(f"\nreplaced after {seconds:.1f} s")
    assert second != first and again == tokens == expected(SUM, 8)
    serve.delete("mortal")


def test_a_stopped_application_finishes_what_it_has(address: str) -> None:
    serve.run(build_app(OPTIONS), name="last", route_prefix="/last")
    stream = Stream(f"{address}/last", 200)  # well within drain_timeout
    stream.start()
    assert stream.first.wait(120) and stream.chunks
    serve.delete("last")
    stream.join()
    assert stream.is_complete and stream.tokens == expected(SUM, 200, ends=False)


def test_the_documented_command_serves(tmp_path: Path) -> None:
    """`serve run`, as it is written there, in a Ray of its own: two replicas answer, and Ctrl-C ends all of it."""
    (line,) = [line for line in DOCS.read_text().splitlines() if line.startswith("serve run ")]
    documented = "http://127.0.0.1:8000"
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("port 8000, which the command takes, is in use")
    _, *words = shlex.split(line)
    log = tmp_path / "log.txt"
    began = time.monotonic()
    with log.open("w") as file:
        command = [str(Path(sys.executable).with_name("serve")), *words]
        environment = os.environ | {"RAY_ADDRESS": "local"}
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path, env=environment, start_new_session=True
        )
    try:

        def is_up() -> bool:
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                return httpx.get(f"{documented}/health", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(is_up, 300)
        print(f"\nup after {time.monotonic() - began:.1f} s")
        wait_for(lambda: len(replicas(documented)) == 2)
        answer = httpx.post(f"{documented}/v1/completions", json=body(SUM, 48), timeout=120).json()
        assert answer["choices"][0]["token_ids"] == expected(SUM, 48)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            code = server.wait(120)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
    assert code == 0, log.read_text()[-4000:]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", 8000)) != 0
