"""The composite folder for vLLM and the command that writes it. vLLM itself is met in tests/vllm_engine."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer, GenerationConfig

from specproxy import ConfigurationError, ProxyTunedModel, UnsupportedModelError, VocabularyError, cli, demo
from specproxy.integrations.vllm import composite
from specproxy.theory import best_num_draft_tokens
from specproxy_kernels.laws import unpack_allowed_tokens

ROLES = ("base", "expert", "anti_expert")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama trio of padded widths whose tokenizers lack id 5, and models that cannot take part."""
    path = tmp_path_factory.mktemp("models")
    trio = tiny.make_trio("llama", vocab_sizes=(48, 44, 46), overrides=({"max_position_embeddings": 200}, {}, {}))
    for name, model in zip(ROLES, trio.models, strict=True):
        model.save_pretrained(path / name)
        tiny.tiny_tokenizer(40, missing=(5,)).save_pretrained(path / name)
    GenerationConfig(eos_token_id=[1, 7], pad_token_id=0, do_sample=True, temperature=0.3).save_pretrained(
        path / "base"
    )
    GenerationConfig(eos_token_id=9).save_pretrained(path / "expert")
    trio.expert.save_pretrained(path / "other_tokenizer")
    tiny.tiny_tokenizer(renamed={7: "seven"}).save_pretrained(path / "other_tokenizer")
    trio.expert.save_pretrained(path / "bare")
    for kind in ("t5", "mamba", "qwen3_next"):
        tiny.tiny_model(kind).save_pretrained(path / kind)
    (path / "unknown").mkdir()
    (path / "unknown/config.json").write_text(json.dumps({"model_type": "abacus"}))
    (path / "no_weights").mkdir()
    (path / "no_weights/config.json").write_bytes((path / "base/config.json").read_bytes())
    return path


def names_of(models: Path, **roles: str) -> dict[str, str]:
    return {role: str(models / roles.get(role, role)) for role in ROLES}


def write(models: Path, folder: Path, alpha: float = 1.0) -> tuple[composite.Composite, dict[str, Any]]:
    names = names_of(models)
    written = composite.write_composite(folder, names, composite.inspect_roles(names), alpha)
    return written, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_folder_describes_one_model(models: Path, tmp_path: Path) -> None:
    written, config = write(models, tmp_path / "out", alpha=0.7)
    base = tiny.make_trio("llama").base.config
    assert config["architectures"] == ["ProxyTunedForCausalLM"] and config["model_type"] == "llama"
    assert (config["num_hidden_layers"], config["hidden_size"]) == (base.num_hidden_layers, base.hidden_size)
    assert config["vocab_size"] == 44 == written.width  # the expert's: the draft's width must be the target's
    assert config["max_position_embeddings"] == 128  # the pair's: smaller than the base's 200
    assert (written.alpha, written.widths) == (0.7, {"base": 48, "expert": 44, "anti_expert": 46})
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny.tiny_tokenizer(40, missing=(5,)).get_vocab()
    )
    ends = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (ends.eos_token_id, ends.pad_token_id, ends.temperature) == ([1, 7, 9], 0, None)


def test_folder_links_to_the_models_and_copies_none(models: Path, tmp_path: Path) -> None:
    written, _ = write(models, tmp_path / "out")
    for role in ROLES:
        link = Path(written.names[role])
        assert link.is_symlink() and link.parent == tmp_path / "out" and link.resolve() == (models / role).resolve()
    own = [path for path in (tmp_path / "out").iterdir() if not path.is_symlink()]
    assert not any(path.suffix in (".safetensors", ".bin") for path in own)


def test_shared_ids_are_those_of_the_model(models: Path, tmp_path: Path) -> None:
    """Ids that no tokenizer knows are closed in the composite as they are in `ProxyTunedModel`."""
    written, config = write(models, tmp_path / "out")
    assert config["proxy_tuning"]["excluded_ids"] == [5] and written.vocabulary.size == 40
    names = names_of(models)
    model = ProxyTunedModel.from_pretrained(names.pop("base"), **names, progress=False)
    closed = model(torch.tensor([[3, 4]])).logits[0, -1].isneginf()
    assert written.vocabulary.allowed is not None
    assert torch.equal(~unpack_allowed_tokens(written.vocabulary.allowed[0, 0], 40), closed)


def test_names_of_a_hub_stay_names(tmp_path: Path) -> None:
    config = {"proxy_alpha": 1, "proxy_tuning": {"shared_ids": 8, "excluded_ids": []}}
    config["proxy_tuning"] |= {"models": {role: f"owner/{role}" for role in ROLES}, "widths": dict.fromkeys(ROLES, 8)}
    read = composite.read_composite(config, tmp_path)
    assert read.names == {role: f"owner/{role}" for role in ROLES} and read.vocabulary.allowed is None


@pytest.mark.parametrize(
    ("roles", "error", "message"),
    [
        ({"expert": "absent"}, ConfigurationError, r"^expert=\S+absent cannot be read: "),
        ({"base": "no_weights"}, ConfigurationError, r"^base=\S+no_weights holds no weights"),
        (
            {"expert": "other_tokenizer"},
            VocabularyError,
            "id 7 is 'w7' for the base and 'seven'",
        ),
        ({"base": "t5"}, UnsupportedModelError, r"^base=\S+t5: t5 is an encoder-decoder"),
        ({"anti_expert": "mamba"}, UnsupportedModelError, "^anti_expert: MambaForCausalLM has"),
        (
            {"base": "qwen3_next"},
            UnsupportedModelError,
            "^base: Qwen3NextForCausalLM has layers of type linear",
        ),
        ({"base": "unknown"}, UnsupportedModelError, r"^base=\S+unknown: The checkpoint .* `abacus`"),
    ],
)
def test_what_cannot_run_is_refused(models: Path, roles: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        composite.inspect_roles(names_of(models, **roles))


def test_a_model_without_tokenizer_anywhere_is_refused(models: Path, tmp_path: Path) -> None:
    names = dict.fromkeys(ROLES, str(models / "bare"))
    with pytest.raises(ConfigurationError, match="no tokenizer was found"):
        composite.write_composite(tmp_path / "out", names, composite.inspect_roles(names))


def test_a_composite_is_replaced_and_nothing_else_is(models: Path, tmp_path: Path) -> None:
    write(models, tmp_path / "out", alpha=0.5)
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/expert").unlink()
    (tmp_path / "out/expert").symlink_to(models / "bare")
    assert write(models, tmp_path / "out", alpha=2.0)[1]["proxy_alpha"] == 2.0
    assert (tmp_path / "out/expert").resolve() == (models / "expert").resolve()
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    assert "notes.txt" not in write(models, tmp_path / "out")[1]["proxy_tuning"]["files"]
    before = sorted(path.name for path in (models / "base").iterdir())
    with pytest.raises(ConfigurationError, match="holds something else"):
        write(models, models / "base")
    assert sorted(path.name for path in (models / "base").iterdir()) == before


@pytest.mark.parametrize("missing", ["proxy_alpha", "proxy_tuning"])
def test_another_models_configuration_is_refused(models: Path, tmp_path: Path, missing: str) -> None:
    _, config = write(models, tmp_path / "out")
    del config[missing]
    with pytest.raises(ConfigurationError, match=f"is no composite's: .* lacks '{missing}'"):
        composite.read_composite(config, tmp_path)


def test_speculative_config_asks_for_exact_acceptance(models: Path, tmp_path: Path) -> None:
    written, _ = write(models, tmp_path / "out")
    assert composite.speculative_config(written, 3) == {
        "method": "draft_model",
        "model": str(tmp_path / "out/expert"),
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
    }
    with pytest.raises(ConfigurationError, match="num_draft_tokens=0"):
        composite.speculative_config(written, 0)


# The command.


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["vllm-config", *arguments])
    return code, *capsys.readouterr()


def own(models: Path, **roles: str) -> list[str]:
    return [f"--{role.replace('_', '-')}={name}" for role, name in names_of(models, **roles).items()]


def speculation(out: str) -> dict[str, Any]:
    """The JSON of the printed command."""
    words = shlex.split(out)
    return json.loads(words[words.index("--speculative-config") + 1])  # type: ignore[no-any-return]


def test_command_writes_and_prints(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a folder"
    code, out, err = run(capsys, *own(models), f"--out={folder}", "--alpha=0.5", "--num-speculative-tokens=3")
    assert code == 0 and out.count("\n") == 1 and err.startswith(f"wrote {folder}: alpha 0.5, 40 shared ids\n")
    assert shlex.split(out)[:3] == ["vllm", "serve", str(folder)]
    assert speculation(out)["num_speculative_tokens"] == 3 and speculation(out)["model"] == str(folder / "expert")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["proxy_alpha"] == 0.5


@pytest.mark.parametrize(("acceptance", "cost_ratio"), [(None, None), (0.9, 0.05), (0.6, None), (None, 0.1)])
def test_auto_is_the_theory(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    acceptance: float | None,
    cost_ratio: float | None,
) -> None:
    given = [] if acceptance is None else [f"--acceptance={acceptance}"]
    given += [] if cost_ratio is None else [f"--cost-ratio={cost_ratio}"]
    code, out, err = run(capsys, *own(models), f"--out={tmp_path / 'out'}", *given)
    base, expert, _ = tiny.make_trio("llama", vocab_sizes=(48, 44, 46)).models
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (expert, base)]
    count = best_num_draft_tokens(acceptance or 0.8, cost_ratio or sizes[0] / sizes[1])
    assert code == 0 and f"\n{count} drafts a cycle" in err
    assert speculation(out)["num_speculative_tokens"] == count


def test_no_drafts_no_speculation(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--num-speculative-tokens=0"], ["--acceptance=0"]):
        code, out, _ = run(capsys, *own(models), f"--out={tmp_path / 'out'}", *given)
        assert (code, out) == (0, f"vllm serve {tmp_path / 'out'}\n")


def test_the_embedded_trio_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, f"--out={tmp_path / 'out'}")
    assert code == 0 and f"alpha {demo.alpha('arithmetic'):g}, 2048 shared ids" in err
    assert (tmp_path / "out/expert").resolve().name == "expert-arithmetic"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--num-speculative-tokens=many"], "--num-speculative-tokens=many is no number"),
        (["--num-speculative-tokens=3", "--acceptance=0.5"], "serve --num-speculative-tokens=auto only"),
        (["--acceptance=1.5"], "--acceptance=1.5 is no rate"),
        (["--cost-ratio=0"], "--cost-ratio=0.0 is no ratio"),
        (["--alpha=nan"], "alpha=nan"),
        (["--expert=/absent/folder"], "expert=/absent/folder cannot be read"),
    ],
)
def test_command_reports_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    code, out, err = run(capsys, *own(models), f"--out={tmp_path / 'out'}", *given)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and message in err
    assert not (tmp_path / "out").exists()


def test_nothing_here_imports_vllm() -> None:
    """Neither the package nor the command, and the plugin's module only when vLLM calls it."""
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "import specproxy, specproxy.cli, specproxy.integrations.vllm\n"
        "try: specproxy.integrations.vllm.register()\n"
        "except ImportError: print('register imports vllm')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "register imports vllm\n"
