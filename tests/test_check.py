"""The check of three folders, the theory behind its expectations, the self-test, and the command."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from rich.console import Console

from specproxy import ProxyTunedModel, cli, demo, theory
from specproxy.check import CheckReport, SelfTest, check_folders, self_test
from specproxy.commands import check as command

# Facts.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama trio with tokenizers, pairs of other kinds, and models that cannot take part."""
    path = tmp_path_factory.mktemp("models")
    trio = tiny.make_trio("llama", vocab_sizes=(48, 40, 40))
    for name, model in (("base", trio.base), ("expert", trio.expert), ("anti_expert", trio.anti_expert)):
        model.save_pretrained(path / name)
        tiny.tiny_tokenizer().save_pretrained(path / name)
    trio.expert.save_pretrained(path / "bare")
    tiny.tiny_model("llama", layers=1).save_pretrained(path / "other_size")
    trio.expert.save_pretrained(path / "other_tokenizer")
    tiny.tiny_tokenizer(renamed={7: "seven"}).save_pretrained(path / "other_tokenizer")
    for kind in ("falcon", "t5", "mamba"):
        tiny.tiny_model(kind).save_pretrained(path / kind)
    (path / "unknown").mkdir()
    (path / "unknown/config.json").write_text(json.dumps({"model_type": "abacus"}))
    return path


def check(folder: Path, base: str = "base", expert: str = "expert", anti_expert: str = "anti_expert") -> CheckReport:
    return check_folders(*(str(folder / name) for name in (base, expert, anti_expert)))


def test_facts_of_models_that_fit(folder: Path) -> None:
    report = check(folder)
    assert report.problems == []
    assert report.shared_vocabulary == 40
    for role, model in zip(("base", "expert", "anti_expert"), tiny.make_trio("llama").models, strict=True):
        facts = report.models[role]
        width = 48 if role == "base" else 40
        wider = 2 * (width - 40) * tiny.HIDDEN  # rows of the two embeddings
        count = sum(parameter.numel() for parameter in model.parameters()) + wider
        assert facts.architecture == "LlamaForCausalLM" and facts.num_parameters == count
        assert facts.weight_bytes == {"float32": 4 * count, "bfloat16": 2 * count, "int8": count}
        # key and value, 2 bytes, 2 heads of 8
        layers = tiny.BASE_LAYERS if role == "base" else tiny.PAIR_LAYERS
        assert facts.kv_bytes_per_token == 2 * 2 * layers * 2 * 8
        assert (facts.vocab_width, facts.max_positions, facts.has_tokenizer) == (width, 128, True)
    sizes = {role: facts.num_parameters for role, facts in report.models.items()}
    assert report.cost_ratio == sizes["expert"] / sizes["base"]
    assert json.loads(json.dumps(report.to_dict()))["models"]["base"]["num_parameters"] == sizes["base"]


def test_cache_is_as_large_as_told(folder: Path) -> None:
    model = tiny.make_trio("llama").base.to(torch.bfloat16)
    cache = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert size == 3 * check(folder).models["base"].kv_bytes_per_token


def test_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    for name in ("base", "expert", "anti_expert"):
        (tmp_path / name).mkdir()
        for file in (folder / name).glob("*.json"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    assert check(tmp_path).to_dict() == check(folder).to_dict()


def test_expectations_are_those_of_theory(folder: Path) -> None:
    report = check(folder)
    assert [line["acceptance"] for line in report.expectations] == [0.6, 0.7, 0.8, 0.9]
    for line in report.expectations:
        acceptance, count = line["acceptance"], line["num_draft_tokens"]
        assert count == theory.best_num_draft_tokens(acceptance, report.cost_ratio)
        assert line["over_per_step"] == theory.speedup_over_per_step(acceptance, report.cost_ratio, count)
        assert line["over_base"] == theory.speedup_over_base(acceptance, report.cost_ratio, count)


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        ({"expert": "other_tokenizer"}, "tokenizers differ: id 7 is 'w7' for the base and 'seven' for the expert"),
        ({"base": "falcon"}, "base: FalconForCausalLM (falcon) does not call"),
        ({"anti_expert": "t5"}, "anti_expert: t5 is an encoder-decoder; use a decoder-only model."),
        ({"expert": "mamba"}, "expert: MambaForCausalLM (mamba) has layers of type"),
        ({"expert": "unknown"}, "expert: The checkpoint you are trying to load has model type `abacus`"),
    ],
)
def test_problems_are_named(folder: Path, roles: dict[str, str], problem: str) -> None:
    report = check(folder, **roles)
    assert len([found for found in report.problems if problem in found]) == 1


def test_what_the_check_refuses_the_constructor_refuses(folder: Path) -> None:
    """Both apply one set of rules."""
    names = {role: str(folder / role) for role in ("base", "expert", "anti_expert")}
    for name in ("other_tokenizer", "falcon"):
        (problem,) = check(folder, expert=name).problems
        with pytest.raises(ValueError, match=re.escape(problem)):
            ProxyTunedModel.from_pretrained(**names | {"expert": str(folder / name)}, progress=False)
    assert check(folder).problems == []
    ProxyTunedModel.from_pretrained(**names, progress=False)


def test_an_assistant(folder: Path, tmp_path: Path) -> None:
    """It is held to the vocabulary of the others, and changes nothing that is said of them."""
    tiny.tiny_model("qwen3", layers=1).save_pretrained(tmp_path / "assistant")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "assistant")
    tiny.tiny_model("gpt2", vocab_size=30).save_pretrained(tmp_path / "narrow")
    names = {role: str(folder / role) for role in ("base", "expert", "anti_expert")}
    report, alone = check_folders(**names, assistant=str(tmp_path / "assistant")), check(folder)
    assert report.problems == []
    assert report.models.pop("assistant").architecture == "Qwen3ForCausalLM"
    assert report.to_dict() == alone.to_dict()
    for name, problem in {
        "narrow": "the assistant has 30 ids, the trio shares 40",
        "other_tokenizer": "id 7 is 'w7' for the base and 'seven' for the assistant",
        "mamba": "assistant: MambaForCausalLM (mamba) has layers of type",
        "t5": "assistant: t5 is an encoder-decoder",
    }.items():
        path = str((tmp_path if name == "narrow" else folder) / name)
        (found,) = check_folders(**names, assistant=path).problems
        assert problem in found
        if name != "t5":
            with pytest.raises(ValueError, match=re.escape(found)):
                ProxyTunedModel.from_pretrained(**names, assistant=path, progress=False)
    bare = names | {"base": str(folder / "bare"), "assistant": str(folder / "other_tokenizer")}
    (found,) = check_folders(**bare).problems
    assert "id 7 is 'w7' for the expert and 'seven' for the assistant" in found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_cannot_assist(folder: Path, tmp_path: Path) -> None:
    small = tiny.tiny_model("llama")
    adapted = peft.get_peft_model(small, peft.LoraConfig(target_modules=["q_proj"], r=1))
    adapted.save_pretrained(tmp_path)
    names = {role: str(folder / role) for role in ("base", "expert", "anti_expert")} | {"assistant": str(tmp_path)}
    (found,) = check_folders(**names).problems
    assert f"assistant={tmp_path} is an adapter, which the assistant may not be; merge_and_unload()" in found
    with pytest.raises(ValueError, match="is an adapter, which the assistant may not be"):
        ProxyTunedModel.from_pretrained(**names, progress=False)


def test_notes(folder: Path) -> None:
    assert [note.partition(":")[0] for note in check(folder).notes] == ["the pair is nearly as large as the base"]
    notes = " ".join(check(folder, expert="other_size").notes)
    assert "expert and anti-expert differ in size" in notes
    names = {role: str(folder / role) for role in ("base", "expert", "anti_expert")}
    notes = " ".join(check_folders(**names, assistant=names["base"]).notes)
    assert "the assistant is no smaller than the expert" in notes
    notes = " ".join(check(folder, base="bare", expert="bare", anti_expert="bare").notes)
    assert "no tokenizer was found" in notes


def test_a_tokenizer_that_lies_elsewhere(folder: Path) -> None:
    bare = str(folder / "bare")
    report = check_folders(bare, bare, bare, tokenizer=str(folder / "base"))
    assert [facts.has_tokenizer for facts in report.models.values()] == [True, False, False]
    assert not any("no tokenizer" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen3", "gemma2"])
def test_a_tokenizer_of_special_tokens_alone_is_none(tmp_path: Path, kind: str) -> None:
    """Transformers makes one up for these where it finds no file; it would leave a handful of ids to generate."""
    tiny.tiny_model(kind).save_pretrained(tmp_path)
    report = check_folders(*[str(tmp_path)] * 3)
    assert report.shared_vocabulary == tiny.VOCAB_SIZE
    assert not any(facts.has_tokenizer for facts in report.models.values())
    model = ProxyTunedModel.from_pretrained(
        str(tmp_path), expert=str(tmp_path), anti_expert=str(tmp_path), progress=False
    )
    assert model.tokenizer is None and model.vocab_size == tiny.VOCAB_SIZE


def test_a_folder_that_is_not_there(folder: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        check(folder, base="absent")


# Theory.


@pytest.mark.parametrize(
    ("acceptance", "cost_ratio", "count", "over_per_step", "over_base"),
    [
        (0.6, 0.52, 2, 1.46, 0.71),
        (0.8, 0.52, 3, 1.80, 0.88),
        (0.6, 0.098, 3, 1.84, 1.54),
        (0.7, 0.098, 5, 2.19, 1.83),
        (0.8, 0.098, 6, 2.76, 2.31),
        (0.8, 0.047, 8, 3.31, 3.03),
    ],
)
def test_known_values(acceptance: float, cost_ratio: float, count: int, over_per_step: float, over_base: float) -> None:
    """Cost ratios of a 7B pair with a 13B and a 70B base, and of 1.5B with 32B."""
    assert theory.speedup_over_per_step(acceptance, cost_ratio, count) == pytest.approx(over_per_step, abs=0.006)
    assert theory.speedup_over_base(acceptance, cost_ratio, count) == pytest.approx(over_base, abs=0.006)
    best = theory.best_num_draft_tokens(acceptance, cost_ratio)
    # The best count is where the curve is flat: a neighbour may round to the same two digits.
    assert abs(best - count) <= 1
    assert theory.speedup_over_base(acceptance, cost_ratio, best) == pytest.approx(over_base, abs=0.011)


@pytest.mark.parametrize(
    ("acceptance", "cost_ratio", "over_per_step", "over_base"),
    [(0.7, 0.52, 1.59, 0.78), (0.9, 0.52, 2.17, 1.06), (0.9, 0.098, 3.89, 3.25)],
)
def test_known_best_values(acceptance: float, cost_ratio: float, over_per_step: float, over_base: float) -> None:
    best = theory.best_num_draft_tokens(acceptance, cost_ratio)
    assert theory.speedup_over_per_step(acceptance, cost_ratio, best) == pytest.approx(over_per_step, abs=0.006)
    assert theory.speedup_over_base(acceptance, cost_ratio, best) == pytest.approx(over_base, abs=0.006)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 16])
def test_expected_tokens_is_the_sum_over_lengths(acceptance: float, count: int) -> None:
    """Exactly n drafts survive with probability a^n (1 - a), all of them with a^G; one token comes on top."""
    law = [acceptance**n * (1 - acceptance) for n in range(count)] + [acceptance**count]
    assert sum(law) == pytest.approx(1)
    expected = sum(p * (n + 1) for n, p in enumerate(law))
    assert theory.expected_tokens(acceptance, count) == pytest.approx(expected)


@pytest.mark.parametrize("cost_ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
def test_limits(acceptance: float, cost_ratio: float) -> None:
    assert theory.speedup_over_per_step(acceptance, cost_ratio, 0) == pytest.approx(1)  # per-step decoding itself
    assert theory.speedup_over_base(acceptance, cost_ratio, 0) == pytest.approx(1 / (1 + 2 * cost_ratio))
    best = theory.best_num_draft_tokens(acceptance, cost_ratio, most=8)
    speeds = [theory.speedup_over_base(acceptance, cost_ratio, count) for count in range(9)]
    assert speeds[best] == max(speeds)
    if acceptance == 0:
        assert best == 0
    if acceptance == 1:
        assert best == 8


# The self-test.


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    return ProxyTunedModel(*tiny.shared_trio("llama").models, tokenizer=tiny.tiny_tokenizer())


PROMPT = torch.tensor([[5, 9, 30]])


def test_self_test_of_a_lossless_trio(model: ProxyTunedModel) -> None:
    result = self_test(model, PROMPT, max_new_tokens=12, repeats=2)
    assert result.is_lossless
    assert (result.tokens_equal, result.tokens_compared) == (12, 12) == (result.coupled_equal, result.coupled_compared)
    assert result.speedup_over_per_step > 0
    output: Any = model.generate(PROMPT, max_new_tokens=12, return_dict_in_generate=True)
    assert result.acceptance_rate == output.speculation.acceptance_rate
    assert json.loads(json.dumps(result.to_dict()))["is_lossless"] is True


def test_an_assistant_drafts_in_the_self_test(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafters: list[Any] = []
    original = ProxyTunedModel.generate

    def record(self: ProxyTunedModel, *args: Any, **arguments: Any) -> Any:
        drafters.append((arguments["drafter"], self.assistant is not None))
        return original(self, *args, **arguments)

    monkeypatch.setattr(ProxyTunedModel, "generate", record)
    code, out, err = run(capsys, *own(folder, assistant="expert"), "--run", "--dtype=float64", "--json")
    assert (code, err) == (0, "") and json.loads(out)["self_test"]["is_lossless"]
    assert set(drafters) == {("assistant", True)}
    drafters.clear()
    assert run(capsys, *own(folder), "--run", "--dtype=float64", "--json")[0] == 0
    assert set(drafters) == {(None, False)}


@pytest.mark.parametrize("sampled", [False, True])
def test_self_test_finds_a_difference(model: ProxyTunedModel, monkeypatch: pytest.MonkeyPatch, sampled: bool) -> None:
    original = ProxyTunedModel.generate

    def faulty(self: ProxyTunedModel, *args: Any, **arguments: Any) -> Any:
        output = original(self, *args, **arguments)
        if arguments["num_draft_tokens"] and bool(arguments.get("do_sample")) == sampled:
            output.sequences[0, PROMPT.shape[1] + 7] += 1
        return output

    monkeypatch.setattr(ProxyTunedModel, "generate", faulty)
    result = self_test(model, PROMPT, max_new_tokens=12, repeats=1)
    assert not result.is_lossless
    assert (result.tokens_equal, result.coupled_equal) == ((12, 7) if sampled else (7, 12))


# The command.


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["check", *arguments])
    return code, *capsys.readouterr()


def own(folder: Path, **roles: str) -> list[str]:
    names = {"base": "base", "expert": "expert", "anti_expert": "anti_expert"} | roles
    return [f"--{role.replace('_', '-')}={folder / name}" for role, name in names.items()]


def test_command_tells_that_models_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *own(folder))
    assert (code, err) == (0, "")
    assert out.startswith("The models fit together.\n") and "note: the pair is nearly as large" in out
    report = check(folder)
    for pattern in (
        r"base +│ LlamaForCausalLM",
        r"anti_expert +│ LlamaForCausalLM",
        rf"cost ratio.*: {report.cost_ratio:.3f}",
        r"shared vocabulary: 40 ids",
        *(rf"{a:.0%} +│ +\d+ │ +\d\.\d\d times │ +\d\.\d\d times" for a in (0.6, 0.7, 0.8, 0.9)),
    ):
        assert re.search(pattern, out), pattern
    assert "measured" not in out


def test_command_tells_that_models_do_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for expert in ("falcon", "t5", "other_tokenizer", "unknown"):
        code, out, err = run(capsys, *own(folder, expert=expert), "--run")
        assert (code, err) == (1, "")
        assert out.startswith("The models do not fit together.\nproblem: ") and "measured" not in out


def test_command_gives_one_json_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *own(folder), "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out) == {"fits": True} | check(folder).to_dict()
    code, out, _ = run(capsys, *own(folder, base="t5"), "--json")
    assert code == 1 and out.count("\n") == 1 and json.loads(out)["fits"] is False


def test_command_runs_the_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *own(folder), "--run", "--json", "--dtype", "float64")
    assert (code, err, out.count("\n")) == (0, "", 1)
    result = json.loads(out)["self_test"]
    assert result["is_lossless"] and result["tokens_compared"] == 48 and result["speedup_over_per_step"] > 0
    code, out, err = run(capsys, *own(folder, base="bare", expert="bare", anti_expert="bare"), "--run")
    assert (code, err) == (0, "")  # without a tokenizer, on ids
    for pattern in (r"per-step, greedy +│ +48 of 48", r"lossless +│ +yes", r"median ratio +│ +\d+\.\d\d times"):
        assert re.search(pattern, out), pattern


def test_command_checks_the_embedded_trio(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {role: str(folder / role) for role in ("base", "expert", "anti_expert")}
    asked = []

    def folders(task: str) -> dict[str, str]:
        asked.append(task)
        return names | {"tokenizer": names["base"]}

    monkeypatch.setattr(demo, "tasks", lambda: ["arithmetic", "python"])
    monkeypatch.setattr(demo, "folders", folders)
    assert run(capsys, "--json")[0] == 0
    assert run(capsys, "--demo", "python", "--json")[0] == 0
    assert asked == ["arithmetic", "python"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "b"), "missing: --expert"),
        (("--base", "./b", "--expert", "./e", "--anti-expert", "./a"), "./b"),
        (("--base", "b", "--expert", "e", "--anti-expert", "a", "--dtype", "float64"), "add --run"),
        (("--alpha", "1"), "No such option: --alpha"),
    ],
)
def test_command_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and message in err


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999"), (1_500, "1.50 K"), (7_000_000_000, "7.00 B"), (25_000_000, "25.00 M")]
)
def test_counts_are_readable(value: int, text: str) -> None:
    assert command._count(value) == text


@pytest.mark.parametrize(("value", "text"), [(192, "192 B"), (2048, "2.00 KiB"), (3 * 2**29, "1.50 GiB")])
def test_sizes_are_readable(value: int, text: str) -> None:
    assert command._size(value) == text


def test_a_difference_is_shown() -> None:
    out = io.StringIO()
    result = SelfTest(3, 48, 48, 48, 0.5, 1.25)
    command.print_check(Console(file=out, width=100), CheckReport(), result)
    assert "3 of 48" in out.getvalue() and "│ no (" in " ".join(out.getvalue().split())
    assert "50.0%" in out.getvalue() and "1.25 times per-step" in out.getvalue()
