"""The command line on a tiny random trio that lies where the embedded one does, and once on the embedded one itself."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from demo_fixtures import EXAMPLE_PROMPTS
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specproxy import AlphaSchedule, Engine, cli, demo
from specproxy.commands import generate as command
from specproxy.commands.report import Comparison, print_report
from specproxy.model import ProxyTunedModel
from specproxy.stats import SpeculationStats
from specproxy.text import split_tokens
from specproxy.version import __version__
from specproxy_kernels import RULES

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tiny_demo: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line in this process; gives exit code, standard output and standard error."""

    def call(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = cli.main(list(arguments))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call of generate."""
    calls: list[dict[str, Any]] = []
    original = ProxyTunedModel.generate

    def record(self: ProxyTunedModel, *args: Any, **kwargs: Any) -> Any:
        calls.append({**kwargs, "model": self})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ProxyTunedModel, "generate", record)
    return calls


SHORT = ("generate", "--max-new-tokens", "9", "--dtype", "float64")


def expected(model: ProxyTunedModel, text: str, **kwargs: Any) -> str:
    """What generate itself gives, decoded."""
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=9, **kwargs)[0, ids.shape[1] :]
    return model.tokenizer.decode(new, skip_special_tokens=True)


# What is printed, and where.


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"specproxy {__version__}\n", "")
    code, out, _ = run()
    assert code == 0 and "generate" in out
    code, out, _ = run("generate", "--help")
    options = re.findall(r"--[a-z-]+", out)
    assert code == 0
    assert {"--base", "--stream", "--json", "--prompt-file", "--num-draft-tokens", "--greedy", "--stats"} <= set(
        options
    )


def test_greedy_text_is_what_generate_gives(run: Run, tiny_demo: Any) -> None:
    code, out, err = run(*SHORT, "Hello")
    assert (code, err) == (0, "")
    assert out == expected(tiny_demo(dtype=torch.float64), "Hello") + "\n"


@pytest.mark.parametrize("drafts", ["0", "1", "7", "auto"])
@pytest.mark.parametrize("acceptance", RULES)
def test_greedy_text_does_not_depend_on_speculation(run: Run, drafts: str, acceptance: str) -> None:
    _, per_step, _ = run(*SHORT, "Hello", "--num-draft-tokens", "0")
    code, out, _ = run(*SHORT, "Hello", "--num-draft-tokens", drafts, "--acceptance", acceptance)
    assert (code, out) == (0, per_step)


def test_coupled_samples_do_not_depend_on_speculation(run: Run) -> None:
    sampled = (*SHORT, "Hello", "--temperature", "0.9", "--seed", "5", "--acceptance", "coupled")
    texts = {run(*sampled, "--num-draft-tokens", drafts)[1] for drafts in ("0", "2", "5")}
    assert len(texts) == 1
    assert texts != {run(*sampled[:-3], "6", *sampled[-2:])[1]}


def test_without_a_prompt_an_example_is_shown_and_continued(run: Run, tiny_demo: Any) -> None:
    for task, text in EXAMPLE_PROMPTS.items():
        code, out, err = run(*SHORT, "--demo", task)
        assert (code, err) == (0, f"prompt: {text}\n")
        assert out == expected(tiny_demo(task, dtype=torch.float64), text) + "\n"


def test_prompt_from_standard_input_and_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Héllo\n", encoding="utf-8")
    _, plain, _ = run(*SHORT, "Héllo")
    assert run(*SHORT, "-", stdin="Héllo\n".encode()) == (0, plain, "")
    assert run(*SHORT, "--prompt-file", str(tmp_path / "prompt.txt")) == (0, plain, "")
    assert run(*SHORT, "-", stdin="Héllo\n\n".encode())[1] != plain  # only one newline is dropped


def test_json_is_one_line(run: Run) -> None:
    _, plain, _ = run(*SHORT, "Hello")
    code, out, err = run(*SHORT, "Hello", "--json")
    assert code == 0 and out.count("\n") == 1 and err == ""
    result = json.loads(out)
    assert set(result) == {"text", "speculation"}
    assert result["text"] + "\n" == plain
    assert result["speculation"]["num_new_tokens"] == len(result["speculation"]["token_sources"][0]) == 9


def test_json_keeps_standard_output_free_of_all_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ProxyTunedModel.generate

    def talkative(*args: Any, **kwargs: Any) -> Any:
        print("a library speaks")
        return original(*args, **kwargs)

    monkeypatch.setattr(ProxyTunedModel, "generate", talkative)
    code, out, err = run(*SHORT, "--json", "--stats")
    assert code == 0 and set(json.loads(out)) == {"text", "speculation"}
    assert "a library speaks" in err and "acceptance rate" in err and EXAMPLE_PROMPTS["arithmetic"] in err


def test_stream_prints_the_same_text(run: Run, seen: list[dict[str, Any]]) -> None:
    _, plain, _ = run(*SHORT, "Hello")
    assert run(*SHORT, "Hello", "--stream") == (0, plain, "")
    assert [call["streamer"] is not None for call in seen] == [False, True]


def test_stream_with_stats(run: Run, seen: list[dict[str, Any]]) -> None:
    _, plain, _ = run(*SHORT, "Hello")
    code, out, _ = run(*SHORT, "Hello", "--stream", "--stats")
    assert code == 0 and out.startswith(plain) and "acceptance rate" in out
    assert sum(call.get("streamer") is not None for call in seen) == 1  # timing does not print


# Options.


@pytest.mark.parametrize(
    ("arguments", "kwargs"),
    [
        (
            (),
            {"do_sample": False, "num_draft_tokens": 4, "acceptance": "rejection", "alpha": None, "stop_strings": None},
        ),
        (("--num-draft-tokens", "2"), {"num_draft_tokens": 2}),
        (("--num-draft-tokens", "auto"), {"num_draft_tokens": "auto"}),
        (("--acceptance", "block"), {"acceptance": "block"}),
        (("--alpha", "-0.25"), {"alpha": -0.25}),
        (("--temperature", "0.7"), {"do_sample": True, "temperature": 0.7}),
        (("--temperature", "0"), {"do_sample": False}),
        (("--temperature", "0.7", "--greedy"), {"do_sample": False}),
        (("--do-sample", "--seed", "3"), {"do_sample": True, "seed": 3}),
        (("--do-sample", "--top-k", "0", "--top-p", "0.9", "--min-p", "0.1"), {"top_k": 0, "top_p": 0.9, "min_p": 0.1}),
        (("--greedy", "--top-k", "5"), {"do_sample": False, "top_k": 5}),
        (("--repetition-penalty", "1.3"), {"do_sample": False, "repetition_penalty": 1.3}),
        (("--no-repeat-ngram-size", "2"), {"no_repeat_ngram_size": 2}),
        (("--min-new-tokens", "4"), {"min_new_tokens": 4}),
        (("--stop", "x", "--stop", "yz"), {"stop_strings": ["x", "yz"]}),
    ],
)
def test_options_reach_generate(
    run: Run, seen: list[dict[str, Any]], arguments: tuple[str, ...], kwargs: dict[str, Any]
) -> None:
    code, _, err = run(*SHORT, "Hello", *arguments)
    assert (code, err) == (0, "")
    assert {name: seen[0].get(name) for name in kwargs} == kwargs
    assert ("seed" in seen[0]) == seen[0]["do_sample"]


def test_a_seed_is_drawn_afresh_and_told(run: Run, seen: list[dict[str, Any]]) -> None:
    for _ in range(2):
        code, _, err = run(*SHORT, "Hello", "--do-sample", "--stats")
        assert code == 0 and f"seed: {seen[-1]['seed']}\n" in err
    assert len({call["seed"] for call in seen}) == 2


def test_dtype_and_device(run: Run, seen: list[dict[str, Any]]) -> None:
    assert run(*SHORT[:3], "Hello", "--dtype", "bfloat16", "--device", "cpu")[0] == 0
    assert run(*SHORT[:3], "Hello")[0] == 0
    assert [call["model"].dtype for call in seen] == [torch.bfloat16, torch.float32]


def test_models_of_ones_own(run: Run, demo_folder: Path, tiny_demo: Any) -> None:
    names = ("--base", "base", "--expert", "expert-python", "--anti-expert", "anti-expert")
    own = [str(demo_folder / name) if number % 2 else name for number, name in enumerate(names)]
    code, out, err = run(*SHORT, "Hello", *own)
    assert (code, err) == (0, "")
    assert out == expected(tiny_demo("python", dtype=torch.float64), "Hello", alpha=1.0) + "\n"
    assert run(*SHORT, "Hello", *own, "--device", "cpu")[:2] == (0, out)


def test_an_expert_alone(run: Run, demo_folder: Path, tiny_demo: Any) -> None:
    names = ("--base", str(demo_folder / "base"), "--expert", str(demo_folder / "expert-python"))
    code, out, err = run(*SHORT, "Hello", *names, "--alpha", "0.5")
    assert (code, err) == (0, "note: without --anti-expert the expert's logits are added as they are.\n")
    trio = tiny_demo("python", dtype=torch.float64)
    lone = ProxyTunedModel(trio.base, trio.expert, tokenizer=trio.tokenizer)
    assert out == expected(lone, "Hello", alpha=0.5) + "\n"
    code, out, _ = run("check", *names)
    assert code == 0 and "which is not proxy-tuning" in " ".join(out.split())
    assert run("vllm-config", *names, "--out", str(demo_folder / "out"))[2].startswith(
        "error: the anti_expert is missing"
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_as_the_expert(run: Run, demo_folder: Path, tmp_path: Path) -> None:
    small = LlamaForCausalLM.from_pretrained(demo_folder / "anti-expert")
    expert = peft.get_peft_model(small, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=1))
    expert.save_pretrained(tmp_path / "adapter")
    expert.merge_and_unload().save_pretrained(tmp_path / "merged")
    names = ("--base", str(demo_folder / "base"), "--anti-expert", str(demo_folder / "anti-expert"))
    adapter, merged = (("--expert", str(tmp_path / name)) for name in ("adapter", "merged"))
    code, out, err = run(*SHORT, "Hello", *names, *adapter)
    assert (code, err) == (0, "") and out == run(*SHORT, "Hello", *names, *merged)[1]
    code, out, _ = run("check", *names, *adapter, "--run", "--dtype", "float64")
    assert code == 0 and "one copy of weights serves both" in " ".join(out.split())
    assert "adapter, and the composite holds" in run("vllm-config", *names, *adapter, "--out", str(tmp_path / "out"))[2]


def test_a_token_tree(run: Run, tiny_demo: Any) -> None:
    """The same text from fewer cycles; refused where no drafts are compared."""
    coupled = ("--acceptance", "coupled", "--temperature", "1", "--seed", "3")
    chain = run(*SHORT, "Hello", *coupled, "--json")
    tree = run(*SHORT, "Hello", *coupled, "--num-tree-tokens", "12", "--json")
    assert (tree[0], json.loads(tree[1])["text"]) == (0, json.loads(chain[1])["text"])
    assert json.loads(tree[1])["speculation"]["num_tree_tokens"] > 0
    assert run(*SHORT, "Hello", "--temperature", "1", "--num-tree-tokens", "12")[2].startswith(
        "error: num_tree_tokens=12"
    )


def test_speed_with_a_tree_or_a_drafter(run: Run, tiny_demo: Any, seen: list[dict[str, Any]]) -> None:
    """The per-step side of the comparison has neither."""
    for further in (("--num-tree-tokens", "12"), ("--drafter", "lookup")):
        seen.clear()
        code, out, _ = run(*SHORT, "Hello", "--stats", *further)
        assert code == 0 and "same tokens as per-step" in out
        per_step = [call for call in seen if call["num_draft_tokens"] == 0]
        assert per_step and not any({"num_tree_tokens", "drafter"} & set(call) for call in per_step)


def test_an_assistant(run: Run, demo_folder: Path, tiny_demo: Any, seen: list[dict[str, Any]]) -> None:
    """A fourth model drafts, beside models of one's own and beside the embedded trio, and changes no token."""
    assistant = ("--assistant", str(demo_folder / "expert-python"), "--drafter", "assistant")
    names = ("--base", "base", "--expert", "expert-arithmetic", "--anti-expert", "anti-expert")
    own = [str(demo_folder / name) if number % 2 else name for number, name in enumerate(names)]
    for trio in ((), own):
        plain = run(*SHORT, "Hello", *trio)[1]
        code, out, err = run(*SHORT, "Hello", *trio, *assistant)
        assert (code, out, err) == (0, plain, "")
        assert seen[-1]["drafter"] == "assistant" and seen[-1]["model"].assistant.dtype == torch.float64
    out = run(*SHORT, "Hello", *own, *assistant, "--json")[1]
    assert json.loads(out)["speculation"]["drafters"]["assistant"]["num_draft_tokens"] > 0


def test_a_corpus_to_copy_from(run: Run, tiny_demo: Any, tmp_path: Path, seen: list[dict[str, Any]]) -> None:
    plain = run(*SHORT, "Hello")[1]
    (tmp_path / "known.txt").write_text(f"Hello{plain}", encoding="utf-8")
    (tmp_path / "other.txt").write_text("Something else.", encoding="utf-8")
    files = ("--corpus", str(tmp_path / "known.txt"), "--corpus", str(tmp_path / "other.txt"))
    code, out, err = run(*SHORT, "Hello", "--drafter", "lookup", *files, "--json")
    assert (code, err, json.loads(out)["text"] + "\n") == (0, "", plain)
    corpus: Any = seen[-1]["model"].corpus
    assert len(corpus) == len((tmp_path / "known.txt").read_bytes()) + len("Something else.")
    alone = json.loads(run(*SHORT, "Hello", "--drafter", "lookup", "--json")[1])
    accepted = [result["speculation"]["num_accepted_tokens"] for result in (json.loads(out), alone)]
    assert accepted[0] > accepted[1]
    assert run(*SHORT, "Hello", "--num-draft-tokens", "auto", *files)[:2] == (0, plain)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for path, message in (("bytes.txt", "is not UTF-8 text"), ("absent.txt", "No such file")):
        code, _, err = run(*SHORT, "Hello", "--drafter", "cascade", "--corpus", str(tmp_path / path))
        assert code == 2 and message in err


@pytest.mark.parametrize(
    ("options", "drafter"),
    [
        (("--drafter", "lookup", "--corpus", "known.txt"), "lookup"),
        (("--drafter", "assistant", "--assistant", "expert-python"), "assistant"),
        (("--num-tree-tokens", "12"), "tree"),
        (("--num-draft-tokens", "auto", "--drafter", "cascade"), "cascade"),
    ],
)
def test_drafters_of_a_server(
    run: Run,
    tiny_demo: Any,
    demo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    drafter: str,
) -> None:
    """The command as it is, up to the socket: its engine drafts as asked, and writes what generate writes."""
    served: list[Engine] = []
    monkeypatch.setattr("specproxy.server.run.serve", lambda app, engine, **keywords: served.append(engine))
    monkeypatch.setattr("specproxy.server.logs.configure", lambda level: None)
    plain = run(*SHORT, "Hello")[1]
    (tmp_path / "known.txt").write_text(f"Hello{plain}", encoding="utf-8")
    places = {"known.txt": tmp_path, "expert-python": demo_folder}
    code, _, err = run("serve", "--dtype=float64", *(str(places[o] / o) if o in places else o for o in options))
    assert code == 0, err
    with served[0] as engine:
        ids = engine.model.tokenizer("Hello").input_ids
        tokens = engine.submit(ids, max_new_tokens=9).result(60).tokens
        assert engine.model.tokenizer.decode(tokens, skip_special_tokens=True) + "\n" == plain
        assert set(engine.stats().speculation.drafters) == {drafter}


def test_a_tokenizer_that_lies_elsewhere(run: Run, demo_folder: Path, tiny_demo: Any, tmp_path: Path) -> None:
    shutil.copytree(demo_folder / "base", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    names = ("--base", str(tmp_path / "bare"), "--expert", str(demo_folder / "expert-python"))
    assert run(*SHORT, "Hello", *names)[2].endswith(
        f"no tokenizer was found beside --base={names[1]}; text needs one.\n"
    )
    code, out, _ = run(*SHORT, "Hello", *names, "--tokenizer", str(demo_folder / "tokenizer"))
    trio = tiny_demo("python", dtype=torch.float64)
    assert (code, out) == (
        0,
        expected(ProxyTunedModel(trio.base, trio.expert, tokenizer=trio.tokenizer), "Hello") + "\n",
    )


def test_a_strength_that_changes(run: Run, tiny_demo: Any) -> None:
    code, out, _ = run(*SHORT, "Hello", "--alpha", "3", "--alpha-cutoff", "4", "--alpha-half-life", "2")
    schedule = AlphaSchedule(cutoff=4, half_life=2)
    model = tiny_demo(dtype=torch.float64)
    assert code == 0 and out == expected(model, "Hello", alpha=3.0, alpha_schedule=schedule) + "\n"
    assert out != expected(model, "Hello", alpha=3.0) + "\n"


# Errors.

TRIO = ("--base", "b", "--expert", "e", "--anti-expert", "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--bogus"), "No such option: --bogus"),
        (("nonsense",), "No such command 'nonsense'"),
        (("generate", "a", "b"), "unexpected extra argument"),
        (("generate", "--dtype", "int8"), "'float32', 'bfloat16'"),
        (("generate", "--max-new-tokens", "x"), "--max-new-tokens"),
        (("generate", "--json", "--stream"), "--json and --stream exclude each other"),
        (("generate", "--base", "b", "x"), "go together; missing: --expert"),
        (("generate", *TRIO[2:], "x"), "go together; missing: --base"),
        (("generate", *TRIO[4:], "x"), "go together; missing: --base, --expert"),
        (("generate", "--alpha-cutoff", "-1"), "cutoff=-1"),
        (("generate", "--tokenizer", "t", "x"), "--tokenizer=t serves models of your own"),
        (("generate", "--drafter", "assistant", "x"), "needs a model that drafts; name one by --assistant"),
        (("generate", "--assistant", "m", "x"), "--assistant=m drafts under --drafter=assistant only"),
        (("chat", "--assistant", "m", "--drafter", "lookup"), "--assistant=m drafts under --drafter=assistant only"),
        (("serve", "--drafter", "nobody"), "drafter='nobody' is not known"),
        (("serve", "--drafter", "assistant"), "needs a model that drafts; name one by --assistant"),
        (
            ("serve", "--num-draft-tokens", "auto", "--num-tree-tokens", "4"),
            "needs num_draft_tokens as the tree's depth",
        ),
        (("serve", "--corpus", "c.txt"), "--corpus=c.txt serves lookup; add --drafter=lookup, or cascade"),
        (("compare", "--drafter", "assistant"), "needs a model that drafts; name one by --assistant"),
        (("analyze", "--drafter", "nobody"), "drafter='nobody' is not known"),
        (("vllm-config", "--assistant", "m", "--out", "o"), "--assistant=m: in vLLM the expert drafts"),
        (("generate", "--alpha-floor", "0.5"), "floor=0.5 bounds a decay"),
        (("generate", *TRIO, "--demo", "python", "x"), "--demo and --base, --expert, --anti-expert exclude"),
        (("generate", *TRIO), "models of your own need a prompt"),
        (("generate", "--demo", "poetry"), "--demo=poetry is not a task; use one of arithmetic, python"),
        (("generate", "--top-p", "0.5"), "--top-p changes nothing in greedy decoding"),
        (("generate", "--top-k", "5", "--min-p", "0.5"), "--top-k, --min-p changes nothing"),
        (("generate", "--temperature", "-1"), "temperature=-1.0 must be above 0"),
        (("generate", "--temperature", "0", "--do-sample"), "temperature=0.0 must be above 0"),
        (("generate", "--do-sample", "--top-p", "1.5"), "top_p=1.5 must be in (0, 1]"),
        (("generate", "--num-draft-tokens", "many"), "num_draft_tokens='many'"),
        (("generate", "--num-draft-tokens", "-1"), "num_draft_tokens=-1"),
        (("generate", "--acceptance", "hope"), "acceptance='hope' is not a rule"),
        (("generate", "--max-new-tokens", "0"), "max_new_tokens=0"),
        (("generate", "--max-new-tokens", "400"), "exceeds its 256 positions"),
        (("generate", "--alpha", "nan"), "alpha=nan"),
        (("generate", "--min-new-tokens", "129"), "min_new_tokens=129 exceeds max_new_tokens=128"),
        (("generate", "--stop", ""), "stop_strings=['']"),
        (("generate", "--device", "abacus"), "--device=abacus cannot be used"),
        (("generate", ""), "the prompt is empty"),
        (("generate", "-"), "the prompt is empty"),
        (("generate", "x", "--prompt-file", "y"), "PROMPT and --prompt-file exclude each other"),
        (("generate", "--prompt-file", "absent.txt"), "absent.txt"),
        (("generate", *(f"./{name}" if name[0] != "-" else name for name in TRIO), "x"), "./b"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith("prompt: ")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ") and message in lines[0]


def test_prompt_that_is_not_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    for arguments in (("-",), ("--prompt-file", str(tmp_path / "prompt"))):
        code, out, err = run("generate", *arguments, stdin=b"\xff\xfe")
        assert (code, out) == (2, "") and err.startswith("error: the prompt is not UTF-8 text")


def test_a_model_that_fails_is_an_error(run: Run, tiny_demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tiny_demo()
    with torch.no_grad():
        broken.base.lm_head.weight.fill_(float("nan"))
    monkeypatch.setattr(ProxyTunedModel, "demo", lambda task, **kwargs: broken)
    code, out, err = run("generate", "Hello", "--json")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and "base" in err


def test_other_exceptions_are_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(ProxyTunedModel, "generate", fail)
    with pytest.raises(ZeroDivisionError):
        run("generate", "Hello")


# The report.


def stats_of(sources: list[str]) -> SpeculationStats:
    stats = SpeculationStats(token_sources=[sources])
    stats.record(num_drafted=2, num_accepted=1, num_emitted=2)
    stats.record(num_drafted=2, num_accepted=0, num_emitted=1)
    return stats


def test_stats_show_everything(run: Run) -> None:
    code, out, err = run(*SHORT, "Hello", "--stats")
    assert (code, err) == (0, "")
    _, line, _ = run(*SHORT, "Hello", "--json")
    result = json.loads(line)
    assert out.startswith(f"Hello{result['text']}\n")
    speculation = result["speculation"]
    accepted, drafted = speculation["num_accepted_tokens"], speculation["num_draft_tokens"]
    for pattern in (
        rf"acceptance rate .* {accepted / drafted:.1%} \({accepted} of {drafted}\)",
        rf"bonus included .* {speculation['mean_acceptance_length']:.2f} tokens a cycle",
        rf"without bonus .* {speculation['mean_acceptance_length_without_bonus']:.2f} tokens a cycle",
        r"per-step speed, same run .* \d+\.\d tokens/s",
        r"median ratio, 5 pairs timed .* \d+\.\d\d times per-step",
        r"same tokens as per-step .* yes",
        *(rf" {i} │ .*% of {count} " for i, count in enumerate(speculation["drafted_per_position"], start=1)),
    ):
        assert re.search(pattern, out), pattern


def test_stats_time_pairs_after_a_warm_up(run: Run, seen: list[dict[str, Any]]) -> None:
    run(*SHORT, "Hello", "--stats", "--num-draft-tokens", "3")
    counts = [call["num_draft_tokens"] for call in seen[1:]]
    assert len(counts) == 2 * (command.REPEATS + 1)
    pairs = [tuple(counts[i : i + 2]) for i in range(0, len(counts), 2)]
    assert set(pairs) == {(0, 3), (3, 0)}  # the order alternates


def test_stats_do_not_time_for_long(run: Run, seen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TIME_LIMIT", 0.0)
    code, out, _ = run(*SHORT, "Hello", "--stats")
    assert code == 0 and "median ratio, 1 pairs timed" in out and len(seen) == 5


def test_sampled_tokens_are_compared_only_where_they_must_agree(run: Run) -> None:
    sampled = (*SHORT, "Hello", "--do-sample", "--seed", "1", "--stats")
    assert "same tokens" not in run(*sampled)[1]
    assert re.search("same tokens as per-step .* yes", run(*sampled, "--acceptance", "coupled")[1])


def test_stats_of_per_step_decoding(run: Run, seen: list[dict[str, Any]]) -> None:
    code, out, _ = run(*SHORT, "Hello", "--stats", "--num-draft-tokens", "0")
    assert code == 0 and "nothing drafted" in out and "times per-step" not in out and "by draft position" not in out
    assert len(seen) == 1


def test_colours_tell_who_proposed() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=100, legacy_windows=False)
    print_report(console, "[b]P", ["x", "[y]", "z"], stats_of(["draft", "target", "target"]), None)
    first = out.getvalue().splitlines()[0]
    assert first == "\x1b[2m[b]P\x1b[0m\x1b[32mx\x1b[0m\x1b[1;35m[y]\x1b[0m\x1b[1;35mz\x1b[0m"  # no markup is read
    assert "1 drafted and accepted" in out.getvalue() and "2 from the target" in out.getvalue()


@pytest.mark.parametrize(("encoding", "bar"), [("utf-8", "█"), ("ascii", "#")])
def test_bars_show_the_share_of_each_position(encoding: str, bar: str) -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding) as out:
        print_report(Console(file=out, width=100), "", ["x", "y", "z"], stats_of(["draft", "target", "target"]), None)
        out.flush()
        lines = raw.getvalue().decode(encoding).splitlines()
    bars = {line.split()[1]: (line.count(bar), line) for line in lines if "% of" in line}
    assert {position: count for position, (count, _) in bars.items()} == {"1": 12, "2": 0}
    assert "50% of 2" in bars["1"][1] and "0% of 2" in bars["2"][1]


def test_ratio_is_the_median_of_pairs() -> None:
    assert Comparison([10.0, 30.0, 8.0], [5.0, 10.0, 8.0], None).ratio == 2.0


def test_pieces_hold_back_unfinished_characters(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "aé€ 😀b"
    ids = byte_tokenizer(text).input_ids
    pieces = split_tokens(byte_tokenizer, ids)
    assert pieces == ["a", "", "é", "", "", "€", " ", "", "", "", "😀", "b"]
    assert split_tokens(byte_tokenizer, [*ids, byte_tokenizer.eos_token_id]) == [*pieces, ""]
    assert "".join(split_tokens(byte_tokenizer, ids[:2])) == byte_tokenizer.decode(ids[:2])  # cut inside a character
    assert split_tokens(byte_tokenizer, []) == []


# The program as it is started.


def start(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "specproxy", *arguments],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"},
        timeout=300,
        check=False,
    )


def test_module_can_be_started() -> None:
    done = start("generate", "--json", "--stream")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: --json and --stream")


def test_embedded_trio_end_to_end() -> None:
    """Sums in the tuned format; drafts are taken far more often than from untrained models, whose rate is near 0."""
    prompt = demo.example_prompts("arithmetic")[0]
    done = start("generate", "-", "--json", "--max-new-tokens", "48", stdin=prompt)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert re.search(r"\d+ [-+*] \d+ = \d+", result["text"]), result["text"]
    assert result["speculation"]["acceptance_rate"] > 0.7
