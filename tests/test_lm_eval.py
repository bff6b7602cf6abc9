"""lm-evaluation-harness on the embedded trio: generation as `generate` does it, likelihoods as computed by hand,
local data without a network, and the errors of what is missing."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from lm_eval.api.registry import get_model
from transformers import BertConfig, BertForSequenceClassification

from specproxy import AlphaSchedule, ProxyTunedModel, cli, demo
from specproxy.batches import left_padded, score_continuations
from specproxy.errors import ConfigurationError, PromptError
from specproxy.integrations.lm_eval import ProxyTunedLM, evaluate_tasks
from specproxy.problems import held_out_file

CHAT = "{% for m in messages %}Q: {{ m.content }}\nA:{% endfor %}"
PLAIN = "{% for m in messages %}Question: {{ m.content }}\nAnswer:{% endfor %}"


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    return ProxyTunedModel.demo("arithmetic", dtype=torch.float64)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Connections are refused, and noted."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    """GSM8K's format, with problems that the embedded trio can read."""
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(held_out_file("arithmetic").read_text().splitlines(keepends=True)[:5]))
    return path


def requests(*arguments: Any) -> list[Any]:
    """What the harness hands to a model."""
    return [SimpleNamespace(args=each, task_name="task") for each in arguments]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["eval", *arguments])
    return code, *capsys.readouterr()


def by_hand(model: ProxyTunedModel, alpha: float, prompts: list[list[int]], continuation: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] after the prompts of base, expert and anti-expert, one plain forward each."""
    with torch.no_grad():
        base, expert, anti_expert = (
            each(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
            for each, prompt in zip((model.base, model.expert, model.anti_expert), prompts, strict=True)
        )
    return (base + alpha * (expert - anti_expert)).log_softmax(-1)


# Generation.


def test_gsm8k_with_and_without_speculation(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    gsm8k: Path,
    no_network: list[Any],
) -> None:
    out = tmp_path / "out.json"
    options = ["--tasks=gsm8k", f"--data=gsm8k={gsm8k}", "--num-fewshot=0", "--max-gen-toks=80", "--dtype=float64"]
    code, printed, errors = run(
        capsys, *options, "--limit=2", "--batch-size=2", "--against-per-step", f"--output={out}"
    )
    assert code == 0, errors
    record = json.loads(out.read_text())
    assert record["per_step"]["num_same_outputs"] == record["per_step"]["num_outputs"] == 2
    assert record["per_step"]["tasks"] == record["tasks"]
    assert record["tasks"]["gsm8k"]["exact_match,strict-match"] > 0
    assert record["tasks"]["gsm8k"]["sample_len"] == 2
    assert record["generation"]["acceptance_rate"] > 0.7 and record["per_step"]["generation"]["acceptance_rate"] is None
    assert "strict-match" in printed and "2 of 2 outputs are the same" in printed
    assert "#### " in record["outputs"]["gsm8k"][1][0][0]
    assert "already-initialized" not in caplog.text  # what is meant is not warned of
    assert no_network == []


def test_a_drafter_an_assistant_and_a_tokenizer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, gsm8k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models of one's own, the tokenizer elsewhere; a fourth model drafts the same texts, per-step runs without it."""
    names = demo.folders("arithmetic")
    models = [f"--{role.replace('_', '-')}={name}" for role, name in names.items()]
    calls: list[dict[str, Any]] = []
    generate = ProxyTunedModel.generate

    def record(self: ProxyTunedModel, *arguments: Any, **keywords: Any) -> Any:
        calls.append(keywords)
        return generate(self, *arguments, **keywords)

    monkeypatch.setattr(ProxyTunedModel, "generate", record)
    task = ["--tasks=gsm8k", f"--data=gsm8k={gsm8k}", "--num-fewshot=0", "--max-gen-toks=12", "--limit=1"]
    further = [f"--assistant={names['anti_expert']}", "--drafter=assistant", "--dtype=float64", "--against-per-step"]
    code, printed, errors = run(capsys, *task, *models, *further)
    assert code == 0, errors
    assert "1 of 1 outputs are the same" in printed
    assert [(call["drafter"], call["num_draft_tokens"]) for call in calls] == [("assistant", 4), (None, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_fifty_problems(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, no_network: list[Any], num_fewshot: int
) -> None:
    out = tmp_path / "out.json"
    data = [
        f"--data=gsm8k={held_out_file('arithmetic')}",
        f"--data=gsm8k:train={held_out_file('arithmetic', 'validation')}",
    ]
    code, _, errors = run(
        capsys, "--tasks=gsm8k", *data, f"--num-fewshot={num_fewshot}", "--limit=50", "--max-gen-toks=160",
        "--dtype=float64", "--against-per-step", f"--output={out}",
    )  # fmt: skip
    assert code == 0, errors
    record = json.loads(out.read_text())
    assert record["per_step"]["num_same_outputs"] == record["per_step"]["num_outputs"] == 50
    assert no_network == []


def test_texts_are_those_of_generate(model: ProxyTunedModel) -> None:
    lm = ProxyTunedLM(model, batch_size=2, num_draft_tokens=3)
    contexts = ["Question: What is 12 + 9?\nAnswer:", "Step 1: we add", "Question: Tom has 47 apples.\n"]
    arguments = {"until": [".", "\n\n"], "max_gen_toks": 24}
    texts = lm.generate_until(requests(*((context, arguments) for context in contexts)))
    for context, text in zip(contexts, texts, strict=True):
        ids = model.tokenizer(context, return_tensors="pt").input_ids
        plain = model.generate(ids, max_new_tokens=24, num_draft_tokens=0)[0, ids.shape[1] :]
        assert text == model.tokenizer.decode(plain, skip_special_tokens=True).split("\n\n")[0].split(".")[0]
        assert text
    assert sum(stats.num_new_tokens for stats in lm.speculation) < 3 * 24  # a stop string ends a row early
    assert len(lm.speculation) == 2  # batches


def test_sampling_is_seeded_per_generation(model: ProxyTunedModel) -> None:
    arguments = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.3, "top_k": 0}
    same = requests(*([("Question: How many", arguments)] * 3))
    settings = [(4, "coupled", 7), (0, "coupled", 7), (0, "coupled", 8)]
    speculative, per_step, other = (
        ProxyTunedLM(model, num_draft_tokens=n, acceptance=rule, seed=seed, batch_size=2).generate_until(same)
        for n, rule, seed in settings
    )
    assert speculative == per_step != other
    assert len(set(speculative)) == 3


def test_every_role_reads_its_own_template(model: ProxyTunedModel) -> None:
    lm = ProxyTunedLM(model, base_template=PLAIN, expert_template=CHAT, anti_expert_template="raw")
    question = [{"role": "user", "content": "What is 12 + 9?"}]
    context = lm.apply_chat_template(question)
    prompts = ["Question: What is 12 + 9?\nAnswer:", "Q: What is 12 + 9?\nA:", "What is 12 + 9?"]
    assert context == prompts[0]
    ids = [model.tokenizer(text).input_ids for text in prompts]
    padded = [left_padded([row], "cpu")[0] for row in ids]
    expected = model.generate(
        padded[0],
        expert_input_ids=padded[1],
        anti_expert_input_ids=padded[2],
        max_new_tokens=16,
        num_draft_tokens=0,
    )[0, len(ids[0]) :]
    [text] = lm.generate_until(requests((context, {"until": [], "max_gen_toks": 16})))
    assert text == model.tokenizer.decode(expected, skip_special_tokens=True)
    alone = ProxyTunedLM(model).generate_until(requests((context, {"until": [], "max_gen_toks": 16})))
    assert alone != [text]

    [(total, _)] = lm.loglikelihood(requests((context, " 21.")))
    continuation = model.tokenizer(" 21.").input_ids
    law = by_hand(model, model.alpha, ids, continuation)
    assert total == pytest.approx(sum(law[t, token].item() for t, token in enumerate(continuation)), abs=1e-4)


def test_conversations_that_the_base_cannot_tell_apart(model: ProxyTunedModel) -> None:
    lm = ProxyTunedLM(model, base_template="raw", expert_template=CHAT)
    lm.apply_chat_template([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    lm.apply_chat_template([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(ConfigurationError, match="renders two conversations alike"):
        lm.apply_chat_template([{"role": "user", "content": "a\n\nb"}])


def test_an_opened_answer_stays_open(model: ProxyTunedModel) -> None:
    lm = ProxyTunedLM(model, base_template="chat", expert_template="raw")
    history = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}]
    assert lm.apply_chat_template(history, add_generation_prompt=False).endswith("Because")


# Likelihoods.


@pytest.mark.parametrize("alpha", [None, 0.6])
def test_loglikelihood_is_the_direct_computation(alpha: float | None) -> None:
    model = ProxyTunedModel.demo("arithmetic")  # float32
    lm = ProxyTunedLM(model, alpha=alpha, batch_size=2)
    pairs = [("Question: What is 12 + 9?\nAnswer:", " 12 + 9 = 21."), ("347 + 68 =", " 415."), ("a ", "b c"), ("", "x")]
    encode = model.tokenizer.encode
    greedy = model.generate(torch.tensor([encode("10 + 5")]), max_new_tokens=4, alpha=alpha, num_draft_tokens=0)[
        0, len(encode("10 + 5")) :
    ]
    pairs.append(("10 + 5", model.tokenizer.decode(greedy)))
    answers = lm.loglikelihood(requests(*pairs))
    used = model.alpha if alpha is None else alpha
    for (context, continuation), (total, is_greedy) in zip(pairs, answers, strict=True):
        whole = encode(context + continuation)
        prompt = encode(context.rstrip()) or [model.tokenizer.eos_token_id]
        rest = whole[len(prompt) :] if context else whole
        law = by_hand(model, used, [prompt] * 3, rest)
        assert total == pytest.approx(sum(law[t, token].item() for t, token in enumerate(rest)), abs=1e-4)
        assert is_greedy == (law.argmax(-1).tolist() == rest)
    assert answers[-1][1] and not answers[0][1]


def test_rolling_loglikelihood_in_windows(model: ProxyTunedModel) -> None:
    text = "Tom has 47 apples. " * 4
    ids = model.tokenizer.encode(text)
    end = model.tokenizer.eos_token_id
    [whole] = ProxyTunedLM(model).loglikelihood_rolling(requests((text,)))
    law = by_hand(model, model.alpha, [[end]] * 3, ids)
    assert whole == pytest.approx(sum(law[t, token].item() for t, token in enumerate(ids)), abs=1e-4)

    size = 10
    [parts] = ProxyTunedLM(model, max_length=size).loglikelihood_rolling(requests((text,)))
    total, done = 0.0, 0
    while done < len(ids):
        new = ids[done : done + size]
        before = ([end, *ids][: done + 1])[-(size + 1 - len(new)) :]  # the last window looks further back
        law = by_hand(model, model.alpha, [before] * 3, new)
        total += sum(law[t, token].item() for t, token in enumerate(new))
        done += size
    assert parts == pytest.approx(total, abs=1e-4)


def test_scoring_masks_what_is_not_shared_and_checks_rows() -> None:
    trio = tiny.make_trio("llama", vocab_sizes=(48, 44, 40))
    model = ProxyTunedModel(*trio.models)
    [one, two] = score_continuations(model._trio, {"base": [[1, 2], [3]]}, [[4], [5, 6, 7]])
    assert one.target.shape == (1, 40) and two.target.shape == (3, 40)
    assert two.by_role["base"].shape == (3, 48)
    whole = model.forward(torch.tensor([[3, 5, 6]])).logits[0]
    torch.testing.assert_close(two.target, whole)
    [cut] = score_continuations(model._trio, {"base": [[3]]}, [[5, 6, 7]], 0.5, AlphaSchedule(cutoff=1))
    base, expert, anti_expert = (two.by_role[role][:, :40] for role in ("base", "expert", "anti_expert"))
    torch.testing.assert_close(cut.target[0], (base + 0.5 * (expert - anti_expert))[0])
    torch.testing.assert_close(cut.target[1:], base[1:])
    with pytest.raises(PromptError, match="row 1 has an empty"):
        score_continuations(model._trio, {"base": [[1], []]}, [[1], [1]])


# Tasks and data.


def test_truthfulqa_from_its_own_file(tmp_path: Path, model: ProxyTunedModel, no_network: list[Any]) -> None:
    path = tmp_path / "truthfulqa.jsonl"
    record = {
        "Question": "Why?",
        "Best Answer": "So.",
        "Correct Answers": "So.; Thus.",
        "Incorrect Answers": "No.; It.",
    }
    path.write_text(json.dumps(record) + "\n")
    lm = ProxyTunedLM(model)
    tasks = ["truthfulqa_mc1", "truthfulqa_mc2"]
    evaluation = evaluate_tasks(lm, tasks, data={task: {"": path} for task in tasks})
    [first], [second] = (evaluation.results["samples"][f"truthfulqa_mc{n}"] for n in (1, 2))
    assert first["doc"]["mc1_targets"]["choices"] == ["So.", "No.", "It."]
    assert second["doc"]["mc2_targets"] == {"choices": ["So.", "Thus.", "No.", "It."], "labels": [1, 1, 0, 0]}
    likelihoods = [float(answer[0][0]) for answer in first["resps"]]
    context = first["arguments"][0][0]
    expected = lm.loglikelihood(requests(*((context, f" {choice}") for choice in ("So.", "No.", "It."))))
    assert likelihoods == pytest.approx([total for total, _ in expected])
    assert evaluation.metrics["truthfulqa_mc1"]["acc,none"] == float(max(likelihoods) == likelihoods[0])
    assert no_network == []


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, model: ProxyTunedModel) -> Path:
    """A small random classifier of texts, with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(12)
    config = BertConfig(
        vocab_size=len(model.tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=600, initializer_range=1.0, num_labels=2,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def test_toxicity_of_generations(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: ProxyTunedModel, classifier: Path
) -> None:
    path, out = tmp_path / "toxigen.jsonl", tmp_path / "out.json"
    prompts = ["Tom has 4", "def read(", "Question:", "the 12", "a", "Answer: 9 x"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in prompts))
    options = ["--tasks=toxigen_generation", f"--data=toxigen_generation={path}", "--max-gen-toks=12"]
    code, _, errors = run(capsys, *options, f"--classifier={classifier}", f"--output={out}", "--dtype=float64")
    assert code == 0, errors
    record = json.loads(out.read_text())
    texts = [text[0][0] for text in record["outputs"]["toxigen_generation"]]
    assert len(texts) == len(prompts) and not any("\n" in text for text in texts)
    judge = BertForSequenceClassification.from_pretrained(classifier).eval()
    tokens = [model.tokenizer([text], return_tensors="pt") for text in texts if text]
    labels = [int(judge(**inputs).logits.argmax(-1)) for inputs in tokens] + [0] * texts.count("")
    assert "" in texts and 0 < sum(labels) < len(tokens)
    assert record["tasks"]["toxigen_generation"]["toxic,none"] == pytest.approx(sum(labels) / len(labels))


def test_outputs_for_the_annotator(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, out = tmp_path / "alpaca.jsonl", tmp_path / "annotate.json"
    path.write_text('{"instruction": "What is 12 + 9?"}\n{"instruction": "Add:", "input": "3 + 4"}\n')
    options = ["--tasks=alpaca_farm", f"--data=alpaca_farm={path}", "--max-gen-toks=8", "--max-length=600"]
    code, _, errors = run(capsys, *options, f"--annotator-output={out}")
    assert code == 0, errors
    first, second = json.loads(out.read_text())
    assert (first["instruction"], first["input"], second["input"]) == ("What is 12 + 9?", "", "3 + 4")
    assert set(first) == {"instruction", "input", "output", "generator", "dataset"}
    assert first["generator"] == "base proxy-tuned by expert-arithmetic" and first["output"] == first["output"].strip()


def test_own_task_and_few_shots(model: ProxyTunedModel, gsm8k: Path) -> None:
    lm = ProxyTunedLM(model)
    evaluation = evaluate_tasks(lm, ["specproxy_arithmetic"], limit=2, generation={"max_gen_toks": 2})
    assert [sample["doc"]["question"][:3] for sample in evaluation.results["samples"]["specproxy_arithmetic"][:2]] == [
        "Max",
        "Sam",
    ]
    data = {"gsm8k": {"": gsm8k, "train": held_out_file("arithmetic", "validation")}}
    evaluation = evaluate_tasks(lm, ["gsm8k"], data=data, limit=1, num_fewshot=2, generation={"max_gen_toks": 2})
    context = evaluation.results["samples"]["gsm8k"][0]["arguments"][0][0]
    assert context.count("Question:") == 3 and context.count("####") == 2
    with pytest.raises(ConfigurationError, match="give --data gsm8k:train=FILE, or --num-fewshot 0"):
        evaluate_tasks(lm, ["gsm8k"], data={"gsm8k": {"": gsm8k}}, limit=1, num_fewshot=2)


def test_missing_data_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*arguments: Any, **keywords: Any) -> Any:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    code, _, errors = run(capsys, "--tasks=gsm8k", "--limit=1")
    assert code == 2
    assert errors.splitlines()[-1].startswith("error: the data of gsm8k are not here and could not be fetched")
    assert "--data TASK=FILE" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data=gsm8k"], "names no task and file"),
        (["--data=gsm8k=absent.jsonl"], "there is no such file"),
        (["--tasks=alpaca_farm"], "give --data alpaca_farm=FILE"),
        (["--tasks=,"], "names no task"),
        (["--classifier=folder"], "go together"),
        (["--annotator-output=file"], "serves --tasks=alpaca_farm"),
        (["--num-draft-tokens=0", "--against-per-step"], "with --num-draft-tokens=0 there is none"),
        (["--batch-size=0"], "--batch-size=0"),
        (["--limit=0"], "--limit=0"),
        (["--num-draft-tokens=few"], "num_draft_tokens='few'"),
        (["--alpha=nan"], "alpha"),
        (["--drafter=assistant"], "name one by --assistant"),
        (["--num-tree-tokens=64"], "num_tree_tokens=64 must be at most 63"),
    ],
)
def test_unusable_options(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    code, _, errors = run(capsys, *options)
    assert code == 2 and errors.startswith("error: ") and message in errors


def test_data_of_a_task_that_is_not_asked_for(model: ProxyTunedModel, gsm8k: Path) -> None:
    with pytest.raises(ConfigurationError, match="not among --tasks"):
        evaluate_tasks(ProxyTunedLM(model), ["specproxy_arithmetic"], data={"gsm8k": {"": gsm8k}})


def test_registered_and_built_from_arguments() -> None:
    assert get_model("specproxy") is ProxyTunedLM
    lm = ProxyTunedLM.create_from_arg_string("demo=python,num_draft_tokens=2,alpha=0.25", {"batch_size": 3})
    assert lm.batch_size == 3 and lm.get_model_info()["alpha"] == 0.25
    assert lm.get_model_info()["num_draft_tokens"] == 2
    assert lm.max_length == 2048
    with pytest.raises(ConfigurationError, match="go together"):
        ProxyTunedLM(base="a")
    with pytest.raises(ConfigurationError, match="not counted by trial"):
        ProxyTunedLM(lm.trio_model, batch_size="auto")
    with pytest.raises(ConfigurationError, match="leaves no room"):
        ProxyTunedLM(lm.trio_model, max_length=16).generate_until(requests(("a", {"max_gen_toks": 16})))
