"""Comparisons on the embedded trio: every way's answers are its own, scores and intervals those of `scoring`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specproxy import ProxyTunedModel, cli, demo
from specproxy.comparison import Comparison, _cut, compare
from specproxy.errors import ConfigurationError
from specproxy.problems import Problem, held_out
from specproxy.scoring import proportion, share_of_gap

PROBLEMS = held_out("arithmetic", "test", 3)[1:]


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    return ProxyTunedModel.demo("arithmetic", dtype=torch.float64)


@pytest.fixture(scope="module")
def comparison(model: ProxyTunedModel) -> Comparison:
    return compare(
        model,
        PROBLEMS,
        tuned_base=model.expert,  # any model will do, whose answers are known
        alphas=[0.0, model.alpha],
        max_new_tokens=92,
        stop=["Question:"],
        batch_size=2,
    )


def test_every_way_writes_its_own_answers(model: ProxyTunedModel, comparison: Comparison) -> None:
    assert list(comparison.ways) == ["base", "anti_expert", "expert", "proxy_tuned", "tuned_base"]
    ids = model.tokenizer(PROBLEMS[0].prompt, return_tensors="pt").input_ids
    # One model twice over: a pair without a difference leaves the base alone.
    alone = {
        name: ProxyTunedModel(one, model.expert, model.expert, model.tokenizer)
        for name, one in (("base", model.base), ("expert", model.expert), ("anti_expert", model.anti_expert))
    }
    for name, one in (alone | {"proxy_tuned": model}).items():
        new = one.generate(ids, max_new_tokens=92, num_draft_tokens=0)[0, ids.shape[1] :]
        text = model.tokenizer.decode(new, skip_special_tokens=True).split("Question:")[0]
        assert comparison.ways[name].texts[0] == text, name
    assert comparison.ways["tuned_base"].texts == comparison.ways["expert"].texts
    assert comparison.sweep[0.0].texts == comparison.ways["base"].texts
    assert comparison.sweep[model.alpha] is comparison.ways["proxy_tuned"]
    assert comparison.ways["proxy_tuned"].scores.strict.any() and not comparison.ways["base"].scores.strict.any()


def test_figures(comparison: Comparison) -> None:
    record = comparison.to_dict()
    for name, answers in comparison.ways.items():
        row = record["ways"][name]
        assert row["strict"] == proportion(answers.scores.strict).to_dict()
        assert row["lenient"] == proportion(answers.scores.lenient).to_dict()
        assert row["tokens_per_second"] == answers.num_new_tokens / answers.seconds > 0
        assert (row["acceptance_rate"] is not None) == (name == "proxy_tuned")
    ways = {name: answers.scores.strict for name, answers in comparison.ways.items()}
    over = record["proxy_tuned_over"]["expert"]["strict"]
    assert over["value"] == pytest.approx(ways["proxy_tuned"].mean() - ways["expert"].mean())
    expected = share_of_gap(ways["base"], ways["proxy_tuned"], ways["tuned_base"]).to_dict()
    assert record["gap_closed"]["proxy_tuned"]["strict"] == expected
    assert json.dumps(record)


def test_rows_end_where_their_model_ends_them() -> None:
    assert _cut([5, 6, 0, 1, 1], {0}, 1) == [5, 6, 0]
    assert _cut([5, 1, 6, 1, 1], {0}, 1) == [5, 1, 6]
    assert _cut([5, 6], {0}, 1) == [5, 6]


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    problems, out, plot = (tmp_path / name for name in ("p.jsonl", "out.json", "plot.png"))
    problems.write_text(
        "".join(json.dumps({"question": f"What is 1{i} + 9?", "answer": f"2{i - 1}"}) + "\n" for i in range(1, 5))
    )
    code = cli.main(
        ["compare", f"--problems={problems}", "--limit=2", "--alphas=1,0.5", "--max-new-tokens=12", f"--output={out}",
         f"--plot={plot}", f"--tuned-base={demo.folders('arithmetic')['expert']}"]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    record: dict[str, Any] = json.loads(out.read_text())
    assert record["settings"]["num_problems"] == 2 and list(record["sweep"]) == ["0.5", "1"]
    assert len(record["answers"]["proxy_tuned"]) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    for words in ("proxy tuned", "alpha 0.5", "proxy-tuned over expert", "gap to the tuned base closed by expert"):
        assert words in printed.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--demo=python"], "give --problems"),
        (["--alphas=1,x"], "must be numbers"),
        (["--tuned-base=absent"], "no folder"),
    ],
)
def test_unusable_options(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert cli.main(["compare", *options]) == 2
    assert message in capsys.readouterr().err


def test_problems_need_answers(model: ProxyTunedModel) -> None:
    with pytest.raises(ConfigurationError, match="every one with an answer"):
        compare(model, [Problem("a")])
