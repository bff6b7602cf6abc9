"""The benchmark of the engine under load: its figures from made-up requests, and the command on a tiny trio."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import tiny

from benchmarks import serving
from benchmarks.serving import Run, arrivals, percentiles, summarise
from specproxy.engine import RequestOutput, Timings
from specproxy.stats import SpeculationStats


def request(ttft: float, total: float, tokens: int, reason: str = "length") -> RequestOutput:
    timings = Timings(submitted=10.0, started=10.0, first_token=10.0 + ttft, ended=10.0 + total)
    error = "broken" if reason == "error" else None
    return RequestOutput("x", [1] * tokens, ["draft"] * tokens, reason, error, SpeculationStats(), timings, 3)


def run(outputs: list[RequestOutput], seconds: float, **counts: int) -> Run:
    return Run(outputs, seconds, {"speculation": SpeculationStats(**counts), "windows": {4: 3, 10: 1}, "cycles": 4})


def test_percentiles_of_known_values() -> None:
    assert percentiles([4.0, 1.0, 3.0, 2.0, 0.0]) == {
        "mean": 2.0,
        "median": 2.0,
        "p90": pytest.approx(3.6),
        "p99": pytest.approx(3.96),
    }
    assert percentiles([5.0]) == {"mean": 5.0, "median": 5.0, "p90": 5.0, "p99": 5.0}
    assert percentiles([]) is None


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(4000, 5.0, seed=1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0 and times == arrivals(4000, 5.0, seed=1) != arrivals(4000, 5.0, seed=2)
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.05)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # 1/e: they have no memory


def test_figures_of_made_up_runs() -> None:
    counts = {"num_cycles": 10, "num_draft_tokens": 20, "num_accepted_tokens": 15, "num_new_tokens": 25}
    first = run([request(0.5, 1.5, 11), request(2.0, 2.0, 1)], 4.0, **counts)
    second = run([request(0.5, 4.5, 11), request(0.5, 0.5, 1)], 2.0, **counts)
    row = summarise([first, second], goal_ttft_ms=1000, goal_tpot_ms=200)
    assert row["tokens_per_second"] == pytest.approx((12 / 4 + 12 / 2) / 2)
    assert row["requests_per_second"] == pytest.approx((2 / 4 + 2 / 2) / 2)
    assert row["good_share"] == 0.5  # one was slow to begin, one slow to go on
    assert row["goodput"] == pytest.approx(row["requests_per_second"] / 2)
    assert row["ttft_ms"]["mean"] == pytest.approx(875) and row["e2e_ms"]["median"] == pytest.approx(1750)
    assert row["tpot_ms"]["mean"] == pytest.approx((100 + 400) / 2)  # one token alone has no pace
    assert row["acceptance"] == {"rate": 0.75, "mean_length": 2.5, "mean_length_without_bonus": 1.5}
    assert row["windows"] == {"4": 6, "10": 2}
    with pytest.raises(ValueError, match="1 requests have not ended well, one with: broken"):
        summarise([run([request(0.5, 1.5, 3, "error")], 1.0)], 1000, 100)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny trio and prompts on disk, as arguments."""
    return tiny.save_trio(tmp_path_factory.mktemp("trio"), ["w5 w9 w30", "w7 w3 w3 w21 w8"])


def command(trio: list[str], *more: str) -> list[str]:
    return [*trio, "--num-requests", "5", "--max-new-tokens", "6", *more]


def test_command_end_to_end(
    trio: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The tiny vocabulary is smaller than the context that a step is timed behind.
    monkeypatch.setattr(serving, "step_seconds", lambda models: [1.0, 10.0])
    pytest.importorskip("matplotlib")
    chart = tmp_path / "chart.png"
    arguments = [
        "--dtype",
        "float64",
        "--concurrency",
        "1",
        "3",
        "--rates",
        "200",
        "--repeats",
        "2",
        "--plot",
        str(chart),
    ]
    assert serving.main(command(trio, *arguments)) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1 and chart.stat().st_size > 0
    record = json.loads(captured.out)
    assert record["cost_ratio"] == 0.1 and record["num_prompts"] == 2
    assert [load["load"] for load in record["loads"]] == ["1 clients", "3 clients", "200 requests/s"]
    for load, count in zip(record["loads"], (5, 12, 5), strict=True):
        assert list(load["settings"]) == ["per_step", "draft_4", "draft_auto"]
        for name, row in load["settings"].items():
            assert (row["requests"], row["new_tokens"]) == (2 * count, 12 * count)
            assert row["tokens_per_second"] > 0 and row["e2e_ms"]["p99"] >= row["e2e_ms"]["median"] > 0
            assert row["same_texts_as_per_step"] == 1.0
            assert (row["acceptance"]["rate"] is None) == (name == "per_step")
            assert row["acceptance"]["mean_length"] >= 1
        assert load["settings"]["per_step"]["windows"].keys() == {"0"}
        assert load["settings"]["per_step"]["over_per_step"] == 1.0
    assert "draft_auto" in captured.err and "3 clients" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-draft-tokens", "0"], "per_step"),
        (["--num-draft-tokens", "some"], "num_draft_tokens"),
        (["--concurrency", "0"], "at least 1"),
        (["--rates", "-1"], "above 0"),
        (["--concurrency"], "give some load"),
        (["--repeats", "0"], "--repeats=0"),
        (["--demo", "python"], "or --demo"),
    ],
)
def test_refusals(trio: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serving.main(command(trio, *arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and message in captured.err
