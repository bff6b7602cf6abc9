"""Every wrong input is one clear error of the package's tree: it names argument, value and remedy."""

from __future__ import annotations

import re
from typing import Any

import oracle
import pytest
import tiny
import torch
from support import PAD, Recorder, RolePrompts, greedy_rows, role_prompts

from specproxy import (
    ConfigurationError,
    LogitsError,
    PromptError,
    ProxyTunedModel,
    SpecProxyError,
    UnsupportedModelError,
    VocabularyError,
)

REMEDY = re.compile(
    r"\b(must|use|pass|give|set|choose|pick|only|need|needs|should|expected|drop|remove|encode|load|stream|ask|shorten|lower|raise|left|reduce)\b"
)
IDS = torch.tensor([[5, 6, 7, 8]])
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    return ProxyTunedModel(*tiny.shared_trio("llama").models)


def fails(error: type[Exception] | tuple[type[Exception], ...], *mentions: str) -> Any:
    """Expect one of the tree's errors whose message mentions all of these and a remedy."""

    class Expectation:
        def __enter__(self) -> None:
            self.raises = pytest.raises(SpecProxyError)
            self.info = self.raises.__enter__()

        def __exit__(self, *exc: Any) -> bool:
            if not self.raises.__exit__(*exc):
                return False
            assert isinstance(self.info.value, error), f"{type(self.info.value).__name__}: {self.info.value}"
            message = str(self.info.value).replace("anti-expert", "anti_expert")
            for mention in mentions:
                assert mention in message, f"{mention!r} is not in {message!r}"
            assert REMEDY.search(message), f"no remedy in {message!r}"
            return True

    return Expectation()


def test_the_tree():
    for error in (ConfigurationError, PromptError, VocabularyError, UnsupportedModelError):
        assert issubclass(error, SpecProxyError) and issubclass(error, ValueError)
    assert issubclass(LogitsError, SpecProxyError) and issubclass(LogitsError, RuntimeError)
    assert not issubclass(SpecProxyError, ValueError)


@pytest.mark.parametrize("value", [-1, 2.5, True, False, "fast", None, NAN])
def test_num_draft_tokens(model, value):
    with fails(ConfigurationError, "num_draft_tokens", repr(value)):
        model.generate(IDS, num_draft_tokens=value)


@pytest.mark.parametrize("value", [NAN, INF, -INF, "strong", True])
def test_alpha(model, value):
    with fails(ConfigurationError, "alpha", repr(value)):
        model.generate(IDS, alpha=value)
    with fails(ConfigurationError, "alpha", repr(value)):
        ProxyTunedModel(*tiny.shared_trio("llama").models, alpha=value)


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "5"])
def test_max_new_tokens(model, value):
    with fails(ConfigurationError, "max_new_tokens", repr(value)):
        model.generate(IDS, max_new_tokens=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", NAN),
        ("temperature", INF),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_p", NAN),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", NAN),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.2),
        ("repetition_penalty", INF),
        ("temperature", "warm"),
    ],
)
def test_sampling_values(model, name, value):
    with fails(ConfigurationError, name, repr(value)):
        model.generate(IDS, do_sample=True, **{name: value})


@pytest.mark.parametrize("value", ["fast", "", None, 3])
def test_acceptance(model, value):
    with fails(ConfigurationError, "acceptance", repr(value), "rejection", "block", "coupled"):
        model.generate(IDS, acceptance=value)


def test_unhashable_acceptance(model):
    with fails(ConfigurationError, "acceptance"):
        model.generate(IDS, acceptance=["rejection"])


@pytest.mark.parametrize("value", ["yes", 1])
def test_do_sample(model, value):
    with fails(ConfigurationError, "do_sample", repr(value)):
        model.generate(IDS, do_sample=value)


@pytest.mark.parametrize("value", [[1, 2], [], (1, 2, 3), "seed", 1.5, [1.5], [None], True])
def test_seed(model, value):
    with fails(ConfigurationError, "seed"):
        model.generate(IDS, do_sample=True, seed=value)


def test_seed_of_wrong_length_names_both_lengths(model):
    with fails(ConfigurationError, "seed", "3", "2"):
        model.generate(IDS.expand(2, -1), do_sample=True, seed=[1, 2, 3])


@pytest.mark.parametrize("name", ["foo", "num_draft_token", "max_length", "assistant_model", "generation_config"])
def test_unknown_keywords(model, name):
    with fails(ConfigurationError, name):
        model.generate(IDS, **{name: 3})


@pytest.mark.parametrize("value", [2, 5])
def test_beams_are_refused_as_such(model, value):
    with fails(ConfigurationError, "num_beams", "beam"):
        model.generate(IDS, num_beams=value)


@pytest.mark.parametrize("value", [1.5, "</s>", [3, "x"], -1, True])
def test_end_of_text_ids(model, value):
    with fails(ConfigurationError, "eos_token_id"):
        model.generate(IDS, eos_token_id=value)


# Prompts


def test_no_columns(model):
    with fails(PromptError, "input_ids"):
        model.generate(torch.empty(1, 0, dtype=torch.long))


def test_no_rows(model):
    with fails(PromptError, "input_ids"):
        model.generate(torch.empty(0, 4, dtype=torch.long))


@pytest.mark.parametrize("role", ["", "expert_", "anti_expert_"])
def test_a_row_without_tokens(model, role):
    ids = IDS.expand(3, -1)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    arguments = {"input_ids": ids, f"{role}input_ids": ids, f"{role}attention_mask": mask}
    with fails(PromptError, f"{role}attention_mask" if role else "attention_mask", "2"):
        model.generate(**arguments)


@pytest.mark.parametrize("role", ["", "expert_", "anti_expert_"])
@pytest.mark.parametrize(
    "row", [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 1], [0, 1, 0, 1]], ids=lambda row: "".join(map(str, row))
)
def test_masks_pad_on_the_left_only(model, role, row):
    ids = IDS.expand(2, -1)
    arguments = {
        "input_ids": ids,
        f"{role}input_ids": ids,
        f"{role}attention_mask": torch.tensor([[1, 1, 1, 1], row]),
    }
    with fails(PromptError, f"{role}attention_mask", "left", "1"):
        model.generate(**arguments)


@pytest.mark.parametrize("role", ["", "expert_", "anti_expert_"])
@pytest.mark.parametrize("shape", [(1, 3), (1, 5), (2, 4), (4,)], ids=str)
def test_mask_shape(model, role, shape):
    arguments = {"input_ids": IDS, f"{role}input_ids": IDS, f"{role}attention_mask": torch.ones(*shape)}
    with fails(PromptError, f"{role}attention_mask", str(shape[-1])):
        model.generate(**arguments)


@pytest.mark.parametrize("role", ["", "expert_", "anti_expert_"])
@pytest.mark.parametrize("bad", [40, 41, -1, 2**40])
def test_ids_outside_the_vocabulary(model, role, bad):
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, bad, 8]])
    with fails(PromptError, f"{role}input_ids", str(bad)):
        model.generate(**{"input_ids": IDS.expand(2, -1), f"{role}input_ids": ids})


@pytest.mark.parametrize("role", ["", "expert_", "anti_expert_"])
@pytest.mark.parametrize(
    "ids",
    [IDS.double(), IDS[0], IDS[None], IDS.bool(), [[5, 6, 7]], "text"],
    ids=["float", "1-D", "3-D", "bool", "list", "text"],
)
def test_ids_are_an_integer_matrix(model, role, ids):
    with fails((PromptError, ConfigurationError), f"{role}input_ids"):
        model.generate(**{"input_ids": IDS, f"{role}input_ids": ids})


@pytest.mark.parametrize("role", ["expert", "anti_expert"])
def test_rows_per_role(model, role):
    with fails((PromptError, ConfigurationError), f"{role}_input_ids", "3", "2"):
        model.generate(IDS.expand(2, -1), **{f"{role}_input_ids": IDS.expand(3, -1)})


@pytest.mark.parametrize("role", ["expert", "anti_expert"])
def test_a_mask_without_its_prompt(model, role):
    with fails((PromptError, ConfigurationError), f"{role}_attention_mask", f"{role}_input_ids"):
        model.generate(IDS, **{f"{role}_attention_mask": torch.ones(1, 4)})


def test_streaming_takes_one_row(model):
    with fails(ConfigurationError, "streamer", "2"):
        model.generate(IDS.expand(2, -1), streamer=Recorder())


def test_a_refused_call_streams_nothing(model):
    recorder = Recorder()
    with fails(ConfigurationError, "top_p"):
        model.generate(IDS, do_sample=True, top_p=3.0, streamer=recorder)
    assert recorder.chunks == []


def test_an_error_leaves_the_next_call_alone(model):
    rows = greedy_rows("llama", RolePrompts(((5, 6, 7, 8),)))
    with pytest.raises(SpecProxyError):
        model.generate(torch.tensor([[5, 99]]))
    assert model.generate(IDS, max_new_tokens=10)[0, 4:].tolist() == rows[0][:10]


# Position limits


def _limited(base: int, expert: int, anti_expert: int, kind: str) -> ProxyTunedModel:
    """Learned positions, so many for each role."""
    name = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    trio = tiny.make_trio(kind, overrides=({name: base}, {name: expert}, {name: anti_expert}))
    return ProxyTunedModel(*trio.models)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
@pytest.mark.parametrize("role", ["base", "expert", "anti_expert"])
def test_past_the_positions_of_a_role(kind, role):
    positions = {"base": 30, "expert": 30, "anti_expert": 30} | {role: 20}
    model = _limited(**positions, kind=kind)
    ids = torch.tensor([[5] * 12])
    with fails(PromptError, role, "20", "max_new_tokens"):
        model.generate(ids, max_new_tokens=9)


@pytest.mark.parametrize("role", ["expert", "anti_expert"])
def test_a_role_is_limited_by_its_own_prompt(role):
    model = _limited(24, 24, 24, "gpt2")
    own = {f"{role}_input_ids": torch.tensor([[5] * 17])}
    with fails(PromptError, role, "24"):
        model.generate(torch.tensor([[5] * 3]), max_new_tokens=8, **own)


def test_padding_takes_no_positions():
    model = _limited(16, 16, 16, "gpt2")
    ids, mask = tiny.left_pad([[5, 6, 7], [8, 9]], extra=10)
    rows = [
        oracle.plain_greedy((model.base, model.expert, model.anti_expert), row, max_new_tokens=13)
        for row in ([5, 6, 7], [8, 9])
    ]
    output = model.generate(ids, mask, max_new_tokens=13, num_draft_tokens=4)
    assert output[:, 13:].tolist() == rows


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
@pytest.mark.parametrize("num_draft_tokens", [0, 1, 3, 4, 8, "auto"])
def test_generation_up_to_the_last_position(kind, num_draft_tokens):
    """Drafts must not run past a learned position, whatever the window and whoever has the fewest positions.

    Rows of one length accept unequal numbers of drafts: those ahead have fewer positions left than the others want.
    """
    prompts = tiny.prompts([12, 12, 9, 12, 12], seed=3)
    ids, mask = tiny.left_pad(prompts)
    for positions in ((20, 40, 40), (40, 20, 40), (40, 40, 20)):
        model = _limited(*positions, kind=kind)
        trio = (model.base, model.expert, model.anti_expert)
        rows = [oracle.plain_greedy(trio, row, max_new_tokens=8) for row in prompts]
        output = model.generate(ids, mask, max_new_tokens=8, num_draft_tokens=num_draft_tokens)
        assert output[:, 12:].tolist() == rows


def test_equal_models_up_to_the_last_position():
    """Every draft is kept, so the last window ends exactly at the limit."""
    trio = tiny.same_model_trio("gpt2")
    (prompt,) = tiny.prompts([89])
    for num_draft_tokens in (1, 2, 3, 5, 8):
        output = ProxyTunedModel(*trio.models).generate(
            torch.tensor([prompt]), max_new_tokens=7, num_draft_tokens=num_draft_tokens
        )
        assert output[0, 89:].tolist() == oracle.plain_greedy(trio.models, prompt, max_new_tokens=7)


# Vocabularies and architectures


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three saved models; a test saves tokenizers beside them."""
    root = tmp_path_factory.mktemp("trio")
    for role, model in zip(("base", "expert", "anti_expert"), tiny.shared_trio("llama").models, strict=True):
        model.save_pretrained(root / role)
    return root


@pytest.mark.parametrize("role", ["expert", "anti_expert"])
def test_tokenizers_that_differ(folders, role):
    for name in ("base", "expert", "anti_expert"):
        tiny.tiny_tokenizer().save_pretrained(folders / name)
    tiny.tiny_tokenizer(renamed={31: "other", 17: "another"}).save_pretrained(folders / role)
    with fails(VocabularyError, "17", "w17", "another", role):
        ProxyTunedModel.from_pretrained(
            folders / "base", expert=folders / "expert", anti_expert=folders / "anti_expert", progress=False
        )


@pytest.mark.parametrize("kind", tiny.REFUSED)
@pytest.mark.parametrize("role", ["base", "expert", "anti_expert"])
def test_architectures_that_cannot_run(kind, role):
    models = dict(zip(("base", "expert", "anti_expert"), tiny.shared_trio("llama").models, strict=True))
    models[role] = tiny.tiny_model(kind)
    with pytest.raises(UnsupportedModelError) as info:
        ProxyTunedModel(**models)
    assert tiny.class_name(kind) in str(info.value) or models[role].config.model_type in str(info.value)
    assert role in str(info.value).replace("anti-expert", "anti_expert")


def test_a_refused_trio_stays_usable():
    models = tiny.shared_trio("llama").models
    before = [model.config._attn_implementation for model in models]
    with pytest.raises(UnsupportedModelError):
        ProxyTunedModel(models[0], models[1], tiny.tiny_model("falcon"))
    assert [model.config._attn_implementation for model in models] == before


@pytest.mark.parametrize("value", [None, "gpt2", torch.nn.Linear(2, 2)], ids=["none", "text", "module"])
def test_what_is_no_model(value):
    models = tiny.shared_trio("llama").models
    with pytest.raises(SpecProxyError, match="expert"):
        ProxyTunedModel(models[0], value, models[2])


# Logits that are no numbers


def _poison(model: Any, token: int, value: float = NAN, column: int | None = None) -> None:
    """Make the logits behind every occurrence of a token unusable, wherever in a batch or a window it stands."""
    seen: list[torch.Tensor] = []

    def remember(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen[:] = [inputs[0]]

    def spoil(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if output.shape[:2] != seen[0].shape:  # a prefill that keeps some positions only
            return output
        output = output.clone()
        if column is None:
            output[seen[0] == token] = value
        else:
            output[..., column].masked_fill_(seen[0] == token, value)
        return output

    model.get_input_embeddings().register_forward_hook(remember)
    model.get_output_embeddings().register_forward_hook(spoil)


def sequences(output: Any) -> torch.Tensor:
    """The tensor of an output of either form."""
    return output if isinstance(output, torch.Tensor) else output.sequences


ROLES = ("base", "expert", "anti_expert")
NEIGHBOURS = role_prompts([6, 2, 9], seed=31)


def _poisonable(index_from: int, row: int = 1) -> tuple[int, int]:
    """A token that only this row writes, first at an index of at least `index_from`: `(token, index)`."""
    rows = greedy_rows("llama", NEIGHBOURS)
    elsewhere = {token for other in range(3) if other != row for token in rows[other]}
    elsewhere |= {token for prompt in NEIGHBOURS.base for token in prompt}
    return next(
        (token, index)
        for index, token in enumerate(rows[row])
        if index >= index_from and token not in elsewhere and token not in rows[row][:index]
    )


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 4, 7])
@pytest.mark.parametrize("role", ROLES)
def test_logits_that_fail_in_one_row(role, num_draft_tokens):
    rows = greedy_rows("llama", NEIGHBOURS)
    token, index = _poisonable(2)
    trio = tiny.make_trio("llama")
    _poison(getattr(trio, role), token)
    arguments = NEIGHBOURS.kwargs()
    with pytest.raises(LogitsError) as info:
        ProxyTunedModel(*trio.models).generate(
            **arguments, max_new_tokens=14, num_draft_tokens=num_draft_tokens, pad_token_id=PAD
        )
    assert info.value.rows == [1]
    message = str(info.value).replace("anti-expert", "anti_expert")
    assert re.search(rf"(?<!anti_)\b{role}\b" if role == "expert" else role, message), message
    assert re.search(r"\brow\S* \[?1\b", message) and "NaN" in message, message
    kept = [row[:14] for row in rows]
    kept[1] = kept[1][: index + 1]
    expected = oracle.expected_output(arguments["input_ids"], kept, PAD)
    assert sequences(info.value.partial).tolist() == expected.tolist()


@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=["inf", "all-minus-inf", "nan"])
@pytest.mark.parametrize("acceptance", ["rejection", "block", "coupled"])
def test_logits_that_fail_while_sampling(acceptance, value):
    """Neighbours draw the text of a clean run."""
    seeds = [4, 5, 6]
    settings: dict[str, Any] = {
        "do_sample": True, "seed": seeds, "acceptance": acceptance, "max_new_tokens": 12, "pad_token_id": PAD,
        "num_draft_tokens": 3, "temperature": 0.8,
    }  # fmt: skip
    trio = tiny.make_trio("llama")
    arguments = NEIGHBOURS.kwargs()
    model = ProxyTunedModel(*trio.models)
    clean = model.generate(**arguments, **settings)[:, 9:].tolist()
    token = next(token for token in clean[1][2:] if token not in clean[0] + clean[2] and token not in clean[1][:2])
    index = clean[1].index(token)
    assert index < 11
    _poison(trio.base, token, value)
    with pytest.raises(LogitsError) as info:
        model.generate(**arguments, **settings, return_dict_in_generate=True)
    assert info.value.rows == [1]
    assert "row 1" in str(info.value)
    if value != -INF:
        assert "base" in str(info.value)
    partial = info.value.partial
    new = partial.sequences[:, 9:].tolist()
    assert [new[0], new[2]] == [clean[0], clean[2]]
    if acceptance == "block":  # this rule reads the whole block, so the failed row may take another path to its end
        index = new[1].index(token)
        assert new[1][:index].count(PAD) == 0 and new[1][index + 1 :] == [PAD] * (11 - index)
    else:
        assert new[1] == [*clean[1][: index + 1], *[PAD] * (11 - index)]
    assert [len(sources) for sources in partial.speculation.token_sources] == [12, index + 1, 12]


@pytest.mark.parametrize("role", ROLES)
def test_one_logit_that_is_no_number(role):
    """A single NaN among good logits must not pass unseen either."""
    token, _ = _poisonable(1)
    trio = tiny.make_trio("llama")
    _poison(getattr(trio, role), token, column=3)
    with pytest.raises(LogitsError) as info:
        ProxyTunedModel(*trio.models).generate(**NEIGHBOURS.kwargs(), max_new_tokens=14)
    assert info.value.rows == [1]


@pytest.mark.parametrize("role", ROLES)
def test_logits_that_fail_at_the_prompt(role):
    """The other rows finish; the failed one has no new token at all.

    It has the longest prompt, the row that may take its place the shortest: what it leaves behind must not be read.
    """
    prompts = role_prompts([9, 14, 2], seed=33)
    rows = greedy_rows("llama", prompts)
    written = {token for row in (0, 2) for token in (*rows[row], *prompts.base[row])}
    token = next(token for token in range(2, 39) if token not in written)
    prompts = RolePrompts((prompts.base[0], (token, *prompts.base[1][1:]), prompts.base[2]))
    trio = tiny.make_trio("llama")
    with torch.no_grad():
        getattr(trio, role).get_input_embeddings().weight[token] = NAN
    arguments = prompts.kwargs()
    with pytest.raises(LogitsError) as info:
        ProxyTunedModel(*trio.models).generate(**arguments, max_new_tokens=10, pad_token_id=PAD)
    assert info.value.rows == [1] and role in str(info.value).replace("anti-expert", "anti_expert")
    expected = oracle.expected_output(arguments["input_ids"], [rows[0][:10], [], rows[2][:10]], PAD)
    assert sequences(info.value.partial).tolist() == expected.tolist()


def test_every_row_fails():
    trio = tiny.make_trio("llama")
    with torch.no_grad():
        trio.expert.get_output_embeddings().weight[:] = NAN
    with pytest.raises(LogitsError) as info:
        ProxyTunedModel(*trio.models).generate(**NEIGHBOURS.kwargs(), max_new_tokens=10)
    assert info.value.rows == [0, 1, 2]
    assert sequences(info.value.partial).tolist() == NEIGHBOURS.kwargs()["input_ids"].tolist()


@pytest.mark.parametrize("num_draft_tokens", [0, 2, 5])
@pytest.mark.parametrize("role", ROLES)
def test_logits_behind_the_last_token_do_not_matter(role, num_draft_tokens):
    """Plain decoding never looks at them: neither behind the budget nor behind the end of the text."""
    rows = greedy_rows("llama", NEIGHBOURS)
    token, index = _poisonable(3)
    trio = tiny.make_trio("llama")
    _poison(getattr(trio, role), token)
    model = ProxyTunedModel(*trio.models)
    arguments = NEIGHBOURS.kwargs()
    output = model.generate(**arguments, max_new_tokens=index + 1, num_draft_tokens=num_draft_tokens)
    assert output[:, 9:].tolist() == [row[: index + 1] for row in rows]
    cut = [oracle.cut(row, 14, {token}) for row in rows]
    output = model.generate(
        **arguments, max_new_tokens=14, eos_token_id=token, num_draft_tokens=num_draft_tokens, pad_token_id=PAD
    )
    assert output.tolist() == oracle.expected_output(arguments["input_ids"], cut, PAD).tolist()


@pytest.mark.parametrize("where", ["logits", "embedding"])
@pytest.mark.parametrize("num_draft_tokens", [1, 2, 4, 7])
@pytest.mark.parametrize("role", ROLES)
def test_logits_behind_a_refused_draft_do_not_matter(role, num_draft_tokens, where):
    """A token that the expert proposes and the target never writes: what follows it is nobody's business.

    With the embedding spoilt, keys and values of the refused draft are not numbers either. Masked attention spreads
    these over the row's window, in any implementation: then the row must fail aloud, never write another text, and
    its neighbours must not notice.
    """
    trio = tiny.make_trio("llama")
    rows = [row[:14] for row in greedy_rows("llama", NEIGHBOURS)]
    written = {token for group in (rows, NEIGHBOURS.base) for row in group for token in row}
    proposed: list[int] = []
    for prompt, row in zip(NEIGHBOURS.base, rows, strict=True):
        with torch.no_grad():
            logits = trio.expert(torch.tensor([[*prompt, *row]])).logits
        proposed += logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    spoilt = sorted(set(proposed) - written)
    assert spoilt, "the expert proposes nothing that the target refuses everywhere: choose another seed"
    for token in spoilt:
        if where == "logits":
            _poison(getattr(trio, role), token)
        else:
            with torch.no_grad():
                getattr(trio, role).get_input_embeddings().weight[token] = NAN
    failed: list[int] = []
    try:
        output = ProxyTunedModel(*trio.models).generate(
            **NEIGHBOURS.kwargs(), max_new_tokens=14, num_draft_tokens=num_draft_tokens, return_dict_in_generate=True
        )
    except LogitsError as error:
        assert where == "embedding"
        output, failed = error.partial, error.rows
    lengths = [len(sources) for sources in output.speculation.token_sources]
    assert all(length == 14 for index, length in enumerate(lengths) if index not in failed)
    new = output.sequences[:, 9:].tolist()
    assert [row[:length] for row, length in zip(new, lengths, strict=True)] == [
        row[:length] for row, length in zip(rows, lengths, strict=True)
    ]
