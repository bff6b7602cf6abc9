"""An expert that is a LoRA adapter on its anti-expert: the merged pair's tokens from one copy of weights."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import tiny
import torch
from drop_in import ROWS, batch
from support import role_prompts
from test_untouched import fingerprint

from specproxy import ConfigurationError, ProxyTunedModel, RowStreamer, SpecProxyError, UnsupportedModelError
from specproxy.adapters import is_adapter
from specproxy.check import check_folders
from specproxy.costs import ForwardTime
from specproxy.cycle_times import CycleTimes
from specproxy.draft.expert import ExpertDrafter
from specproxy.policy import CycleReport, Plan
from specproxy.state import Draft

# peft asks Transformers by the old name of a property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

COUNT = 12
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "opt": ["q_proj", "fc1", "fc2"]}
COUPLED = {"do_sample": True, "seed": 5, "acceptance": "coupled", "max_new_tokens": COUNT}


def adapted(small: Any, kind: str, seed: int = 3, **settings: Any) -> Any:
    """The small model with an adapter that changes it as much as the tiny experts differ from theirs."""
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", **settings}
    )
    model = peft.get_peft_model(small, config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.07)
    return model


class Pair:
    """A pair of one set of weights, and the same pair as two models."""

    def __init__(self, kind: str) -> None:
        trio = tiny.make_trio(kind)
        self.base, self.small = trio.base, trio.anti_expert
        self.apart = copy.deepcopy(self.small)
        self.expert = adapted(self.small, kind)
        self.merged = copy.deepcopy(self.expert).merge_and_unload()

    @property
    def shared(self) -> ProxyTunedModel:
        return ProxyTunedModel(self.base, self.expert, self.small)

    @property
    def whole(self) -> ProxyTunedModel:
        return ProxyTunedModel(self.base, self.merged, self.apart)


@functools.cache
def pair(kind: str = "llama") -> Pair:
    return Pair(kind)


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The number of tokens of every forward of a model."""
    calls: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].numel()))
    yield calls
    handle.remove()


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("count", [0, 4, "auto"])
def test_tokens_are_the_merged_pairs(kind, count):
    own = pair(kind)
    greedy = own.whole.generate(*batch(filler=39), max_new_tokens=COUNT, num_draft_tokens=0)
    assert torch.equal(own.shared.generate(*batch(filler=39), max_new_tokens=COUNT, num_draft_tokens=count), greedy)
    sampled = own.whole.generate(*batch(), num_draft_tokens=0, **COUPLED)
    assert torch.equal(own.shared.generate(*batch(), num_draft_tokens=count, **COUPLED), sampled)
    # The pair steers: without it, and with the adapter in both roles, the tokens are others.
    assert not torch.equal(own.shared.generate(*batch(filler=39), max_new_tokens=COUNT, alpha=0.0), greedy)


@pytest.mark.parametrize("settings", [{"acceptance": "rejection"}, {"acceptance": "block", "top_k": 6}], ids=str)
def test_draws_are_the_merged_pairs(settings):
    """Equal laws, noise and drafts: the very draws of the two models, whatever the rule."""
    own, arguments = pair(), {"do_sample": True, "seed": 9, "max_new_tokens": COUNT, **settings}
    assert torch.equal(own.shared.generate(*batch(), **arguments), own.whole.generate(*batch(), **arguments))


def test_token_trees():
    own, tree = pair(), {"num_draft_tokens": 4, "num_tree_tokens": 12}
    per_step = own.whole.generate(*batch(), num_draft_tokens=0, **COUPLED)
    assert torch.equal(own.shared.generate(*batch(), **tree, **COUPLED), per_step)


def test_drafts_by_lookup():
    own, ids = pair(), torch.tensor([[*ROWS[0], *ROWS[0][:4]]])
    arguments = {"max_new_tokens": COUNT, "num_draft_tokens": 3, "drafter": "lookup"}
    with counted(own.small) as calls:
        output = own.shared.generate(ids, **arguments)
    assert torch.equal(output, own.whole.generate(ids, max_new_tokens=COUNT, num_draft_tokens=0))
    assert all(count % 2 == 0 for count in calls[2:]), "one forward a cycle, over both models' windows"


def test_prompts_per_role():
    prompts = role_prompts([3, 9, 1], [8, 2, 11], [4, 10, 1], seed=22).kwargs()
    own = pair()
    for count in (0, 3):
        arguments = {**prompts, "max_new_tokens": COUNT, "num_draft_tokens": count}
        assert torch.equal(own.shared.generate(**arguments), own.whole.generate(**arguments))


def test_forward_and_processors():
    own, ids = pair(), torch.tensor([ROWS[0]])
    torch.testing.assert_close(own.shared.forward(ids).logits, own.whole.forward(ids).logits)
    arguments = {"max_new_tokens": COUNT, "no_repeat_ngram_size": 2, "typical_p": 0.8, **COUPLED}
    assert torch.equal(own.shared.generate(*batch(), **arguments), own.whole.generate(*batch(), **arguments))


def test_the_weights_are_there_once():
    own = Pair("llama")

    def size(*models: Any) -> int:
        storages = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()
        }
        return sum(storages.values())

    shared = ProxyTunedModel(own.base, own.expert, own.small)
    ratio = size(shared.expert, shared.anti_expert) / size(own.apart)
    own.shared.generate(*batch(), max_new_tokens=3)
    assert ratio == size(shared.expert, shared.anti_expert) / size(own.apart)
    assert 1.0 < ratio < 1.1, ratio
    assert size(own.merged, own.apart) / size(own.apart) == 2.0


def test_one_pass_serves_both():
    """Per-step: one forward of 2 tokens a row. Speculative: G single steps, and one of W tokens and the bonus."""
    own, ids = pair(), torch.tensor([ROWS[0]])
    with counted(own.small) as calls:
        own.shared.generate(ids, max_new_tokens=3, num_draft_tokens=0)
    prompts = 2 * [len(ROWS[0]) - 1]
    assert calls == [*prompts, 2, 2, 2]
    with counted(own.small) as calls:
        own.shared.generate(ids, max_new_tokens=4, num_draft_tokens=3)
    assert calls[:6] == [*prompts, 1, 1, 1, 4 + 1]


def test_with_drafts_of_others_the_whole_window_is_one_pass(monkeypatch):
    """Drafts that cost the expert nothing: it runs over the window, in the anti-expert's pass."""

    def propose(self: Any, state: Any, runners: Any, noise: Any, plan: Any) -> Draft:
        tokens = torch.full((state.width, plan.num_drafts), 3)
        return Draft(tokens, state.num_drafts(plan.num_drafts), None, None)

    own = pair()
    expected = own.whole.generate(*batch(), num_draft_tokens=0, **COUPLED)
    monkeypatch.setattr(ExpertDrafter, "propose", propose)
    with counted(own.small) as calls:
        assert torch.equal(own.shared.generate(*batch(), num_draft_tokens=3, **COUPLED), expected)
    assert calls[2] == 3 * 2 * 4
    assert set(calls[2:]) <= {rows * 2 * window for rows in (1, 2, 3) for window in (1, 2, 3, 4)}


def test_the_callers_model_is_left_as_it_was():
    own = Pair("llama")
    flags = {name: module._disable_adapters for name, module in own.expert.named_modules() if hasattr(module, "lora_A")}
    before, state = fingerprint(own.expert), {k: v.clone() for k, v in own.expert.state_dict().items()}
    ids = torch.tensor([ROWS[0]])
    text = own.expert(ids).logits
    own.shared.generate(*batch(), max_new_tokens=5)
    own.shared.forward(ids)
    handle = own.small.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with_handle = fingerprint(own.expert)
    for call in (lambda: own.shared.generate(*batch(), max_new_tokens=5), lambda: own.shared.forward(ids)):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert fingerprint(own.expert) == with_handle
    handle.remove()
    assert fingerprint(own.expert) == before
    assert flags == {n: m._disable_adapters for n, m in own.expert.named_modules() if hasattr(m, "lora_A")}
    assert torch.equal(own.expert(ids).logits, text)
    assert all(torch.equal(value, state[name]) for name, value in own.expert.state_dict().items())


def test_a_call_from_elsewhere_is_told():
    own = pair()

    def streamer(row: int, tokens: list[int]) -> None:
        with pytest.raises(SpecProxyError, match="called from elsewhere"):
            own.expert(torch.tensor([[3, 4]]))

    own.shared.generate(*batch(), max_new_tokens=3, streamer=RowStreamer(streamer))


def test_the_base_may_be_the_same_model_too():
    own = Pair("llama")
    output = ProxyTunedModel(own.small, own.expert, own.small).generate(*batch(), max_new_tokens=COUNT)
    apart = ProxyTunedModel(own.apart, own.merged, copy.deepcopy(own.apart))
    assert torch.equal(output, apart.generate(*batch(), max_new_tokens=COUNT))


def test_an_adapter_of_a_model_of_its_own():
    """Where the anti-expert is another object, or there is none, the peft model is an expert like any other."""
    own = Pair("llama")
    for anti_expert in (own.apart, None):
        found = ProxyTunedModel(own.base, own.expert, anti_expert, alpha=0.6)
        whole = ProxyTunedModel(own.base, own.merged, anti_expert, alpha=0.6)
        expected = whole.generate(*batch(), max_new_tokens=COUNT)
        assert torch.equal(found.generate(*batch(), max_new_tokens=COUNT), expected)
    assert found.expert is own.expert


def test_an_inactive_adapter_and_an_adapter_switched_off_by_the_caller():
    own = Pair("llama")
    expected = own.whole.generate(*batch(), max_new_tokens=COUNT)
    own.expert.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj", "q_proj"]))
    ids = torch.tensor([ROWS[0]])
    with own.expert.disable_adapter():
        assert torch.equal(own.shared.generate(*batch(), max_new_tokens=COUNT), expected)
        assert torch.equal(own.expert(ids).logits, own.small(ids).logits)
        torch.testing.assert_close(own.expert(ids).logits, own.apart(ids).logits)


# From disk.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("models")
    own = Pair("llama")
    for name, model in (("base", own.base), ("small", own.apart), ("merged", own.merged)):
        model.save_pretrained(path / name)
    own.expert.peft_config["default"].base_model_name_or_path = str(path / "small")
    own.expert.save_pretrained(path / "adapter")
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(copy.deepcopy(own.apart), prefix).save_pretrained(path / "prefix")
    return path


def load(folder: Any, **names: str | None) -> ProxyTunedModel:
    roles = {"base": "base", "expert": "adapter", "anti_expert": "small", **names}
    paths = {role: str(folder / name) for role, name in roles.items() if name is not None}
    return ProxyTunedModel.from_pretrained(**paths, dtype=torch.float64, progress=False)


def test_an_adapter_folder(folder):
    assert is_adapter(str(folder / "adapter")) and not is_adapter(str(folder / "small"))
    loaded = load(folder)
    assert loaded.anti_expert is loaded.expert.get_base_model()
    expected = load(folder, expert="merged").generate(*batch(), max_new_tokens=COUNT)
    assert torch.equal(loaded.generate(*batch(), max_new_tokens=COUNT), expected)
    lone, merged = (load(folder, expert=name, anti_expert=None) for name in ("adapter", "merged"))
    assert lone.anti_expert is None
    assert torch.equal(lone.generate(*batch(), max_new_tokens=4), merged.generate(*batch(), max_new_tokens=4))


def test_the_check_knows_adapters(folder):
    names = {name: str(folder / name) for name in ("base", "small", "adapter", "prefix")}
    report = check_folders(names["base"], names["adapter"], names["small"])
    assert report.problems == []
    assert "the expert is an adapter on the anti-expert: one copy of weights serves both." in report.notes
    expert, small = report.models["expert"], report.models["anti_expert"]
    assert expert.shares_weights and expert.num_parameters > small.num_parameters
    assert expert.weight_bytes["bfloat16"] == 2 * (expert.num_parameters - small.num_parameters)
    (problem,) = check_folders(names["base"], names["prefix"], names["small"]).problems
    assert "PREFIX_TUNING puts learned tokens before the prompt" in problem
    assert check_folders(names["base"], names["adapter"]).problems == []


def test_an_adapter_of_another_model(folder, tmp_path):
    tiny.tiny_model("llama", hidden_size=48, intermediate_size=16).save_pretrained(tmp_path / "wider")
    tiny.tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    for name in ("wider", "gpt2"):
        with pytest.raises(
            ConfigurationError, match=r"is an adapter that does not fit .* Give the model it was trained"
        ):
            load(folder, anti_expert=str(tmp_path / name))


@pytest.mark.parametrize("size", ["5GB", "10KB"], ids=["whole", "in_shards"])
def test_an_adapter_of_a_model_of_the_same_shape(folder, tmp_path, size):
    """It would fit, and steer to nowhere. Told by the weights of the model that the adapter names, where it is here."""
    small = Pair("llama").apart
    for name, dtype in (("small", torch.float64), ("renamed", torch.float64), ("rounded", torch.float16)):
        copy.deepcopy(small).to(dtype).save_pretrained(tmp_path / name, max_shard_size=size)
    tiny.tiny_model("llama", seed=77).save_pretrained(tmp_path / "other")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())

    def named(base: str | None) -> None:
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))

    shutil.copytree(folder / "base", tmp_path / "base")
    named(str(tmp_path / "small"))
    with pytest.raises(
        ConfigurationError, match=r"anti_expert=.*other has other weights \(model\..*give anti_expert=.*small"
    ):
        load(tmp_path, anti_expert="other")
    for same in ("renamed", "rounded"):  # another place, another precision
        assert load(tmp_path, anti_expert=same).anti_expert is not None
    named(str(tmp_path / "rounded"))
    assert load(tmp_path, anti_expert="small").anti_expert is not None
    for gone in (str(tmp_path / "gone"), "nobody/gone", None):
        named(gone)
        assert load(tmp_path, anti_expert="other").anti_expert is not None


# What is refused.


def test_adapters_that_change_more_than_linear_layers():
    cases = {
        r"modules_to_save=\['lm_head'\] trains weights": {"modules_to_save": ["lm_head"]},
        "bias='all' trains weights": {"bias": "all"},
        "is no plain low-rank change": {"use_dora": True},
        r"embed_tokens \(Embedding\) is no plain": {"target_modules": ["embed_tokens"]},
    }
    for message, settings in cases.items():
        trio = tiny.make_trio("llama")
        expert = adapted(trio.anti_expert, "llama", **settings)
        with pytest.raises(UnsupportedModelError, match=message):
            ProxyTunedModel(trio.base, expert, trio.anti_expert)
        ProxyTunedModel(trio.base, expert, tiny.shared_trio("llama").anti_expert)  # a model of its own may do all that


def test_adapters_of_other_kinds():
    trio = tiny.make_trio("llama")
    ia3 = peft.get_peft_model(
        trio.anti_expert, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    )
    with pytest.raises(UnsupportedModelError, match="adapters of type IA3 cannot share weights"):
        ProxyTunedModel(trio.base, ia3, trio.anti_expert)
    trio = tiny.make_trio("llama")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prefix = peft.get_peft_model(trio.anti_expert, config)
    for anti_expert in (trio.anti_expert, None):
        with pytest.raises(UnsupportedModelError, match="PREFIX_TUNING puts learned tokens before the prompt"):
            ProxyTunedModel(trio.base, prefix, anti_expert)


def test_states_of_a_peft_model_that_are_refused():
    own = Pair("llama")
    with pytest.raises(ConfigurationError, match=r"are one peft model; give its get_base_model\(\)"):
        ProxyTunedModel(own.base, own.expert, own.expert)
    own.expert.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    own.expert.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigurationError, match=r"expert has 2 active adapters \(default, other\)"):
        ProxyTunedModel(own.base, own.expert, own.small)
    own.expert.set_adapter("default")
    shared = own.shared
    own.expert.merge_adapter()
    with pytest.raises(ConfigurationError, match=r"merged into its base model; call unmerge_adapter"):
        shared.generate(*batch())
    assert own.expert.active_adapters == ["default"]


def test_auto_counts_no_step_that_a_shared_pass_saves():
    """The expert's last position costs nothing beside the anti-expert's forward, in per-step cycles too."""
    times = CycleTimes((0, 4))
    for count in (4, 0, 4, 0):
        steps = [ForwardTime("expert", 1, 1, 1.0)] * count
        scores = [ForwardTime("anti_expert", 1, count + 1, 1.0), ForwardTime("base", 1, count + 1, 10.0)]
        times.hear(CycleReport(Plan(count), (0,), (count,), (count,), (*steps, *scores), 11.0 + count))
    chain = times.chain("expert", 1)
    assert chain.bonus == 0.0
    assert chain.seconds.tolist() == pytest.approx([11, 15], rel=0.02)
