"""The caller's models are borrowed: between calls they are as before, also after errors and with other threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny
import torch
from support import PAD, greedy_rows, role_prompts
from transformers import GenerationConfig

from specproxy import ProxyTunedModel
from specproxy.attention import borrowed

PROMPTS = role_prompts([6, 2, 9], seed=31)


def plain(model: Any) -> list[list[int]]:
    """Transformers' own greedy text."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=8, pad_token_id=PAD)
    return model.generate(**PROMPTS.kwargs(), generation_config=settings).tolist()


def fingerprint(model: Any) -> dict[str, Any]:
    """All that a call might leave behind in a model."""
    return {
        "attention": [
            module.config._attn_implementation for module in model.modules() if getattr(module, "config", None)
        ],
        "training": [module.training for module in model.modules()],
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "mixtral"])
def test_models_behave_as_before(kind, attention):
    trio = tiny.make_trio(kind)
    for model in trio.models:
        model.set_attn_implementation(attention)
    before = [fingerprint(model) for model in trio.models]
    weights = [{name: value.clone() for name, value in model.state_dict().items()} for model in trio.models]
    texts = [plain(model) for model in trio.models]
    proxy = ProxyTunedModel(*trio.models)
    assert [fingerprint(model) for model in trio.models] == before, "the constructor left something behind"
    first = proxy.generate(**PROMPTS.kwargs(), max_new_tokens=10)
    assert [fingerprint(model) for model in trio.models] == before
    assert [plain(model) for model in trio.models] == texts
    proxy.forward(torch.tensor([[3, 4, 5]]))
    assert [fingerprint(model) for model in trio.models] == before
    assert torch.equal(proxy.generate(**PROMPTS.kwargs(), max_new_tokens=10), first)
    for model, kept in zip(trio.models, weights, strict=True):
        now = model.state_dict()
        assert now.keys() == kept.keys()
        assert all(torch.equal(now[name], value) for name, value in kept.items())


def test_arguments_are_not_written_to():
    trio = tiny.shared_trio("llama")
    arguments = role_prompts([6, 2], [3, 8], [1, 1], seed=5).kwargs()
    copies = {name: value.clone() for name, value in arguments.items()}
    output = ProxyTunedModel(*trio.models).generate(**arguments, max_new_tokens=6)
    assert all(torch.equal(arguments[name], value) for name, value in copies.items())
    output.fill_(0)
    assert torch.equal(arguments["input_ids"], copies["input_ids"])


@pytest.mark.parametrize("role", ["base", "expert", "anti_expert"])
@pytest.mark.parametrize("at_call", [1, 3])
def test_an_exception_in_the_middle_puts_everything_back(role, at_call):
    trio = tiny.make_trio("llama")
    trio.base.train()
    calls = 0

    def interrupt(module: Any, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise KeyboardInterrupt

    handle = getattr(trio, role).get_output_embeddings().register_forward_pre_hook(interrupt)
    before = [fingerprint(model) for model in trio.models]
    proxy = ProxyTunedModel(*trio.models)
    calls = 0
    with pytest.raises(KeyboardInterrupt):
        proxy.generate(**PROMPTS.kwargs(), max_new_tokens=12)
    assert [fingerprint(model) for model in trio.models] == before
    handle.remove()
    trio.base.eval()
    output = proxy.generate(**PROMPTS.kwargs(), max_new_tokens=10)
    assert output[:, 9:].tolist() == [row[:10] for row in greedy_rows("llama", PROMPTS)]


def test_training_flags_are_restored_and_dropout_is_off():
    trio = tiny.make_trio("gpt2")
    trio.base.train()
    trio.base.transformer.h[1].eval()
    trio.expert.train()
    flags = [[module.training for module in model.modules()] for model in trio.models]
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in trio.base.modules())
    output = ProxyTunedModel(*trio.models).generate(**PROMPTS.kwargs(), max_new_tokens=10)
    assert [[module.training for module in model.modules()] for model in trio.models] == flags
    assert output[:, 9:].tolist() == [row[:10] for row in greedy_rows("gpt2", PROMPTS)]


@pytest.mark.parametrize("do_sample", [False, True])
def test_output_is_an_ordinary_tensor(do_sample):
    trio = tiny.make_trio("llama")
    proxy = ProxyTunedModel(*trio.models)
    output = proxy.generate(**PROMPTS.kwargs(), max_new_tokens=4, do_sample=do_sample, seed=1)
    assert not output.is_inference() and not output.requires_grad
    trio.base(input_ids=output, labels=output).loss.backward()
    assert trio.base.get_input_embeddings().weight.grad.abs().sum() > 0
    again = proxy.generate(**PROMPTS.kwargs(), max_new_tokens=4, do_sample=do_sample, seed=1)
    assert torch.equal(again, output)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_matter(context):
    trio = tiny.shared_trio("llama")
    with context():
        output = ProxyTunedModel(*trio.models).generate(**PROMPTS.kwargs(), max_new_tokens=10)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
    assert output[:, 9:].tolist() == [row[:10] for row in greedy_rows("llama", PROMPTS)]


def test_one_model_in_two_roles():
    """Base and anti-expert may be one object: its caches must not mix."""
    trio = tiny.make_trio("llama")
    apart = tiny.make_trio("llama")
    arguments = role_prompts([5, 3], [2, 9], [7, 1], seed=3).kwargs()
    output = ProxyTunedModel(trio.anti_expert, trio.expert, trio.anti_expert).generate(**arguments, max_new_tokens=12)
    expected = ProxyTunedModel(
        apart.anti_expert, apart.expert, tiny.make_trio("llama").anti_expert
    ).generate(**arguments, max_new_tokens=12)  # fmt: skip
    assert output.tolist() == expected.tolist()


def test_models_that_share_a_configuration_and_a_module():
    """What one of them switches is the other's too: it is put back by whoever is the last to need it."""
    base, expert = tiny.tiny_model("llama"), tiny.tiny_model("llama")
    small = type(expert)(expert.config).to(expert.dtype)  # one configuration object
    small.model.layers[0] = expert.model.layers[0]
    for model in (base, expert, small):
        model.train()
    before = [fingerprint(model) for model in (base, expert, small)]
    assert before[1]["attention"] == ["sdpa"] * len(before[1]["attention"])
    ProxyTunedModel(base, expert, small).generate(**PROMPTS.kwargs(), max_new_tokens=4)
    assert [fingerprint(model) for model in (base, expert, small)] == before
    for first, second in ((expert, small), (small, expert)):
        with borrowed([first]):
            during = fingerprint(first)
            assert set(during["attention"]) == {"specproxy_window"} and not any(during["training"])
            with borrowed([second]):
                assert fingerprint(second)["training"] == [False] * len(during["training"])
            assert fingerprint(first) == during, "a borrower's return has changed a model that is still borrowed"
        assert [fingerprint(model) for model in (base, expert, small)] == before


def test_threads_that_share_a_base():
    first, second = tiny.make_trio("llama"), tiny.make_trio("llama", seed=50)
    proxies = [
        ProxyTunedModel(*first.models),
        ProxyTunedModel(first.base, second.expert, second.anti_expert),
        ProxyTunedModel(*first.models, alpha=0.5),
    ]
    before = fingerprint(first.base)

    def text(index: int, turn: int) -> list[list[int]]:
        arguments = role_prompts([3 + turn, 7, 1], seed=60 + turn).kwargs()
        settings: dict[str, Any] = {"max_new_tokens": 8 + 3 * index, "num_draft_tokens": 1 + index + turn}
        if turn % 2:
            settings |= {"do_sample": True, "seed": turn, "acceptance": "coupled"}
        return proxies[index].generate(**arguments, **settings).tolist()

    turns = range(5)
    expected = [[text(index, turn) for turn in turns] for index in range(3)]
    found: list[list[Any]] = [[], [], []]
    barrier = threading.Barrier(3)

    def work(index: int) -> None:
        barrier.wait()
        for turn in turns:
            try:
                found[index].append(text(index, turn))
            except Exception as error:
                found[index].append(repr(error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert fingerprint(first.base) == before
