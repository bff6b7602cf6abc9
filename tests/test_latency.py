"""The benchmark of speed: its formulas against a simulation, its clocks, and the command on a tiny trio."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from benchmarks import calibrate, latency
from benchmarks.calibrate import grow_to_time_ratio, step_seconds
from benchmarks.decoders import Options, make_decoders
from benchmarks.grow import cost_parameters
from benchmarks.measure import ForwardClock, Stopwatch, paired_ratio
from benchmarks.prompts import demo_prompts, load_prompts
from benchmarks.theory import Costs, acceptance_probability, speed_up
from specproxy import ProxyTunedModel, SpeculationStats
from specproxy.theory import speedup_over_base, speedup_over_per_step

# The theory.


def simulate(a: float, count: int, costs: Costs, cycles: int = 20_000) -> tuple[float, float, SpeculationStats]:
    """Tokens and cost of a mean cycle when every draft survives with probability a, and what is counted of it."""
    rng = random.Random(0)
    tokens = spent = 0.0
    stats = SpeculationStats()
    for _ in range(cycles):
        accepted = []
        for _ in range(costs.rows):
            survivors = 0
            while survivors < count and rng.random() < a:
                survivors += 1
            accepted.append(survivors)
            stats.record(count, survivors, survivors + 1)
        anti_expert = costs.small if costs.anti_expert_window is None else costs.anti_expert_window
        tokens += sum(accepted) / costs.rows + 1
        spent += count * costs.small + anti_expert + costs.base_window + costs.small * (max(accepted) == count)
    return tokens / cycles, spent / cycles, stats


@pytest.mark.parametrize("a", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("costs", [Costs(0.1), Costs(0.5, base_window=1.3, anti_expert_window=0.6, rows=3)])
def test_theory_agrees_with_a_simulation(a: float, costs: Costs) -> None:
    tokens, spent, stats = simulate(a, 5, costs)
    over_per_step, over_base = speed_up(a, 5, costs)
    assert over_base == pytest.approx(tokens / spent, rel=0.02)
    assert over_per_step == pytest.approx(tokens / spent * (1 + 2 * costs.small), rel=0.02)
    estimate = acceptance_probability(stats.accepted_per_position, stats.drafted_per_position)
    assert estimate == pytest.approx(a, abs=0.01)
    assert stats.acceptance_rate < a


def test_free_windows_are_the_formulas_of_the_package() -> None:
    expected = speedup_over_per_step(0.8, 0.098, 6), speedup_over_base(0.8, 0.098, 6)
    assert speed_up(0.8, 6, Costs(0.098)) == pytest.approx(expected)
    assert expected == pytest.approx((2.76, 2.31), abs=0.01)


def test_acceptance_probability_without_drafts() -> None:
    assert acceptance_probability([], []) is None
    # Two windows of two drafts: one wholly accepted, one refused at once. Three drafts were tested.
    assert acceptance_probability([1, 1], [2, 2]) == pytest.approx(2 / 3)


# Prompts.


def test_prompts_are_read_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "How {many}?"}\n\n{"Question": "Why?"}\n{"prompt": "def f():", "question": "no"}\n')
    assert load_prompts(path) == ["Question: How {many}?\nAnswer:", "Question: Why?\nAnswer:", "def f():"]
    assert load_prompts(path, "Q {question}")[1] == "Q Why?"


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no prompts"), ('{"prompt": "a"}\n{"text": "b"}', "line 2 has no text"), ("{", "line 1 is not JSON")],
)
def test_unusable_prompt_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


def test_demo_prompts_go_on_with_held_out_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specproxy.demo.example_prompts", lambda task: ["first"])
    for task, start in (("arithmetic", "Question: "), ("python", "def ")):
        prompts = demo_prompts(task, 3)
        assert len(set(prompts)) == 3 and prompts[0] == "first"
        assert all(prompt.startswith(start) for prompt in prompts[1:])
    assert demo_prompts("arithmetic", 1) == ["first"]


# Clocks and ways of decoding.


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    trio = tiny.make_trio("llama")
    return ProxyTunedModel(trio.base, trio.expert, trio.anti_expert, tiny.tiny_tokenizer())


def test_clock_sees_every_forward_and_leaves_no_trace(model: ProxyTunedModel) -> None:
    prompt = torch.tensor([[5, 8, 13, 21]])
    models = {"base": model.base, "expert": model.expert, "anti_expert": model.anti_expert}
    with ForwardClock(models) as clock:
        output: Any = model.generate(prompt, max_new_tokens=9, num_draft_tokens=3, return_dict_in_generate=True)
    base = [forward for forward in clock.forwards if forward.role == "base"]
    assert [forward.prefill for forward in base] == [True] + [False] * output.speculation.num_cycles
    assert [forward.width for forward in base][:2] == [3, 4]
    assert sum(f.seconds for f in clock.forwards) <= output.speculation.seconds["total"]
    seen = len(clock.forwards)
    model.generate(prompt, max_new_tokens=2)
    assert len(clock.forwards) == seen


def test_paired_ratio() -> None:
    assert paired_ratio([2.0, 9.0, 3.0], [1.0, 3.0, 2.0]) == 2.0


@pytest.mark.parametrize("eos", [frozenset(), frozenset(range(8, 14))])
def test_ways_of_decoding_agree(model: ProxyTunedModel, eos: frozenset[int]) -> None:
    options = Options(12, False, 1.0, 0, eos, 0)
    for batch in (1, 3):
        ids, mask = tiny.left_pad(tiny.prompts([4, 7, 6][:batch]), pad=0)
        decoders = make_decoders(model, options, [3, "auto"], ["rejection", "coupled"], batch)
        tokens = {}
        for name, decode in decoders.items():
            watch = Stopwatch()
            tokens[name] = decode(ids, mask, 0, watch).tokens
            assert (watch.first is None) == (name == "plain_loop")
        assert ("base_assisted" in tokens) == (batch == 1)
        for name, rows in tokens.items():
            alone = name.partition("_")[0] if name.startswith(("base", "expert")) else None
            assert rows == tokens["per_step" if alone is None else f"{alone}_generate"], name
        lengths = {len(row) for rows in tokens.values() for row in rows}
        assert (lengths == {12}) == (not eos)


def test_sampling_of_one_model_follows_its_seed(model: ProxyTunedModel) -> None:
    options = Options(12, True, 1.0, 5, frozenset(), 0)
    ids, mask = tiny.left_pad(tiny.prompts([4, 7]), pad=0)
    decode = make_decoders(model, options, [], [], 2)["base_runtime"]
    first, again, other = (decode(ids, mask, seed, Stopwatch()).tokens for seed in (1, 1, 2))
    assert first == again != other


# Growth by the clock.


def test_growth_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    base, small = tiny.tiny_model("llama", layers=3), tiny.tiny_model("llama", layers=2)

    def clocked(models: list[Any]) -> list[float]:
        return [0.01 + 1e-6 * cost_parameters(model) for model in models]

    monkeypatch.setattr(calibrate, "step_seconds", clocked)
    for depth_only in (False, True):
        grown = grow_to_time_ratio(base, small, 0.1, depth_only=depth_only)
        fast, slow = clocked([small, grown])
        assert fast / slow == pytest.approx(0.1, rel=0.1)
        assert (grown.config.hidden_size == base.config.hidden_size) == depth_only
    assert grow_to_time_ratio(base, small, 0.9) is base


def test_a_step_takes_time() -> None:
    models = [tiny.tiny_model("llama", vocab_size=80, layers=layers) for layers in (1, 2)]
    assert all(seconds > 0 for seconds in step_seconds(models, repeats=1))


# The command.


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny trio and prompts on disk, as arguments."""
    return tiny.save_trio(tmp_path_factory.mktemp("trio"), ["w5 w9 w30", "w7 w3 w3 w21 w8"])


def command(trio: list[str], *more: str) -> list[str]:
    return [*trio, "--max-new-tokens", "8", "--repeats", "2", *more]


def test_command_end_to_end(trio: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cost-ratio", "0.2", "--cost-by", "parameters", "--dtype", "float64", "--batch-sizes", "1", "2"]
    drafts = ["--num-draft-tokens", "3", "auto", "--acceptance", "rejection", "block", "--ignore-eos"]
    assert latency.main(command(trio, *arguments, *drafts)) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    record = json.loads(captured.out)
    assert {"models", "parameter_ratio", "alpha", "num_prompts", "batches", "arguments", "machine"} == set(record)
    assert record["parameter_ratio"] == pytest.approx(0.2, rel=0.1)
    assert [batch["batch_size"] for batch in record["batches"]] == [1, 2]
    for batch in record["batches"]:
        assert {"batch_size", "cost_ratio", "token_ms", "decoders", "theory"} == set(batch)
        drafted = {f"draft_{count}_{rule}" for count in (3, "auto") for rule in ("rejection", "block")}
        assert set(batch["theory"]) == drafted < set(batch["decoders"])
        assert ("base_assisted" in batch["decoders"]) == (batch["batch_size"] == 1)
        for name, row in batch["decoders"].items():
            assert row["tokens_per_second"] > 0 and row["tpot_ms"] > 0 and row["ttft_ms"] > 0
            assert row["new_tokens"] == 16 and row["peak_memory_mib"] > 0
            assert 0 < row["forward_share"] <= 1 and row["cycle_ms"]["other"] > 0
            assert set(row["over"]) == {"per_step", "plain_loop", "base_runtime", "base_generate"}
            if name in drafted:
                assert row["same_tokens_as_per_step"] is True
                assert 0 < row["acceptance"]["rate"] <= row["acceptance"]["a"] <= 1
                assert row["acceptance"]["mean_length"] > row["acceptance"]["mean_length_without_bonus"]
        three = batch["theory"]["draft_3_rejection"]
        assert three["num_drafts"] == 3
        for over in ("over_per_step", "over_base"):
            part = three[over]
            assert part["share"] == pytest.approx(part["measured"] / part["predicted"])
    assert "draft_3_rejection" in captured.err


def test_command_with_sampling_and_a_shape(trio: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base-shape", "layers=4,vocab=64", "--pair-shape", "feed_forward=64", "--do-sample", "--top-k", "9"]
    assert latency.main(command(trio, *arguments, "--skip", "plain", "expert")) == 0
    batch = json.loads(capsys.readouterr().out)["batches"][0]
    # Transformers' assisted decoding wants equal vocabularies, and the base's has grown.
    assert set(batch["decoders"]) == {"per_step", "draft_4_rejection", "base_runtime", "base_generate"}
    assert "same_tokens_as_per_step" not in batch["decoders"]["draft_4_rejection"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--demo", "python"], "or --demo"),
        (["--cost-ratio", "2"], "between 0 and 1"),
        (["--cost-ratio", "0.1", "--base-shape", "7B"], "exclude each other"),
        (["--base-shape", "layers=x"], "field=number"),
        (["--num-draft-tokens", "0"], "per_step"),
        (["--num-draft-tokens", "some"], "num_draft_tokens"),
        (["--acceptance", "hope"], "not a rule"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_refusals(trio: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main(command(trio, *arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and message in captured.err


def test_plot_without_matplotlib_says_how_to_get_it(
    trio: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert latency.main(command(trio, "--plot", "chart.png")) == 2
    assert "specproxy[bench]" in capsys.readouterr().err
