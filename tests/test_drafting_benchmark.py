"""The ablation of drafting: what it measures of a tiny trio, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from benchmarks import drafting
from benchmarks.rules import coupled_bound, tokens_a_cycle_ratio
from specproxy import ProxyTunedModel


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny trio and prompts on disk, as arguments."""
    return tiny.save_trio(tmp_path_factory.mktemp("trio"), ["w5 w9 w30 w5 w9 w30", "w7 w3 w7 w3 w7"])


def command(trio: list[str], *more: str) -> list[str]:
    sizes = ["--max-new-tokens", "8", "--repeats", "1", "--ignore-eos", "--dtype", "float64"]
    return [*trio, *sizes, *more]


def test_every_way_of_drafting_in_one_run(trio: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = ["--drafters", "expert", "lookup", "cascade", "assistant", "--assistant", trio[5]]
    rules = ["--rules", "rejection", "block", "coupled", "--trees", "2x5"]
    arguments = [*ways, *rules, "--num-draft-tokens", "3", "auto", "--plot", str(tmp_path / "chart.png")]
    assert drafting.main(command(trio, *arguments)) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    (trio,) = json.loads(captured.out)["trios"]
    greedy, sampled = trio["laws"]
    assert (greedy["temperature"], sampled["temperature"], trio["num_prompts"]) == (0, 1, 2)
    chains = {f"{drafter}_{n}" for drafter in ("expert", "lookup", "cascade", "assistant") for n in (3, "auto")}
    assert set(greedy["ways"]) == {"per_step", "tree_2x5_equality", *(f"{chain}_equality" for chain in chains)}
    by_rule = {f"{chain}_{rule}" for chain in chains for rule in ("rejection", "block", "coupled")}
    assert set(sampled["ways"]) == {"per_step", "per_step_coupled", "tree_2x5_coupled", *by_rule}
    for law in trio["laws"]:
        for name, row in law["ways"].items():
            assert row["new_tokens"] == 16 and row["over"]["per_step"] > 0
            equal = name.endswith(("_equality", "_coupled")) and not name.startswith("per_step")
            assert row.get("same_tokens_as_per_step") is (True if equal else None), name
    assert greedy["ways"]["tree_2x5_equality"]["acceptance"]["mean_length"] > 1
    assert set(sampled["block_over_rejection"]) == chains
    assert sampled["coupled"]["positions"] == 16 and "coupled" not in greedy
    assert "tree_2x5_coupled" in captured.err and (tmp_path / "chart.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--demos", "python"], "--demos"),
        (["--repetitive"], "exclude each other"),
        (["--drafters", "assistant"], "go together"),
        (["--trees", "4"], "levels x nodes"),
        (["--num-draft-tokens", "0"], "per_step"),
        (["--temperatures", "-1"], "temperature"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_refusals(trio: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert drafting.main(command(trio, *arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and message in captured.err


def test_ratio_of_tokens_a_cycle() -> None:
    def run(*calls: tuple[int, int]) -> Any:
        return SimpleNamespace(speculation=[SimpleNamespace(num_new_tokens=n, num_cycles=c) for n, c in calls])

    same = tokens_a_cycle_ratio([run((6, 2), (9, 3))], [run((4, 2), (6, 3))])
    assert same == pytest.approx({"over": 3, "under": 2, "ratio": 1.5, "standard_error": 0})
    # Two pairs of runs, the ratio of each 2 and 1: their mean is 1.5, its standard error half their distance.
    spread = tokens_a_cycle_ratio([run((8, 2)), run((4, 2))], [run((4, 2)), run((4, 2))])
    assert spread == pytest.approx({"over": 3, "under": 2, "ratio": 1.5, "standard_error": 0.5})
    # Both sides vary, together: each pair's ratio is 2, and nothing is left to chance.
    together = tokens_a_cycle_ratio([run((8, 2)), run((4, 2))], [run((4, 2)), run((2, 2))])
    assert together == pytest.approx({"over": 3, "under": 1.5, "ratio": 2, "standard_error": 0})


def test_coupled_acceptance_lies_between_its_bounds() -> None:
    trio = tiny.make_trio("llama")
    model = ProxyTunedModel(trio.base, trio.expert, trio.anti_expert, tiny.tiny_tokenizer(), 0.5)
    found = coupled_bound(model, tiny.prompts([4, 5, 6, 7]), 60, 1.0)
    error = 4 * (0.25 / found["positions"]) ** 0.5
    assert found["positions"] == 240
    assert found["bound"] - error < found["coupled"] < found["one_minus_tv"] + error
    # The coin of every position is the model's own: the expert as target is its own draft.
    alone = ProxyTunedModel(trio.expert, trio.expert, trio.expert, tiny.tiny_tokenizer(), 1.0)
    found = coupled_bound(alone, tiny.prompts([4]), 10, 0.7)
    assert (found["coupled"], found["one_minus_tv"], found["bound"]) == pytest.approx((1, 1, 1))
