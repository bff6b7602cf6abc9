"""The composite inside vLLM, on a CPU: its tokens, its law, its metrics and its errors against this runtime's.

vLLM pins its own torch, so these run in an environment of their own (`make test-vllm`). The folder is not called vllm:
pytest puts tests/ on the path, and `import vllm` would find it.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import chi_square
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from specproxy import ProxyTunedModel, cli, demo
from specproxy.integrations.vllm.composite import ROLES, Composite, inspect_roles, write_composite

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed: it pins a torch of its own; `make test-vllm` makes an environment for it",
        allow_module_level=True,
    )

ROOT = Path(__file__).resolve().parents[2]
ALPHA = 0.8
NEVER = [10**6]  # an end id that no model yields
WIDE_HEADS = {"num_key_value_heads": 4, "head_dim": 32}  # 32: the smallest head that vLLM's CPU attention takes
NARROW_HEADS = {"num_key_value_heads": 2, "head_dim": 32}
DRAFTS = 4


def engine(folder: Path, tmp_path: Path, prompts: list[list[int]], **job: Any) -> dict[str, Any]:
    """What an engine in a process of its own answers: tokens [prompts][samples] and counters."""
    result = tmp_path / "result.json"
    environment = job.pop("environment", {})
    job = {"num_draft_tokens": 0, **job, "folder": str(folder), "prompts": prompts, "result": str(result)}
    completed = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("worker.py"))],
        input=json.dumps(job),
        text=True,
        capture_output=True,
        env=os.environ | environment,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr[-4000:]
    answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return answer


def greedy(tokens: int, **settings: Any) -> dict[str, Any]:
    return {"sampling": {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}, **settings}


def acceptance_rate(answer: dict[str, Any]) -> float:
    counters = answer["counters"]
    accepted, drafted = (counters[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("accepted", "draft"))
    return float(accepted / drafted)


def write_trio(
    path: Path, trio: tiny.Trio, tokenizer_size: int, missing: tuple[int, ...] = ()
) -> tuple[dict[str, str], Composite]:
    names = {}
    for role, model in zip(ROLES, trio.models, strict=True):
        names[role] = str(path / role)
        model.save_pretrained(names[role])
        tiny.tiny_tokenizer(tokenizer_size, missing=missing).save_pretrained(names[role])
    return names, write_composite(path / "composite", names, inspect_roles(names), ALPHA)


def ours(model: ProxyTunedModel, prompts: list[list[int]], tokens: int, drafts: int) -> tuple[list[list[int]], float]:
    """Greedy tokens of this runtime, all prompts in one batch, and its acceptance rate."""
    ids, mask = tiny.left_pad(prompts)
    output: Any = model.generate(
        ids, mask, max_new_tokens=tokens, num_draft_tokens=drafts, eos_token_id=NEVER, return_dict_in_generate=True
    )
    return output.sequences[:, ids.shape[1] :].tolist(), output.speculation.acceptance_rate


def check_greedy(
    model: ProxyTunedModel, folder: Path, tmp_path: Path, prompts: list[list[int]], tokens: int, **settings: Any
) -> float:
    """Equal tokens without and with speculation, 20 prompts in batches of 8; returns how far acceptance rates part."""
    assert len(prompts) == 20
    per_step, _ = ours(model, prompts, tokens, 0)
    for drafts in (0, DRAFTS):
        answer = engine(folder, tmp_path, prompts, **greedy(tokens, num_draft_tokens=drafts, **settings))
        assert [samples[0] for samples in answer["tokens"]] == per_step
    speculative, rate = ours(model, prompts, tokens, DRAFTS)
    assert speculative == per_step
    print(f"{len(prompts)} texts of {tokens} tokens equal; accepted {acceptance_rate(answer):.2%}, here {rate:.2%}")
    return abs(acceptance_rate(answer) - rate)


# Greedy.


def test_greedy_arithmetic(tmp_path: Path) -> None:
    names = demo.folders("arithmetic")
    tokenizer = names.pop("tokenizer")
    report = inspect_roles(names, tokenizer)
    write_composite(tmp_path / "composite", names, report, demo.alpha("arithmetic"))
    numbers = np.random.default_rng(0).integers(12, 99, (20, 2)).tolist()
    texts = [
        f"Question: {name} has {a} apples and buys {b} more. How many apples does {name} have?\nAnswer:"
        for name, (a, b) in zip(itertools.cycle(["Tom", "Ben", "Anna"]), numbers, strict=False)
    ]
    prompts = [report.tokenizer(text).input_ids for text in texts]
    model = ProxyTunedModel.demo("arithmetic")
    # vLLM also counts drafts behind the end of a text, where this runtime drafts none: long texts make that little.
    settings = {"engine": {"max_model_len": 256}}
    assert check_greedy(model, tmp_path / "composite", tmp_path, prompts, 200, **settings) < 0.02


TRIOS: dict[str, tuple[tuple[str, str], tuple[int, int, int], tuple[dict[str, Any], ...]]] = {
    "other_heads": (("llama", "llama"), (40, 40, 40), (WIDE_HEADS, NARROW_HEADS, NARROW_HEADS)),
    "padded_base": (("llama", "llama"), (48, 40, 44), (NARROW_HEADS, NARROW_HEADS, NARROW_HEADS)),
    "other_kinds": (
        ("gpt2", "opt"),
        (40, 40, 40),
        ({"n_embd": 64, "n_head": 2}, *[{"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 2}] * 2),
    ),
}


@pytest.mark.parametrize("name", TRIOS)
def test_greedy_random_trio(tmp_path: Path, name: str) -> None:
    kinds, widths, overrides = TRIOS[name]
    trio = tiny.make_trio(*kinds, vocab_sizes=widths, dtype=torch.float32, overrides=overrides)  # type: ignore[arg-type]
    names, _ = write_trio(tmp_path, trio, 40)
    model = load(names)
    prompts = tiny.prompts([3 + i % 9 for i in range(20)])
    settings = {"engine": {"max_model_len": 90}}
    assert check_greedy(model, tmp_path / "composite", tmp_path, prompts, 40, **settings) < 0.02


@pytest.mark.parametrize("kinds", [("mistral", "llama"), ("llama", "mistral"), ("gemma3", "gemma3")])
def test_attention_windows_of_their_own(tmp_path: Path, kinds: tuple[str, str]) -> None:
    """Windows of 5 and 6 tokens in the base, in the pair, in every other layer; acceptance is vLLM's affair.

    vLLM gives a layer without a window the base's, and a draft model the first group's block table: both end here in
    other tokens, unless the composite prevents it.
    """
    trio = tiny.make_trio(*kinds, dtype=torch.float32, overrides=(WIDE_HEADS, NARROW_HEADS, NARROW_HEADS))
    names, _ = write_trio(tmp_path, trio, 40)
    prompts = tiny.prompts([3 + i % 9 for i in range(20)])
    check_greedy(load(names), tmp_path / "composite", tmp_path, prompts, 40)


def test_shared_prefixes_and_prompts_in_pieces(tmp_path: Path) -> None:
    """Prompts of 500 tokens in chunks of 96, whose first blocks come from the prefix cache."""
    names = demo.folders("arithmetic")
    report = inspect_roles({role: names[role] for role in ROLES}, names["tokenizer"])
    write_composite(tmp_path / "composite", names, report, demo.alpha("arithmetic"))
    example = demo.example_prompts("arithmetic")[0] + "\nWe start with 47.\nSo the answer is 85.\n#### 85\n\n"
    question = "Question: Ben has {} coins and loses 15. How many coins does Ben have?\nAnswer:"
    prompts = [report.tokenizer(example * 9 + question.format(30 + i)).input_ids for i in range(4)] * 2
    assert min(map(len, prompts)) > 400
    limits = {"max_model_len": 640, "max_num_batched_tokens": 96, "max_num_seqs": 4}
    answer = engine(tmp_path / "composite", tmp_path, prompts, **greedy(48, num_draft_tokens=DRAFTS, engine=limits))
    assert answer["counters"]["vllm:prefix_cache_hits"] > 1000
    assert [samples[0] for samples in answer["tokens"]] == ours(ProxyTunedModel.demo("arithmetic"), prompts, 48, 0)[0]


def load(names: dict[str, str]) -> ProxyTunedModel:
    roles = dict(names)
    return ProxyTunedModel.from_pretrained(roles.pop("base"), **roles, alpha=ALPHA, progress=False)  # type: ignore[arg-type]


def test_ids_that_are_not_shared(tmp_path: Path) -> None:
    """The expert proposes ids that the base has no embedding for, and ids that no tokenizer knows; none is generated.

    64 is a multiple of what vLLM rounds tables up to: there is no spare row that such an id could fall on.
    """
    overrides = (NARROW_HEADS, NARROW_HEADS, NARROW_HEADS)
    trio = tiny.make_trio("llama", vocab_sizes=(64, 72, 64), dtype=torch.float32, overrides=overrides)
    with torch.no_grad():
        trio.expert.lm_head.weight[64:] *= 3  # often the expert's favourites
    names, _ = write_trio(tmp_path, trio, 64, missing=tuple(range(5, 60, 6)))
    prompts = tiny.prompts([5 + i % 4 for i in range(8)])
    answer = engine(tmp_path / "composite", tmp_path, prompts, **greedy(40, num_draft_tokens=DRAFTS))
    assert [samples[0] for samples in answer["tokens"]] == ours(load(names), prompts, 40, 0)[0]
    assert acceptance_rate(answer) < 0.9


def test_tensor_parallel(tmp_path: Path) -> None:
    """Two processes, each with half of every layer."""
    overrides = (WIDE_HEADS, NARROW_HEADS, NARROW_HEADS)
    names, _ = write_trio(tmp_path, tiny.make_trio("llama", dtype=torch.float32, overrides=overrides), 40)
    prompts = tiny.prompts([3 + i % 9 for i in range(8)])
    answer = engine(
        tmp_path / "composite",
        tmp_path,
        prompts,
        **greedy(40, num_draft_tokens=DRAFTS, engine={"tensor_parallel_size": 2}),
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    assert [samples[0] for samples in answer["tokens"]] == ours(load(names), prompts, 40, 0)[0]


def quantise(folder: Path) -> None:
    """Turn a checkpoint's projections into int8 with a scale per row, as compressed-tensors stores them."""
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            weights[name] = (weight / scale).round().to(torch.int8)
            weights[f"{name}_scale"] = scale.to(torch.bfloat16)
        else:
            weights[name] = weight.to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}), encoding="utf-8")


def test_quantised_base(tmp_path: Path) -> None:
    """An int8 base with a pair in bfloat16: at strength 0, set for the run, its tokens are those of the base alone."""
    overrides = (NARROW_HEADS, NARROW_HEADS, NARROW_HEADS)
    names, _ = write_trio(tmp_path, tiny.make_trio("llama", dtype=torch.float32, overrides=overrides), 40)
    quantise(Path(names["base"]))
    prompts = tiny.prompts([3 + i % 9 for i in range(8)])
    kind: dict[str, Any] = {"dtype": "bfloat16"}
    alone = engine(Path(names["base"]), tmp_path, prompts, **greedy(40, engine=kind))["tokens"]
    steered = engine(tmp_path / "composite", tmp_path, prompts, **greedy(40, num_draft_tokens=DRAFTS, engine=kind))
    assert steered["tokens"] != alone
    kind["hf_overrides"] = {"proxy_alpha": 0.0}
    answer = engine(tmp_path / "composite", tmp_path, prompts, **greedy(40, num_draft_tokens=DRAFTS, engine=kind))
    assert answer["tokens"] == alone


# Sampling.

PROMPT, LENGTH, VOCAB_SIZE, SAMPLES = [3, 5, 4], 3, 8, 120_000


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A composite of a small vocabulary and the joint law [V, V, V] of its first three tokens, from this runtime."""
    path = tmp_path_factory.mktemp("law")
    overrides = (NARROW_HEADS, NARROW_HEADS, NARROW_HEADS)
    trio = tiny.make_trio("llama", vocab_sizes=(VOCAB_SIZE,) * 3, dtype=torch.float32, overrides=overrides, seed=5)
    for model in trio.models:
        with torch.no_grad():
            model.lm_head.weight *= 0.4  # a flatter law
    names, _ = write_trio(path, trio, VOCAB_SIZE)
    ends = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=LENGTH)))
    with torch.inference_mode():
        logits = load(names)(torch.cat([torch.tensor(PROMPT).expand(len(ends), -1), ends], dim=1)).logits
    log_law = logits[:, len(PROMPT) - 1 : -1].double().log_softmax(-1).gather(-1, ends[..., None]).sum((1, 2))
    return path / "composite", log_law.exp().reshape((VOCAB_SIZE,) * LENGTH).numpy()


def sample(folder: Path, tmp_path: Path, samples: int, **job: Any) -> np.ndarray:
    """Tokens [samples, LENGTH]."""
    answer = engine(
        folder,
        tmp_path,
        [PROMPT] * samples,
        sampling={"temperature": 1.0, "max_tokens": LENGTH, "ignore_eos": True, "detokenize": False},
        engine={"max_num_seqs": 256, "seed": 1},
        **job,
    )
    if job.get("num_draft_tokens"):
        assert 0.1 < acceptance_rate(answer) < 0.9
    return np.array([rows[0] for rows in answer["tokens"]])


@pytest.mark.parametrize("drafts", [0, 2])
def test_sampled_law(law: tuple[Path, np.ndarray], tmp_path: Path, drafts: int) -> None:
    """Chi-square of the first token, the first two and all three; the power is stated for a pair's law 2 % off.

    The first token comes with the prompt; the second is the first that drafts lead to. With drafts the CPU backend is
    mended beforehand: see the test below.
    """
    folder, joint = law
    assert joint.sum() == pytest.approx(1, abs=1e-6)
    assert chi_square.power(SAMPLES, VOCAB_SIZE**2, 0.02) > 0.999
    tokens = sample(folder, tmp_path, SAMPLES, num_draft_tokens=drafts, repair_expand=drafts > 0)
    for length in (1, 2, LENGTH):
        exact = joint.sum(tuple(range(length, LENGTH)))
        p_value = chi_square.p_value(tokens[:, :length], exact / exact.sum())
        print(f"{drafts} drafts, {len(tokens)} samples of {length} tokens: p = {p_value:.3g}")
        assert p_value > chi_square.LEVEL


@pytest.mark.xfail(reason="vllm-project/vllm issue 55005: uninitialised temperatures on a CPU", strict=True)
def test_sampled_law_of_the_cpu_backend_as_it_is(law: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """Passes once vLLM is mended: then the warning of the model and the line in docs/vllm.md can go."""
    folder, joint = law
    tokens = sample(folder, tmp_path, 5_000, num_draft_tokens=2)
    pair = joint.sum(2)
    assert chi_square.p_value(tokens[:, :2], pair / pair.sum()) > chi_square.LEVEL


# The command line.


def serve(arguments: list[str]) -> subprocess.Popen[str]:
    """`vllm serve` in a process group of its own; its output is one stream.

    By the module, because the command asks for the version of a package vllm, which vllm-cpu is not.
    """
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )


def break_link(folder: Path) -> str:
    (folder / "expert").unlink()
    return f"expert={folder}/expert cannot be read: there is no such folder."


def rename_a_token(folder: Path) -> str:
    changed = folder.parent / "changed"
    shutil.copytree(folder / "expert", changed)
    tiny.tiny_tokenizer(renamed={7: "seven"}).save_pretrained(changed)
    (folder / "expert").unlink()
    (folder / "expert").symlink_to(changed)
    return "the tokenizers differ: id 7 is 'w7' for the base and 'seven' for the expert"


@pytest.mark.parametrize("fault", [break_link, rename_a_token])
def test_a_folder_that_went_wrong_stops_before_loading(tmp_path: Path, fault: Any) -> None:
    write_trio(tmp_path, tiny.shared_trio("llama"), 40)
    message = fault(tmp_path / "composite")
    process = serve([str(tmp_path / "composite"), "--dtype=float32", "--enforce-eager", "--max-model-len=64"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output.count(message) == 1
    assert "EngineCore" not in output and "Loading" not in output


def test_the_printed_command_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Write the embedded trio's folder, run what was printed, and ask the server."""
    assert cli.main(["vllm-config", f"--out={tmp_path / 'composite'}", "--num-speculative-tokens=3"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:2] == ["vllm", "serve"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = ["--dtype=float32", "--enforce-eager", "--max-model-len=256", "--max-num-seqs=8"]
    process = serve([*words[2:], *limits, "--host=127.0.0.1", f"--port={port}"])
    try:
        prompt = demo.example_prompts("arithmetic")[0]
        request = {"model": str(tmp_path / "composite"), "prompt": prompt, "max_tokens": 64, "temperature": 0}
        answer = ask(process, f"http://127.0.0.1:{port}", request)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=120)
    model = ProxyTunedModel.demo("arithmetic")
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    tokens: Any = model.generate(ids, max_new_tokens=64, num_draft_tokens=0)
    text = model.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer["choices"][0]["text"] == text and answer["choices"][0]["finish_reason"] == "stop"


def ask(process: subprocess.Popen[str], address: str, request: dict[str, Any]) -> dict[str, Any]:
    """A completion, once the server is up."""
    deadline = time.monotonic() + 400
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "the server did not come up"
            time.sleep(1)
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{address}/v1/completions", body, headers), timeout=120
    ) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
