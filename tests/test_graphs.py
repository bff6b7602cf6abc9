"""Captured cycles against eager ones, on the CPU: the same tokens by tapes, which bake in what a CUDA graph would."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import engines
import pytest
import tiny
import torch
from kernels.interpreter import quick_interpreter
from support import PAD, FavourOdd, role_prompts
from tape import CaptureError, TapeBackend
from test_lora import pair

import specproxy.cache
import specproxy.trio
from specproxy import AlphaSchedule, ConfigurationError, GraphCaptureError, ProxyTunedModel
from specproxy.graphs import Graphs, bucket, make_graphs
from specproxy.state import DecodeState
from specproxy_kernels import NoiseStream, reference

pytest.importorskip("triton", reason="Triton is published for Linux on x86-64 and ARM alone")

# The interpreter computes inf - inf where a compiled kernel does; numpy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")

PROMPTS = role_prompts([3, 9, 1], seed=31)
OWN = role_prompts([3, 9, 1], [8, 2, 11], [4, 10, 1], seed=22)


LAWS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "greedy with a penalty": {"do_sample": False, "repetition_penalty": 1.4},
    "plain": {"top_k": 0},
    "all": {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "temperature": 1.2, "repetition_penalty": 1.3},
    "counted": {
        "top_k": 0,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.7,
        "sequence_bias": [[[5], 2.0], [[8], -3.0]],
    },
    "banned": {"top_k": 0, "suppress_tokens": [1, 5, 8]},
    "a schedule": {"top_k": 0, "alpha_schedule": AlphaSchedule(cutoff=5, half_life=3)},
    "a ban that ends": {"top_k": 0, "min_new_tokens": 4, "eos_token_id": 3},
    "processor": {"top_k": 6, "logits_processor": [FavourOdd()]},
}


def write_all(
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """`write_window` for windows that fit, in operations that need no host."""
    rows = torch.arange(len(lengths))[:, None]
    positions = lengths[:, None] + torch.arange(key_states.shape[2])
    for states, buffer in ((key_states, keys), (value_states, values)):
        buffer.transpose(1, 2)[rows, positions] = states.transpose(1, 2)


def move_all(keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor) -> None:
    """`compact_window`, likewise."""
    rows = torch.arange(len(lengths))[:, None]
    source, target = lengths[:, None] + slots, lengths[:, None] + torch.arange(slots.shape[1])
    for buffer in (keys, values):
        buffer[rows, :, target] = buffer[rows, :, source]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """The path of the kernels; the torch reference stands in for their launches, which are slow to interpret."""
    monkeypatch.setenv("SPECPROXY_KERNELS", "triton")
    if "launches" not in request.fixturenames:
        monkeypatch.setattr(specproxy.cache, "write_window", write_all)
        monkeypatch.setattr(specproxy.cache, "compact_window", move_all)
        monkeypatch.setattr("specproxy_kernels.fused.draft.sample_drafts", reference.sample_drafts)
        monkeypatch.setattr("specproxy_kernels.fused.draft.sample_candidates", reference.sample_candidates)
        monkeypatch.setattr("specproxy_kernels.fused.verify.verify_window", reference.verify_window)
    with quick_interpreter():
        yield


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> TapeBackend:
    """Tapes stand in for CUDA graphs wherever `cuda_graphs` is not False."""
    backend = TapeBackend(allows_constants="launches" not in request.fixturenames)

    def tapes(devices: Any, wanted: bool | None) -> Graphs | None:
        return None if wanted is False else Graphs(backend)

    monkeypatch.setattr(specproxy.trio, "make_graphs", tapes)
    return backend


def trio(kind: str = "llama") -> ProxyTunedModel:
    return ProxyTunedModel(*tiny.shared_trio(kind).models)


def run(model: ProxyTunedModel, captured: bool, prompts: Any = PROMPTS, **settings: Any) -> Any:
    return model.generate(
        **prompts.kwargs(),
        **{"do_sample": True, "max_new_tokens": 9, "seed": 4, "num_draft_tokens": 3, **settings},
        cuda_graphs=captured,
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )


def assert_same(got: Any, expected: Any) -> None:
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert got.speculation.token_sources == expected.speculation.token_sources


@pytest.mark.parametrize(
    ("rule", "law"),
    [*(("rejection", law) for law in LAWS), *itertools.product(("block", "coupled"), ("plain", "all"))],
)
def test_captured_cycles_give_the_tokens_of_eager_ones(backend, rule, law):
    model = trio()
    expected = run(model, False, acceptance=rule, **LAWS[law])
    got = run(model, True, acceptance=rule, **LAWS[law])
    assert_same(got, expected)
    assert backend.tapes and backend.replays > len(backend.tapes)


_OF_TREES = ("all", "processor")


@pytest.mark.parametrize(
    "law", [*_OF_TREES, *(pytest.param(law, marks=pytest.mark.slow) for law in LAWS if law not in _OF_TREES)]
)
def test_captured_trees_give_the_tokens_of_eager_ones(backend, law):
    """The walk is part of the capture; with a processor, forwards of levels and of the window are captured alone."""
    model = trio()
    settings = {"acceptance": "coupled", "num_tree_tokens": 7, "max_new_tokens": 7, "prompts": OWN, **LAWS[law]}
    expected = run(model, False, **settings)
    got = run(model, True, **settings)
    assert_same(got, expected)
    assert got.speculation.num_tree_tokens > 0
    assert backend.tapes and backend.replays > len(backend.tapes)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("law", ["plain", "processor"])
def test_a_pair_of_one_set_of_weights(backend, law):
    """An adapter as the expert: whole cycles, or each forward, one of which holds both models' windows."""
    own = pair()
    expected = run(own.whole, False, OWN, **LAWS[law])
    assert_same(run(own.shared, False, OWN, **LAWS[law]), expected)
    assert_same(run(own.shared, True, OWN, **LAWS[law]), expected)
    assert backend.replays > len(backend.tapes) > 0


@pytest.fixture
def launches() -> None:
    """Asked for by tests that run the kernels themselves."""


def test_recorded_launches_give_the_tokens_of_eager_ones(backend, launches):
    """The kernels themselves, in the interpreter; nothing may be built from Python data."""
    settings = {"num_draft_tokens": 1, "max_new_tokens": 4, "top_k": 6, "repetition_penalty": 1.2}
    prompts = role_prompts([3, 6], seed=5)
    model = trio()
    assert_same(run(model, True, prompts, **settings), run(model, False, prompts, **settings))
    assert all(tape.num_launches > 12 for tape in backend.tapes)


def test_recorded_launches_of_a_tree(backend, launches):
    settings = {"num_draft_tokens": 1, "num_tree_tokens": 3, "max_new_tokens": 5, "top_k": 0, "acceptance": "coupled"}
    prompts = role_prompts([3], seed=5)
    model = trio()
    got = run(model, True, prompts, **settings)
    assert_same(got, run(model, False, prompts, **settings))
    assert got.speculation.num_accepted_tokens > 0
    assert all(tape.num_launches > 12 for tape in backend.tapes)


_QUICK = ("gpt2", "gemma3")


@pytest.mark.parametrize(
    "kind",
    [
        *_QUICK,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in tiny.SUPPORTED if kind not in (*_QUICK, "llama")),
    ],
)
def test_every_architecture(backend, kind):
    """Prompts per role; EOS ends rows at different times, so that buckets change."""
    model = trio(kind)
    settings = {"do_sample": False, "eos_token_id": [5, 11, 17], "prompts": OWN}
    assert_same(run(model, True, **settings), run(model, False, **settings))
    assert backend.replays > 2


@pytest.mark.parametrize("num_draft_tokens", [0, 6, "auto"])
def test_every_window(backend, num_draft_tokens):
    model = trio()
    settings = {"num_draft_tokens": num_draft_tokens, "acceptance": "coupled", "top_k": 0}
    got, expected = run(model, True, **settings), run(model, False, **settings)
    assert got.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_an_order_that_lets_models_run_side_by_side(backend, num_draft_tokens):
    """The bonus step comes before the base's window then, whether or not it is reached."""
    model = trio()
    model._trio.overlap = True
    settings = {"num_draft_tokens": num_draft_tokens, "top_k": 0}
    got = run(model, True, **settings)
    assert model._trio._spare[1].overlaps
    assert_same(got, run(model, False, **settings))
    run(model, True, **settings)
    made = len(backend.tapes)
    model._trio.overlap = False
    assert_same(run(model, True, **settings), got)
    assert len(backend.tapes) > made, "captures of the other order were replayed"


def test_buckets_shrink_with_the_rows(backend):
    """Five rows end one after another: captures for 5 of at most 5 rows, 4, 2 and 1."""
    model = trio()
    prompts = role_prompts([3, 9, 1, 4, 6], seed=31)
    open_ended = run(model, False, prompts, max_new_tokens=24).sequences[:, 9:].tolist()
    eos = [open_ended[row][place] for row, place in ((0, 2), (1, 5), (2, 9), (3, 14))]
    settings = {"eos_token_id": eos, "max_new_tokens": 24}
    got = run(model, True, prompts, **settings)
    assert_same(got, run(model, False, prompts, **settings))
    lengths = [len(sources) for sources in got.speculation.token_sources]
    assert len(set(lengths)) > 2, "the rows end together"


def test_captures_are_kept_for_the_next_call(backend):
    model = trio()
    for seed, prompts in enumerate((PROMPTS, role_prompts([2, 5, 7], seed=3), role_prompts([4], seed=4))):
        assert_same(run(model, True, prompts, seed=seed), run(copy_of(model), False, prompts, seed=seed))
        if seed == 0:
            made = len(backend.tapes)
    # A single row in buffers of three needs a capture of its own, and no more.
    assert len(backend.tapes) <= made + 2
    run(model, True, max_new_tokens=5)
    assert len(backend.tapes) <= made + 2


def copy_of(model: ProxyTunedModel) -> ProxyTunedModel:
    """Another face of the same models: an eager call of `model` itself would free its captures."""
    return ProxyTunedModel(model.base, model.expert, model.anti_expert)


def test_an_eager_call_frees_the_captures(backend):
    model = trio()
    run(model, True)
    assert model._trio._spare is not None
    run(model, False)
    assert model._trio._spare is None


def test_moved_weights_are_captured_anew(backend):
    """A capture reads weights where they were: new ones elsewhere must not be missed."""
    model = ProxyTunedModel(*(copy.deepcopy(part) for part in tiny.shared_trio("llama").models))
    run(model, True, role_prompts([4], seed=4))
    made = len(backend.tapes)
    model.base.lm_head.weight = torch.nn.Parameter(model.base.lm_head.weight.flip(0).clone())
    got = run(model, True, role_prompts([4], seed=4))
    assert len(backend.tapes) > made
    assert_same(got, run(copy_of(model), False, role_prompts([4], seed=4)))


def test_an_engine_replays_cycles_while_prompts_are_read(backend):
    """Idle rows of a captured cycle write behind their ends: the slot in which prompts are read is none of them."""
    settings = {"do_sample": True, "top_k": 6, "repetition_penalty": 1.1}
    prompts = tiny.prompts([5, 20, 9, 13], seed=3)
    with engines.driven(trio(), max_batch_size=3, prefill_chunk=4, num_draft_tokens=3) as engine:
        handles = []
        for i, prompt in enumerate(prompts):
            handles.append(engine.submit(prompt, seed=i, max_new_tokens=5 + i, num_draft_tokens=3 - i % 2, **settings))
            engine.turn(2)
        # Logarithms need the window of a replayed cycle; a processor in Python, cycles that are replayed in parts.
        handles.append(engine.submit(prompts[0], seed=7, max_new_tokens=4, logprobs=1, **settings))
        handles.append(engine.submit(prompts[2], seed=8, max_new_tokens=4, no_repeat_ngram_size=2, **settings))
        outputs = engine.finish(*handles)
        engine.assert_empty()
    assert backend.replays > len(backend.tapes) > 0
    calls = [{"seed": i, "max_new_tokens": 5 + i, "num_draft_tokens": 3 - i % 2} for i in range(4)]
    calls += [{"seed": 7, "max_new_tokens": 4}, {"seed": 8, "max_new_tokens": 4, "no_repeat_ngram_size": 2}]
    calls = [{"num_draft_tokens": 3, **call} for call in calls]
    for prompt, call, output in zip([*prompts, prompts[0], prompts[2]], calls, outputs, strict=True):
        assert output.tokens == engines.alone(prompt, trio(), cuda_graphs=False, **call, **settings), call
    assert len(outputs[4].logprobs) == 4


@pytest.mark.parametrize(
    ("options", "drafter"),
    [
        ({"drafter": "lookup"}, "lookup"),
        ({"drafter": "cascade"}, "cascade"),
        ({"drafter": "assistant"}, "assistant"),
        ({"num_tree_tokens": 7}, "tree"),
    ],
    ids=["lookup", "cascade", "assistant", "tree"],
)
def test_an_engine_with_captures_whoever_drafts(backend, options, drafter):
    """Twice on the same runners: the first engine's rows have left what they were in the assistant's cache."""
    law = {"do_sample": True, "temperature": 1.2, "acceptance": "coupled"}
    proxy = ProxyTunedModel(*tiny.shared_trio("llama").models, assistant=tiny.shared_trio("llama").anti_expert)
    prompts = tiny.prompts([5, 20, 9, 13], seed=3)
    for turn in range(2):
        with engines.driven(proxy, max_batch_size=3, prefill_chunk=4, acceptance="coupled", **options) as engine:
            handles = []
            for i, prompt in enumerate(prompts[::-1] if turn else prompts):
                request = {"seed": i, "max_new_tokens": 5 + 2 * i, "do_sample": True, "temperature": 1.2}
                handles.append(engine.submit(prompt, **request))
                engine.turn(2)
            outputs = engine.finish(*handles)
            counts = engine.engine.stats().speculation.drafters
            engine.assert_empty()
        assert set(counts) <= {drafter} and (counts or drafter == "lookup")
        for i, (prompt, output) in enumerate(zip(prompts[::-1] if turn else prompts, outputs, strict=True)):
            per_step = {"seed": i, "max_new_tokens": 5 + 2 * i, "num_draft_tokens": 0, **law}
            assert output.tokens == engines.alone(prompt, trio(), cuda_graphs=False, **per_step)
    if drafter == "assistant":
        assert counts[drafter].num_accepted_tokens > 0
    assert backend.replays > 0


def test_an_engine_goes_on_behind_a_capture_that_broke_off(backend):
    prompts = tiny.prompts([5, 9], seed=3)
    with engines.driven(trio(), max_batch_size=2, num_draft_tokens=3) as engine:
        handles = [engine.submit(prompt, max_new_tokens=12) for prompt in prompts]
        engine.turn(2)
        graphs = engine.scheduler.runners.graphs
        graphs.run = engines.once(graphs.run, torch.OutOfMemoryError("no memory is left"))
        output, failed = engine.finish(*handles)
    assert failed.finish_reason == "error"
    assert output.tokens == engines.alone(prompts[0], trio(), cuda_graphs=False, max_new_tokens=12)


def test_growing_caches_are_captured_anew(backend, monkeypatch):
    """The budget is not reserved whole here, so that buffers move while the text grows."""
    monkeypatch.setattr(specproxy.cache, "_GROWTH", 4)
    monkeypatch.setattr(specproxy.trio.TrioRunners, "reserve", lambda runners, capacity: None)
    model = trio()
    settings = {"max_new_tokens": 20, "top_k": 0, "prompts": role_prompts([2], seed=3)}
    got = run(model, True, **settings)
    assert_same(got, run(copy_of(model), False, **settings))
    assert len(backend.tapes) > 2, "the buffers never moved"


def test_idle_rows_change_no_row(backend):
    """Three rows in buffers for five: whatever stands behind them, their tokens stay."""
    model = trio()
    five = role_prompts([3, 9, 1, 4, 6], seed=31)
    run(model, True, five, top_k=0, max_new_tokens=2)
    runners = model._trio._spare[1]
    with torch.inference_mode():
        for runner in runners:
            for layer in runner.cache.layers:
                layer.keys[3:] = 1e3
                layer.values[3:] = -1e3
    assert_same(run(model, True, top_k=0), run(copy_of(model), False, top_k=0))


def test_a_host_read_inside_a_model_cannot_be_captured(backend):
    model = ProxyTunedModel(*(copy.deepcopy(part) for part in tiny.shared_trio("llama").models))
    model.anti_expert.register_forward_hook(lambda module, args, output: output.logits.sum().item() and None)
    with pytest.raises(GraphCaptureError, match=r"cycle \(3 rows, 3 drafts\).*host.*set cuda_graphs=False"):
        run(model, True)
    assert run(model, False).sequences.shape[0] == 3


def test_a_failed_call_leaves_nothing_behind(backend, monkeypatch):
    model = trio()
    run(model, True)
    with pytest.raises(RuntimeError, match="interrupted"):
        run(model, True, stopping_criteria=[interrupt])
    assert model._trio._spare is None
    assert_same(run(model, True), run(copy_of(model), False))


def interrupt(input_ids: torch.Tensor, scores: Any) -> bool:
    raise RuntimeError("interrupted")


PLANTED = {
    "start as a number": (
        "noise",
        lambda state, fresh: NoiseStream(state.key, torch.full_like(state.start, len(state.rows[0].tokens))),
    ),
    "budget as a number": (
        "num_drafts",
        lambda state, count: torch.full_like(state.remaining, max(0, min(count, state.rows[0].remaining - 1) - 2)),
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_number_baked_in_is_noticed(backend, monkeypatch, fault):
    """Eagerly both are right for a single row; a replay finds what was true when it was captured."""
    name, wrong = PLANTED[fault]
    prompt = role_prompts([4], seed=3)
    settings = {"top_k": 0, "temperature": 1.5, "max_new_tokens": 12}
    monkeypatch.setattr(DecodeState, name, wrong)
    expected = run(trio(), False, prompt, **settings)
    got = run(trio(), True, prompt, **settings)
    changed = got.sequences.tolist() != expected.sequences.tolist()
    assert changed or got.speculation.token_sources != expected.speculation.token_sources


def test_a_tensor_put_in_place_of_a_buffer_is_noticed(backend, monkeypatch):
    def commit(state: DecodeState, drafts: Any, num_accepted: Any, next_token: Any) -> torch.Tensor:
        advance = own(state, drafts, num_accepted, next_token)
        state.start = state.start.clone()  # later cycles advance what no capture reads
        return advance

    own = DecodeState.commit
    prompt = role_prompts([4], seed=3)
    settings = {"top_k": 0, "temperature": 1.5, "max_new_tokens": 12}
    expected = run(trio(), False, prompt, **settings)
    monkeypatch.setattr(DecodeState, "commit", commit)
    assert run(trio(), False, prompt, **settings).sequences.tolist() == expected.sequences.tolist()
    assert run(trio(), True, prompt, **settings).sequences.tolist() != expected.sequences.tolist()


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: bool(x.any()),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x.numpy(),
    ],
)
def test_the_tape_refuses_what_a_capture_refuses(work):
    with pytest.raises(CaptureError):
        TapeBackend().capture(Warm(work, torch.tensor([1.0, -2.0, 3.0])), lambda: None)


class Warm:
    """Work whose warm-up is spared."""

    def __init__(self, work: Any, x: torch.Tensor) -> None:
        self.work, self.x, self.runs = work, x, 0

    def __call__(self) -> Any:
        self.runs += 1
        return self.work(self.x) if self.runs > 1 else None


def test_graphs_replay_with_new_inputs_and_report_failures():
    graphs = Graphs(TapeBackend())
    total = torch.zeros(3)

    def add(x: torch.Tensor) -> torch.Tensor:
        total.add_(x)
        return total * 2

    for step in range(1, 4):
        doubled = graphs.run("add", 1, add, [torch.full((3,), float(step))], [total])
        assert total.tolist() == [sum(range(step + 1))] * 3, "warming up or capturing left a trace"
        assert doubled.tolist() == [2.0 * sum(range(step + 1))] * 3
    assert len(graphs) == 1
    graphs.run("add", 2, add, [torch.zeros(3)], [total])
    assert len(graphs) == 1, "the capture of a generation that has passed is kept"
    with pytest.raises(GraphCaptureError, match=r"reading cannot be captured.*cuda_graphs=False"):
        graphs.run("read", 2, lambda: total.sum().item(), title="reading")
    assert graphs.run("add", 2, add, [torch.zeros(3)], [total]) is not None


@pytest.mark.parametrize(
    ("count", "most", "width"), [(1, 8, 1), (2, 8, 2), (3, 8, 4), (5, 8, 8), (5, 6, 6), (3, 3, 3), (9, 64, 16)]
)
def test_buckets(count, most, width):
    assert bucket(count, most) == width


CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


def test_graphs_are_refused_where_they_cannot_be_had(monkeypatch):
    assert make_graphs({CPU}, None) is None
    assert make_graphs({FIRST, SECOND}, None) is None
    assert make_graphs({FIRST}, False) is None
    for devices, names in (({CPU}, "cpu"), ({FIRST, SECOND}, "cuda:0, cuda:1")):
        with pytest.raises(
            ConfigurationError, match=f"cuda_graphs=True needs every model on one CUDA device, not on {names};"
        ):
            make_graphs(devices, True)
    monkeypatch.setenv("SPECPROXY_KERNELS", "torch")
    assert make_graphs({FIRST}, None) is None
    with pytest.raises(ConfigurationError, match="SPECPROXY_KERNELS=torch"):
        make_graphs({FIRST}, True)


@pytest.mark.parametrize("value", [1, "yes", 0.0])
def test_a_switch_that_is_none(value):
    with pytest.raises(ConfigurationError, match=f"cuda_graphs={value!r} must be True, False or None"):
        run(trio(), value)
