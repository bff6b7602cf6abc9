"""Token trees: what nodes see, and that greedy and coupled decoding give the tokens of per-step decoding."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from support import PAD, RolePrompts, role_prompts
from transformers import LogitsProcessor

import specproxy.decode
import specproxy.generate
from specproxy import AlphaSchedule, ConfigurationError, LogitsError, ProxyTunedModel
from specproxy.cache import RaggedCache, Window
from specproxy.draft import DRAFTERS, TreeDrafter
from specproxy.nodes import Nodes
from specproxy.policy import CycleReport, FixedWindow
from specproxy.tree import TreeShape
from specproxy.walk import _Path

OWN = role_prompts([3, 9, 1], [8, 2, 11], [4, 10, 1], seed=22)
FOUR = role_prompts([3, 9, 1, 6], seed=21)
RANKS = (0.4, 0.2, 0.1, 0.08, 0.05)
SHAPES = {
    "chain": TreeShape.chain(3),
    "fork": TreeShape.from_paths([(0, 0, 1), (1, 0), (0, 2), (2,)]),
    "one wide level": TreeShape.from_paths([(rank,) for rank in range(6)]),
    "later ranks alone": TreeShape.from_paths([(2, 1), (1, 0, 0)]),
    "largest": TreeShape.best_tree(RANKS, 63, 6),
}
GREEDY: dict[str, Any] = {"do_sample": False}
COUPLED: dict[str, Any] = {"do_sample": True, "acceptance": "coupled", "top_k": 0, "seed": 5}


class FavourOdd(LogitsProcessor):
    """A processor of the caller's own."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[:, 1::2] += 0.5 + 0.1 * (input_ids[:, -1] % 3)
        return scores


LAWS: dict[str, dict[str, Any]] = {
    "greedy with a penalty": {"do_sample": False, "repetition_penalty": 1.4},
    "all filters": {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "temperature": 1.2, "repetition_penalty": 1.3},
    "counted": {"presence_penalty": 0.7, "frequency_penalty": 0.9, "sequence_bias": {(3,): 2.0}},
    "a schedule": {"alpha_schedule": AlphaSchedule(cutoff=7, half_life=3)},
    "alpha by row": {"alpha": [0.3, 1.0, 1.7]},
    "banned": {"suppress_tokens": [1, 5, 8]},
    "a ban that ends": {"min_new_tokens": 6, "eos_token_id": [3, 4, 9, 12]},
    "processor": {"logits_processor": [FavourOdd()], "repetition_penalty": 1.2},
    "n-grams": {"do_sample": False, "no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    return ProxyTunedModel(*tiny.shared_trio("llama").models)


def run(model: ProxyTunedModel, prompts: RolePrompts = OWN, **settings: Any) -> Any:
    return model.generate(
        **prompts.kwargs(),
        **{"max_new_tokens": 13, "num_draft_tokens": 4, **settings},
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )


def with_tree(monkeypatch: pytest.MonkeyPatch, shape: TreeShape) -> list[CycleReport]:
    """Let calls that ask for a tree draft this one; returns the reports of their cycles."""
    reports: list[CycleReport] = []

    class Fixed(FixedWindow):
        def observe(self, report: CycleReport) -> None:
            reports.append(report)

    monkeypatch.setattr(specproxy.generate, "FixedWindow", lambda *args: Fixed(shape.depth, tree=shape))
    return reports


def assert_per_step(model: ProxyTunedModel, prompts: RolePrompts = OWN, **settings: Any) -> Any:
    """The tokens of a tree are those of per-step decoding; returns the statistics of the tree."""
    per_step = run(model, prompts, **{**settings, "num_draft_tokens": 0, "num_tree_tokens": 0})
    got = run(model, prompts, **{"num_tree_tokens": 14, **settings})
    assert got.sequences.tolist() == per_step.sequences.tolist()
    return got.speculation


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize("piecewise", [False, True], ids=["at once", "by level"])
def test_a_node_sees_its_path_alone(kind, piecewise):
    """Logits of every node, in ragged rows, against a plain forward of prompt and path."""
    shape = SHAPES["largest"]
    base = tiny.shared_trio(kind).base
    prompts = [list(row) for row in FOUR.base]
    tokens = torch.randint(0, tiny.VOCAB_SIZE, (4, len(shape)), generator=torch.Generator().manual_seed(1))
    trio = ProxyTunedModel(*tiny.shared_trio(kind).models)._trio
    with torch.inference_mode(), trio.runners(4, 16) as runners:
        runners.base.prefill(0, prompts)
        nodes = runners.nodes(shape, runners.base.device)
        levels = shape.levels if piecewise else [range(len(shape))]
        logits = torch.cat(
            [
                runners.base.forward(tokens[:, level.start : level.stop], offset=level.start, nodes=nodes)
                for level in levels
            ],
            dim=1,
        )
    for row, prompt in enumerate(prompts):
        for node in [0, *range(1, len(shape), 5), len(shape) - 1]:
            depth = shape.depths[node]
            path = tokens[row, nodes.paths[node, : depth + 1]].tolist()
            with torch.no_grad():
                want = base(input_ids=torch.tensor([prompt + path]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[row, node], want, rtol=0, atol=1e-10)


KINDS = [kind for kind in tiny.SUPPORTED if kind != "llama"]
_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        pytest.param(kind, law, id=f"{kind}-{name}", marks=[_SLOW] if (place + len(name)) % 2 else [])
        for place, kind in enumerate(KINDS)
        for name, law in (("greedy", GREEDY), ("coupled", COUPLED))
    ],
)
def test_every_architecture(kind, law):
    """Prompts per role and ragged rows; windows slide over texts that were moved."""
    statistics = assert_per_step(ProxyTunedModel(*tiny.shared_trio(kind).models), **law)
    assert 0 < statistics.num_accepted_tokens < statistics.num_draft_tokens


@pytest.mark.parametrize("law", [GREEDY, COUPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(model, monkeypatch, shape, law):
    per_step = run(model, FOUR, **law, num_draft_tokens=0, max_new_tokens=19)
    reports = with_tree(monkeypatch, SHAPES[shape])
    got = run(model, FOUR, **law, num_tree_tokens=1, max_new_tokens=19)
    assert got.sequences.tolist() == per_step.sequences.tolist()
    check_reports(reports, got)


def check_reports(reports: list[CycleReport], output: Any) -> None:
    """Ranks are paths of the tree, as long as what was accepted."""
    accepted = 0
    for report in reports:
        if report.plan.tree is None:  # no row's budget leaves room for a draft
            assert report.plan.num_drafts == 0 and not report.ranks
            continue
        assert len(report.ranks) == len(report.rows)
        for ranks, count in zip(report.ranks, report.num_accepted, strict=True):
            assert len(ranks) == count and ranks in report.plan.tree.paths
            accepted += count
    assert accepted >= output.speculation.num_accepted_tokens > 0


@pytest.mark.parametrize("law", LAWS)
def test_every_law(model, law):
    assert_per_step(model, **{**COUPLED, **LAWS[law]})


class Grammar(LogitsProcessor):
    """Three tokens may follow each; it knows no other text."""

    def __init__(self, prompts: RolePrompts) -> None:
        self.lengths = {row: len(row) for row in prompts.base}

    def allowed(self, token: int) -> list[int]:
        return [(7 * token + step) % tiny.VOCAB_SIZE for step in (1, 2, 5)]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        text = input_ids[0].tolist()
        length = next(length for row, length in self.lengths.items() if tuple(text[:length]) == row)
        for before, token in zip(text[length - 1 :], text[length:], strict=False):
            assert token in self.allowed(before), "a text that was ruled out"
        mask = torch.full_like(scores, -torch.inf)
        mask[:, self.allowed(text[-1])] = 0
        return scores + mask


@pytest.mark.parametrize("law", [GREEDY, COUPLED], ids=["greedy", "coupled"])
def test_processors_see_no_text_that_they_rule_out(model, law):
    """Guesses beyond the three that are allowed have no mass, and nothing is asked behind them."""
    assert_per_step(model, FOUR, **law, logits_processor=[Grammar(FOUR)], num_tree_tokens=40)


def test_further_pairs():
    """A second expert scores the tree as the base does; one pair has no anti-expert."""
    base, expert, anti_expert = tiny.shared_trio("llama").models
    other = tiny.shared_trio("gpt2").expert
    model = ProxyTunedModel(base, expert, None, alpha=0.4, further_pairs=[(other, anti_expert, 0.5)])
    assert_per_step(model, FOUR, **COUPLED)


@pytest.mark.parametrize("law", [GREEDY, COUPLED | {"logits_processor": [FavourOdd()]}], ids=["greedy", "processor"])
def test_recorded_scores(model, law):
    settings = {**law, "output_scores": True, "output_logits": True}
    per_step, got = run(model, **settings, num_draft_tokens=0), run(model, **settings, num_tree_tokens=14)
    assert got.sequences.tolist() == per_step.sequences.tolist()
    for name in ("scores", "logits"):
        for want, have in zip(per_step[name], got[name], strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("index", [1, 4, 8])
def test_end_of_text_inside_a_path(model, index):
    open_ended = run(model, FOUR, **COUPLED, num_draft_tokens=0)
    eos = [int(open_ended.sequences[row, 9 + index]) for row in (0, 2)]
    statistics = assert_per_step(model, FOUR, **COUPLED, eos_token_id=eos)
    assert sum(map(len, statistics.token_sources)) == statistics.num_new_tokens


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
def test_budget_cuts_a_path(model, max_new_tokens):
    statistics = assert_per_step(model, **GREEDY, max_new_tokens=max_new_tokens)
    assert statistics.num_draft_tokens <= statistics.num_cycles * (max_new_tokens - 1)


def test_a_tree_ends_at_the_last_position():
    """Learned positions: the deepest nodes of the last cycles would stand behind the table."""
    model = ProxyTunedModel(*tiny.shared_trio("gpt2").models)
    prompts = role_prompts([90, 70], seed=3)
    assert_per_step(model, prompts, **GREEDY, max_new_tokens=6)


def test_mixed_rows_and_rounds(model):
    """A row's text is its own, whatever the batch and the tree."""
    together = run(model, FOUR, **{**COUPLED, "seed": [7, 1, 99, 7]}, num_tree_tokens=30)
    for index, seed in enumerate([7, 1, 99, 7]):
        alone = run(model, FOUR.row(index), **{**COUPLED, "seed": [seed]}, num_tree_tokens=9, num_draft_tokens=2)
        assert alone.sequences[0, -13:].tolist() == together.sequences[index, -13:].tolist()


def test_a_chain_of_nodes_is_a_chain(model, monkeypatch):
    chain = run(model, FOUR, **COUPLED)
    reports = with_tree(monkeypatch, TreeShape.chain(4))
    tree = run(model, FOUR, **COUPLED, num_tree_tokens=4)
    assert tree.sequences.tolist() == chain.sequences.tolist()
    assert tree.speculation.token_sources == chain.speculation.token_sources
    for name in ("num_cycles", "num_draft_tokens", "accepted_per_position", "drafted_per_position"):
        assert getattr(tree.speculation, name) == getattr(chain.speculation, name)
    full = [report for report in reports if report.plan.num_drafts == 4]
    assert full and chain.speculation.num_tree_tokens == 0 < tree.speculation.num_tree_tokens


@pytest.mark.parametrize(
    "law", [GREEDY, COUPLED | {"top_p": 0.9, "repetition_penalty": 1.3}], ids=["greedy", "coupled"]
)
def test_best_guesses_are_the_drafts_of_a_chain(model, monkeypatch, law):
    """And all guesses of a node differ, so that one child at most is the target's token."""
    compared = []

    class Both(TreeDrafter):
        def propose(self, state: Any, runners: Any, noise: Any, plan: Any) -> Any:
            chain = DRAFTERS["expert"].propose(state, runners, state.noise(), plan)
            draft = super().propose(state, runners, noise, plan)
            tree = plan.tree
            best = [node for node in range(1, len(tree)) if set(tree.paths[node]) == {0}]
            compared.append(len(best))
            assert draft.tokens[:, [node - 1 for node in best]].tolist() == chain.tokens[:, : len(best)].tolist()
            for node in range(len(tree)):
                children = draft.tokens[:, [child - 1 for child in tree.children(node)]]
                assert all(len(set(row)) == len(row) for row in children.tolist())
            return draft

    monkeypatch.setattr(specproxy.decode, "drafter_of", lambda plan: Both() if plan.tree else DRAFTERS["expert"])
    run(model, **law, num_tree_tokens=40)
    assert max(compared) == 4


def test_trees_accept_more(model):
    chain, tree = (
        run(model, FOUR, **COUPLED, max_new_tokens=30),
        run(model, FOUR, **COUPLED, max_new_tokens=30, num_tree_tokens=40),
    )
    assert tree.speculation.mean_acceptance_length > 1.2 * chain.speculation.mean_acceptance_length


def test_logits_that_are_not_usable():
    """The rows that fail are those of per-step decoding, at the same tokens, and their neighbours' texts are theirs."""
    trio = tiny.make_trio("llama")
    healthy = run(ProxyTunedModel(*trio.models), FOUR, **GREEDY, num_draft_tokens=0).sequences[:, 9:].tolist()
    token = next(token for token in healthy[1][2:] if not all(token in row for row in healthy))

    def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        output.logits[kwargs["input_ids"][:, -output.logits.shape[1] :] == token] = torch.nan

    trio.anti_expert.register_forward_hook(spoil, with_kwargs=True)
    model = ProxyTunedModel(*trio.models)
    results = []
    for settings in ({"num_draft_tokens": 0}, {"num_tree_tokens": 30}):
        with pytest.raises(LogitsError, match="anti_expert") as caught:
            run(model, FOUR, **GREEDY, **settings)
        results.append((str(caught.value), caught.value.rows, caught.value.partial.sequences.tolist()))
    assert results[0] == results[1]
    assert 0 < len(results[0][1]) < 4


@pytest.mark.parametrize("seed", range(4))
def test_compaction_moves_a_path_and_nothing_else(seed):
    generator = torch.Generator().manual_seed(seed)
    batch, window, steps = 3, 20, 6
    cache = RaggedCache(batch + 1, torch.device("cpu"))
    cache.reserve(60)
    for layer in range(2):
        cache.begin(0, batch + 1, 40)
        cache.update(*torch.rand(2, batch + 1, 2, 40, 5, generator=generator).unbind(), layer)
    cache.set_lengths(0, [7, 0, 13, 5])
    slots = torch.stack([torch.randperm(window, generator=generator)[:steps].sort().values for _ in range(batch)])
    slots[0] = torch.arange(steps)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    cache.compact(slots)
    for layer, pair in zip(cache.layers, before, strict=True):
        for buffer, old in zip((layer.keys, layer.values), pair, strict=True):
            want = old.clone()
            for row in range(batch):
                first = cache.host_lengths[row]
                for step in range(steps):
                    want[row, :, first + step] = old[row, :, first + slots[row, step]]
            assert torch.equal(buffer, want)


def slots_for_depths(window: Window) -> torch.Tensor:
    return window.begin[:, None] + torch.arange(window.size)


def plant_noise(path: _Path, depth: Any, parameters: Any, noise: Any) -> Any:
    class BySlot:
        def at(self, position: torch.Tensor, most: int) -> Any:
            return noise.at(path.nodes[-1], 63)

    return DRAW_AT(path, depth, parameters, BySlot())


class Siblings(Nodes):
    def __init__(self, shape: TreeShape, device: torch.device) -> None:
        super().__init__(shape, device)
        for level in shape.levels:
            self.words[level.start : level.stop] |= sum(1 << node for node in level)


class Uncle(Nodes):
    def __init__(self, shape: TreeShape, device: torch.device) -> None:
        super().__init__(shape, device)
        for node in shape.levels[2] if shape.depth > 1 else ():
            uncle = next(other for other in shape.levels[1] if other != shape.parents[node])
            self.words[node] = 1 | 1 << uncle | 1 << node


def shifted(cache: RaggedCache, slots: torch.Tensor) -> None:
    moved = slots != torch.arange(slots.shape[1])
    COMPACT(cache, (slots - moved.long()).clamp(min=0))


DRAW_AT, COMPACT = _Path.draw_at, RaggedCache.compact
PLANTED: dict[str, tuple[Any, str, Any, dict[str, Any]]] = {
    "positions by slot": (Window, "positions", property(slots_for_depths), GREEDY),
    "noise by slot": (_Path, "draw_at", plant_noise, COUPLED),
    "a prefix without the path": (
        specproxy.walk,
        "take_token",
        lambda old, *args: old,
        {**GREEDY, "repetition_penalty": 2.0},
    ),
    "siblings are seen": (specproxy.trio, "Nodes", Siblings, GREEDY),
    "an uncle for a parent": (specproxy.trio, "Nodes", Uncle, GREEDY),
    "compaction off by one": (RaggedCache, "compact", shifted, GREEDY),
    "no compaction": (RaggedCache, "compact", lambda cache, slots: None, GREEDY),
    "leaves unread": (
        _Path,
        "run_leaves",
        lambda path, *args: path._enter(),
        GREEDY,
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_noticed(model, monkeypatch, fault):
    place, name, wrong, law = PLANTED[fault]
    settings = {**law, "num_tree_tokens": 20, "max_new_tokens": 16}
    per_step = run(model, FOUR, **{**settings, "num_draft_tokens": 0, "num_tree_tokens": 0})
    assert run(model, FOUR, **settings).sequences.tolist() == per_step.sequences.tolist()
    monkeypatch.setattr(place, name, wrong)
    assert run(model, FOUR, **settings).sequences.tolist() != per_step.sequences.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True}, 'num_tree_tokens=8 needs drafts that are compared for equality.*"coupled", or greedy'),
        ({"do_sample": True, "acceptance": "block"}, "acceptance='block' does not do when sampling"),
        ({"num_tree_tokens": 64}, "num_tree_tokens=64 must be at most 63"),
        ({"num_tree_tokens": -1}, "num_tree_tokens=-1 must be an integer of at least 0"),
        ({"num_tree_tokens": 2.5}, "num_tree_tokens=2.5 must be an integer"),
        ({"num_draft_tokens": 0}, "num_tree_tokens=8 needs num_draft_tokens as the tree's depth, not 0"),
        ({"num_draft_tokens": "auto"}, "not 'auto'; give a number"),
    ],
)
def test_what_no_tree_can_be_drafted_for(model, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        run(model, **{"num_tree_tokens": 8, **settings})
