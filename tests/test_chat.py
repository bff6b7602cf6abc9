"""Chat: the prompt that each role really reads, several turns, errors; then the command."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import tiny
import torch

from specproxy import ConfigurationError, PromptError, ProxyTunedModel, cli
from specproxy.chat import check_messages, render_prompt
from specproxy.commands import chat as command

CHAT = (
    "{% for m in messages %}w1{{ loop.index }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w20{% endif %}"
)
OTHER = "{% for m in messages %}w30 {{ m.content }} {% endfor %}w31"
HELLO = [{"role": "user", "content": "w5 w6"}]


class Terminal(io.StringIO):
    """Standard input that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def model() -> ProxyTunedModel:
    """A tiny trio whose tokenizer has a chat template; the expert's has another."""
    tokenizer, expert_tokenizer = tiny.tiny_tokenizer(), tiny.tiny_tokenizer()
    tokenizer.chat_template, expert_tokenizer.chat_template = CHAT, OTHER
    return ProxyTunedModel(*tiny.shared_trio("llama").models, tokenizer=tokenizer, expert_tokenizer=expert_tokenizer)


@pytest.fixture
def prompts(model: ProxyTunedModel, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Text of the first tokens that every model reads in each call, by role: what went through its layers."""
    seen: dict[str, list[str]] = {"base": [], "expert": [], "anti_expert": []}
    for role in seen:
        network = getattr(model, role)

        def forward(*args: Any, _role: str = role, _forward: Any = network.forward, **kwargs: Any) -> Any:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            seen[_role].append(" ".join(f"w{i}" for i in ids[0].tolist()))
            return _forward(*args, **kwargs)

        monkeypatch.setattr(network, "forward", forward)
    return seen


def first(seen: dict[str, list[str]]) -> dict[str, str]:
    """Per role, the prompt: the first forward, which may hold it but for its last token, and that token."""
    return {role: " ".join(texts) for role, texts in seen.items()}


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ({}, ("w11 w5 w6 w20", "w30 w5 w6 w31", "w11 w5 w6 w20")),
        ({"base_template": "raw"}, ("w5 w6", "w30 w5 w6 w31", "w5 w6")),
        ({"base_template": "raw", "anti_expert_template": "chat"}, ("w5 w6", "w30 w5 w6 w31", "w11 w5 w6 w20")),
        ({"expert_template": "raw"}, ("w11 w5 w6 w20", "w5 w6", "w11 w5 w6 w20")),
        ({"expert_template": "w9 {{ messages[-1].content }}"}, ("w11 w5 w6 w20", "w9 w5 w6", "w11 w5 w6 w20")),
        ({"anti_expert_template": lambda messages: f"w8 {len(messages)}"}, ("w11 w5 w6 w20", "w30 w5 w6 w31", "w8 w2")),
    ],
)
def test_each_role_reads_its_own_prompt(
    model: ProxyTunedModel, prompts: dict[str, list[str]], templates: dict[str, Any], expected: tuple[str, ...]
) -> None:
    model.chat(HELLO, max_new_tokens=3, num_draft_tokens=0, **templates)
    read = first(prompts)
    assert {role: read[role][: len(text)] for role, text in zip(read, expected, strict=True)} == dict(
        zip(read, expected, strict=True)
    )


def test_answer_is_what_generate_gives_for_those_prompts(model: ProxyTunedModel) -> None:
    reply = model.chat(HELLO, max_new_tokens=6)
    ids = {text: model.tokenizer(text, return_tensors="pt").input_ids for text in ("w11 w5 w6 w20", "w30 w5 w6 w31")}
    base, expert = ids.values()
    expected = model.generate(base, expert_input_ids=expert, max_new_tokens=6)
    assert torch.equal(reply.output.sequences, expected)
    assert reply.text == model.tokenizer.decode(expected[0, base.shape[1] :], skip_special_tokens=True)
    assert reply.output.speculation.num_new_tokens == 6


def test_a_pad_id_in_front_belongs_to_the_prompt(model: ProxyTunedModel) -> None:
    """A template may begin with the token that also fills padded rows."""
    model.base.generation_config.pad_token_id = 0
    try:
        reply = model.chat(HELLO, base_template="<pad> {{ messages[0].content }}", max_new_tokens=6)
        ids = reply.output.sequences[:, :3]
        expert = model.tokenizer("w30 w5 w6 w31", return_tensors="pt").input_ids
        expected = model.generate(ids, torch.ones_like(ids), expert_input_ids=expert, max_new_tokens=6)
        assert ids.tolist() == [[0, 5, 6]] and torch.equal(reply.output.sequences, expected)
    finally:
        model.base.generation_config.pad_token_id = None


def test_turns_follow_each_other(model: ProxyTunedModel) -> None:
    opening = [{"role": "system", "content": "w7"}, *HELLO]
    one = model.chat(opening, max_new_tokens=4)
    assert one.messages == [*opening, {"role": "assistant", "content": one.text}]
    two = model.chat([*one.messages, {"role": "user", "content": "w8"}], max_new_tokens=4)
    assert [message["role"] for message in two.messages] == ["system", "user", "assistant", "user", "assistant"]
    prompt = model.tokenizer.decode(two.output.sequences[0, :-4])
    assert prompt == f"w11 w7 w12 w5 w6 w13 {one.text} w14 w8 w20"
    assert opening == [{"role": "system", "content": "w7"}, *HELLO]  # the caller's list is left alone


def test_sampling_and_draft_length(model: ProxyTunedModel) -> None:
    settings = {"do_sample": True, "seed": 5, "acceptance": "coupled", "max_new_tokens": 8}
    texts = {model.chat(HELLO, num_draft_tokens=count, **settings).text for count in (0, 3)}
    assert len(texts) == 1


def test_without_a_template_contents_are_read_raw() -> None:
    model = ProxyTunedModel(*tiny.shared_trio("llama").models, tokenizer=tiny.tiny_tokenizer())
    reply = model.chat([{"role": "system", "content": "w4"}, *HELLO], max_new_tokens=2)
    assert reply.output.sequences[0, :-2].tolist() == [4, 5, 6]
    messages = check_messages([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert render_prompt(messages, None, model.tokenizer, "base_template") == ("Be brief.\n\nHi", True)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        (["hello"], r"messages\[0\]='hello' needs a role"),
        ([{"role": "wizard", "content": "x"}], r"messages\[0\].* needs a role among system, user, assistant"),
        ([*HELLO, {"role": "user"}], r"messages\[1\].* needs text"),
        ([{"role": "user", "content": 3}], r"messages\[0\].* needs text"),
        ([*HELLO, {"role": "assistant", "content": "x"}], "end with the assistant's turn"),
    ],
)
def test_malformed_conversations(model: ProxyTunedModel, messages: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        model.chat(messages)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"base_template": "chta"}, "base_template='chta' prints no message"),
        ({"expert_template": "{{ messages"}, "expert_template cannot be rendered"),
        ({"anti_expert_template": "{{ raise_exception('no') }}"}, "anti_expert_template cannot be rendered: no"),
    ],
)
def test_unusable_templates(model: ProxyTunedModel, templates: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        model.chat(HELLO, **templates)


def test_what_is_missing_is_named() -> None:
    models = tiny.shared_trio("llama").models
    with pytest.raises(ConfigurationError, match="tokenizer=None"):
        ProxyTunedModel(*models).chat(HELLO)
    with pytest.raises(ConfigurationError, match='expert_template="chat", but the tokenizer has no chat template'):
        ProxyTunedModel(*models, tokenizer=tiny.tiny_tokenizer()).chat(HELLO, expert_template="chat")
    with pytest.raises(ConfigurationError, match="no_such_argument"):
        ProxyTunedModel(*models, tokenizer=tiny.tiny_tokenizer()).chat(HELLO, no_such_argument=1)


# The command.


@pytest.fixture
def talk(model: ProxyTunedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`specproxy chat` with the tiny trio; gives exit code, standard output and standard error."""
    monkeypatch.setattr(command, "load", lambda models, where, drafting: model)

    def call(text: str | bytes, *options: str, terminal: bool = False) -> tuple[int, str, str]:
        raw = text.encode() if isinstance(text, str) else text
        stdin = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", Terminal(raw.decode()) if terminal else stdin)
        capsys.readouterr()
        code = cli.main(
            ["chat", "--base", "b", "--expert", "e", "--anti-expert", "a", "--max-new-tokens", "5", *options]
        )
        return code, *capsys.readouterr()

    return call


def test_a_piped_conversation(talk: Any, model: ProxyTunedModel) -> None:
    one = model.chat(HELLO, max_new_tokens=5)
    two = model.chat([*one.messages, {"role": "user", "content": "w7"}], max_new_tokens=5)
    code, out, err = talk("w5 w6\n\n  w7 \n")
    assert (code, out, err) == (0, f"{one.text}\n{two.text}\n", "> w5 w6\n> w7\n")
    assert talk("") == (0, "", "")


def test_reset_and_quit(talk: Any, model: ProxyTunedModel) -> None:
    one = model.chat(HELLO, max_new_tokens=5).text
    code, out, err = talk("w5 w6\n/reset\nw5 w6\n/quit\nw9\n")
    assert (code, out) == (0, f"{one}\n{one}\n")
    assert err == "> w5 w6\n> /reset\n(the conversation starts anew)\n> w5 w6\n> /quit\n"


def test_system_message_and_templates(talk: Any, model: ProxyTunedModel) -> None:
    system = {"role": "system", "content": "w3"}
    templates = {"base_template": "raw", "expert_template": "w9 {{ messages[-1].content }}"}
    expected = model.chat([system, *HELLO], max_new_tokens=5, **templates).text
    options = [f"--{name.replace('_', '-')}={value}" for name, value in templates.items()]
    assert talk("w5 w6\n/reset\nw5 w6\n", "--system", "w3", *options)[1] == f"{expected}\n{expected}\n"
    assert talk("w5 w6\n")[1] != f"{expected}\n"


def test_decoding_options(talk: Any, model: ProxyTunedModel) -> None:
    settings = {"do_sample": True, "seed": 3, "acceptance": "coupled", "temperature": 0.8}
    expected = model.chat(HELLO, max_new_tokens=5, **settings).text
    options = ("--temperature", "0.8", "--seed", "3", "--acceptance", "coupled", "--num-draft-tokens", "2")
    assert talk("w5 w6\n", *options)[1] == f"{expected}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--base-template", "chta"), "base_template='chta' prints no message"),
        (("--expert-template", "{{ x"), "expert_template cannot be rendered"),
        (("--top-p", "0.5"), "--top-p changes nothing"),
        (("--num-draft-tokens", "many"), "num_draft_tokens='many'"),
        (("--json",), "No such option: --json"),
        (("--max-new-tokens", "200"), "positions"),
    ],
)
def test_command_errors_are_one_line(talk: Any, options: tuple[str, ...], message: str) -> None:
    code, out, err = talk("w5 w6\n", *options)
    lines = [line for line in err.splitlines() if not line.startswith("> ")]
    assert (code, out, len(lines)) == (2, "", 1) and lines[0].startswith("error: ") and message in lines[0]


def test_unknown_command_ends_a_pipe_only(talk: Any, model: ProxyTunedModel) -> None:
    code, out, err = talk("/help\nw5 w6\n")
    assert (code, out) == (2, "") and "error: /help is no command; use /reset or /quit." in err
    code, out, err = talk("/help\nw5 w6\n", terminal=True)
    assert code == 0 and "error: /help is no command" in err
    assert model.chat(HELLO, max_new_tokens=5).text in out


def test_a_terminal_survives_errors_and_interruptions(
    talk: Any, model: ProxyTunedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = ProxyTunedModel.chat, []

    def chat(self: ProxyTunedModel, messages: Any, **arguments: Any) -> Any:
        calls.append(len(messages))
        if len(calls) == 1:
            raise KeyboardInterrupt
        if len(calls) == 2:
            raise PromptError("too long")
        return original(self, messages, **arguments)

    monkeypatch.setattr(ProxyTunedModel, "chat", chat)
    code, _, err = talk("w5\nw6\nw7\nw8\n", terminal=True)
    assert code == 0 and calls == [1, 1, 1, 3]  # what failed is forgotten
    assert "interrupted" in err and "error: too long" in err


def test_input_that_is_not_text(talk: Any) -> None:
    code, out, err = talk(b"\xff\xfe\n")
    assert (code, out) == (2, "") and err.startswith("error: standard input is not UTF-8 text")
