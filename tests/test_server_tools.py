"""The command itself as a process, and tools that know nothing of this project: lm-eval, schemathesis, guidellm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import application, counted, listening, wait_for

from specproxy import ProxyTunedModel, demo

ROOT = Path(__file__).parents[1]
GUIDELLM = ROOT / ".venv-guidellm" / "bin" / "guidellm"
PROMPTS = demo.example_prompts("arithmetic")
RATES, REQUESTS = 4, 12
DEMO = "specproxy-arithmetic"


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str, list[dict[str, Any]]]]:
    """`specproxy serve` on a free port: the process, its address, and its log as it grows."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "specproxy", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        log: list[dict[str, Any]] = []
        try:
            for line in server.stderr:
                if line.startswith("{"):
                    log.append(json.loads(line))
                    if log[-1]["event"] == "listening":
                        break
            assert log, "the server ended before it listened"
            address = f"http://127.0.0.1:{log[-1]['port']}"
            wait_for(lambda: _answers(address))
            yield server, address, log
            log += [json.loads(line) for line in server.stderr if line.startswith("{")]
        finally:
            if server.poll() is None:
                server.kill()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_sigterm_lets_requests_finish_and_exits_with_0():
    """What runs and waits is finished, what comes later is refused, and the process ends by itself."""
    body = {"prompt": PROMPTS[0], "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}
    with process("--max-batch-size", "1", "--drain-timeout", "600") as (server, address, log):
        with httpx.Client(base_url=address, timeout=120) as client:
            text, late = [], None
            with client.stream("POST", "/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    text.append(line)
                    if len(text) == 1:
                        server.send_signal(signal.SIGTERM)
                        wait_for(lambda: httpx.get(f"{address}/health").status_code == 503)
                        late = httpx.post(f"{address}/v1/completions", json={"prompt": "a"})
        assert late is not None and late.status_code == 503
        chunks = [json.loads(line.removeprefix("data: ")) for line in text if line.startswith("data: {")]
        assert text[-2:] == ["data: [DONE]", ""] and chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait(60) == 0
    own = [line["event"] for line in log if line["logger"] == "specproxy.server" and line["event"] != "request"]
    assert own == ["listening", "draining", "drained"]
    ended = [line for line in log if line["event"] == "request" and line["path"] == "/v1/completions"]
    assert {line["status"] for line in ended} == {200, 503}


def test_a_command_that_cannot_serve_says_why():
    for options, word in ((["--port", "70000"], "--port=70000"), (["--log-level", "loud"], "--log-level=loud")):
        command = [sys.executable, "-m", "specproxy", "serve", *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and word in done.stderr


# lm-eval.

_GENERATE = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n\\n", "Question:"]
  max_gen_toks: 40
metric_list:
  - metric: exact_match
"""
_CHOOSE = """
task: choices
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" 85", " 9", " the rest"]
target_delimiter: ""
doc_to_target: 0
metric_list:
  - metric: acc
"""


def run_lm_eval(folder: Path, address: str) -> dict[str, list[dict[str, Any]]]:
    """Both kinds of task through lm-eval's command; samples by task."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"question": prompt, "answer": "85"}) + "\n" for prompt in PROMPTS))
    for name, template in (("sums", _GENERATE), ("choices", _CHOOSE)):
        (folder / f"{name}.yaml").write_text(template.format(data=data))
    settings = {
        "model": DEMO,
        "base_url": f"{address}/v1/completions",
        "tokenizer": demo.folders("arithmetic")["tokenizer"],
        "num_concurrent": 2,
        "max_length": 2048,
    }
    arguments = ",".join(f"{name}={value}" for name, value in settings.items())
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "sums,choices", "--include_path", str(folder), "--log_samples"]
    command += ["--output_path", str(folder / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name in ("sums", "choices"):
        (path,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        found[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


@pytest.mark.slow
def test_lm_eval_local_completions(tmp_path):
    """Generated texts are those of `generate`; log-likelihoods those of one plain forward."""
    pytest.importorskip("lm_eval", reason="pip install 'specproxy[eval]'")
    reference = ProxyTunedModel.demo()
    tokenizer = reference.tokenizer
    with process("--served-model-name", DEMO) as (server, address, _):
        samples = run_lm_eval(tmp_path, address)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    for sample in samples["sums"]:
        ids = tokenizer(sample["doc"]["question"], return_tensors="pt").input_ids
        tokens = reference.generate(ids, max_new_tokens=40, num_draft_tokens=0)[0, ids.shape[1] :]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        for stop in ("\n\n", "Question:"):
            text = text.split(stop)[0]
        assert sample["resps"][0][0] == text
    assert len(samples["choices"]) == len(PROMPTS)
    for sample in samples["choices"]:
        for choice, response in zip((" 85", " 9", " the rest"), sample["resps"], strict=True):
            context = tokenizer(sample["doc"]["question"]).input_ids
            whole = tokenizer(sample["doc"]["question"] + choice).input_ids
            law = reference.forward(torch.tensor([whole])).logits[0].detach().log_softmax(-1)
            steps = range(len(context), len(whole))
            expected = sum(float(law[t - 1, whole[t]]) for t in steps)
            assert float(response[0][0]) == pytest.approx(expected, abs=1e-4)
            is_greedy = all(int(law[t - 1].argmax()) == whole[t] for t in steps)
            assert str(response[0][1]) == str(is_greedy)


# schemathesis.


def run_schemathesis(address: str, examples: int, phases: str) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--phases", phases, "--max-examples", str(examples)]
    command += ["--seed", "1", "--suppress-health-check", "all", "--generation-database", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_schemathesis_finds_no_server_error():
    pytest.importorskip("schemathesis")
    with application() as app, listening(app) as address:
        run_schemathesis(address, 5, "examples,fuzzing")


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_in_many_examples():
    pytest.importorskip("schemathesis")
    with application() as app, listening(app) as address:
        run_schemathesis(address, 200, "examples,coverage,fuzzing,stateful")


# guidellm.


@pytest.mark.slow
@pytest.mark.skipif(
    not GUIDELLM.exists(), reason="guidellm pins an older click: scripts/guidellm_environment.sh makes its environment"
)
def test_guidellm_sweeps(tmp_path):
    """Every rate of a sweep, streamed: nothing fails, and both sides count the same requests and tokens."""
    data, report = tmp_path / "prompts.jsonl", tmp_path / "report.json"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS * REQUESTS))
    tokenizer = demo.folders("arithmetic")["tokenizer"]
    with process("--served-model-name", DEMO) as (server, address, _):
        command = [str(GUIDELLM), "run", "--disable-progress"]
        backend = f"kind=openai_http,target={address},model={DEMO},request_format=/v1/completions,max_tokens=48"
        command += ["--backend", backend, "--tokenizer", f"kind=huggingface_auto,model={tokenizer}"]
        command += ["--profile", f"kind=sweep,sweep_size={RATES}"]
        command += ["--constraint", f"kind=max_requests,count={REQUESTS}"]
        command += ["--data", f"kind=json_file,path={data}", "--output", f"kind=json,path={report}"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        metrics = httpx.get(f"{address}/metrics").text
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
    benchmarks = json.loads(report.read_text())["benchmarks"]
    kinds = [benchmark["config"]["strategy"]["type_"] for benchmark in benchmarks]
    assert kinds == ["synchronous", "throughput", *["constant"] * (RATES - 2)]
    assert counted(metrics, "request_success_total") == RATES * REQUESTS
    requests, tokens = 0, 0.0
    for kind, benchmark in zip(kinds, benchmarks, strict=True):
        figures = benchmark["metrics"]
        totals = figures["request_totals"]
        # On a busy machine guidellm 0.8.1 loses the report of a rate's last request: its collector stops at an idle
        # moment once the count is full, whether or not that report has reached it. The server's counts are exact.
        assert totals["successful"] in (REQUESTS - 1, REQUESTS)
        assert totals["errored"] == totals["incomplete"] == 0
        requests += totals["successful"]
        tokens += figures["output_token_count"]["successful"]["total_sum"]
        rate, first, latency = (
            figures[name]["successful"]["mean"]
            for name in ("requests_per_second", "time_to_first_token_ms", "request_latency")
        )
        assert 0 < first < latency * 1000  # streamed
        print(f"{kind}: {totals['successful']} requests, {rate:.2f} a second, first token after {first:.0f} ms")
    lost = RATES * REQUESTS - requests
    assert lost <= counted(metrics, "generation_tokens_total") - tokens <= 48 * lost
