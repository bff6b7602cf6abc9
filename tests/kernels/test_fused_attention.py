"""The attention kernels against the torch reference in float64; interpreted where there is no GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch

from specproxy.attention import borrowed
from specproxy.runner import Runner
from specproxy_kernels import compact_window, ragged_attention, write_window
from specproxy_kernels.attention import (
    compact_window_reference,
    ragged_attention_reference,
    write_window_reference,
)

pytest.importorskip("triton")

from specproxy_kernels.fused import attention as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
C = fused.KEYS_PER_SPLIT
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative, and absolute at order one


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPROXY_KERNELS", "triton")


@dataclass(frozen=True)
class Case:
    """One call: G query heads per key head and T queries, D and D_v, and the rest of the arguments."""

    shape: tuple[int, int]
    dims: tuple[int, int]
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (0, C + 1)
    sliding_window: int | None = None
    softcap: float | None = None
    is_tree: bool = False
    layout: str = "slice"

    def __str__(self) -> str:
        numbers = "-".join(map(str, (*self.shape, *self.dims, *self.lengths)))
        return (
            f"{numbers}-{str(self.dtype)[6:]}-{self.sliding_window}-{self.softcap}-{self.layout}"
            + "-tree" * self.is_tree
        )

    def tensors(self) -> dict[str, Any]:
        """Arguments of `ragged_attention`; keys and values are views of larger or transposed memory."""
        groups, window = self.shape
        generator = torch.Generator().manual_seed(groups + 10 * window + sum(self.dims) + sum(self.lengths))
        batch, kv_heads, num_keys = len(self.lengths), 1 + (groups * window < 4), max(self.lengths) + window

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype).to(DEVICE)

        query = normal(batch, window, kv_heads * groups, self.dims[0]).transpose(1, 2)
        if self.layout == "slice":  # rows 1 .. B of a cache with more rows and positions
            keys, values = (normal(batch + 2, kv_heads, num_keys + 9, d)[1:-1, :, :num_keys] for d in self.dims)
        elif self.layout == "transposed":  # [B, S, H_kv, D]
            keys, values = (normal(batch, num_keys, kv_heads, d).transpose(1, 2) for d in self.dims)
        else:  # [B, H_kv, D, S], and values with a step between elements
            keys = normal(batch, kv_heads, self.dims[0], num_keys).transpose(2, 3)
            values = normal(batch, kv_heads, num_keys, 2 * self.dims[1])[..., ::2]
        return {
            "query": query,
            "keys": keys,
            "values": values,
            "lengths": torch.tensor(self.lengths, device=DEVICE),
            "scaling": 1.5 * self.dims[0] ** -0.5,
            "softcap": self.softcap,
            "sliding_window": self.sliding_window,
            "ancestors": random_trees(batch, window, generator).to(DEVICE) if self.is_tree else None,
        }


def random_trees(batch: int, window: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [B, T]: each token's word is its parent's, or none, and its own bit."""
    rows = []
    for _ in range(batch):
        words: list[int] = []
        for t in range(window):
            parent = int(torch.randint(-1, t, (), generator=generator)) if t else -1
            words.append((words[parent] if parent >= 0 else 0) | 1 << t)
        rows.append([word - (word >> 63 << 64) for word in words])
    return torch.tensor(rows)


FACTORS: dict[str, list[Any]] = {
    "shape": [(7, 1), (1, 2), (2, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 8), (1, 9)],
    "dims": [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (24, 40), (33, 17)],
    "lengths": [(0, C + 1), (1, C), (C - 1, 2 * C + 37), (3, 100)],
    "sliding_window": [None, 1, 6, 200],
    "dtype": list(TOLERANCE),
    "layout": ["slice", "transposed", "strided"],
    "softcap": [None, 1.5],
    "is_tree": [False, True],
}


def pairwise(factors: dict[str, list[Any]]) -> list[Case]:
    """Cases in which every two values of different factors meet: greedily, from the first two factors' product."""
    names = list(factors)
    missing = {
        frozenset({(a, i), (b, j)})
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }
    cases = []
    for first in itertools.product(*(range(len(factors[name])) for name in names[:2])):
        chosen = dict(zip(names, first, strict=False))
        for name in names[2:]:
            chosen[name] = max(
                range(len(factors[name])),
                key=lambda i: (
                    sum(frozenset({(name, i), pair}) in missing for pair in chosen.items()),
                    (i + len(cases)) % len(factors[name]),
                ),
            )
        missing -= {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
        cases.append(Case(**{name: factors[name][i] for name, i in chosen.items()}))
    assert not missing
    return cases


# Windows of many rows, in one split: the interpreter takes its time for every row of a combination.
LARGE = [
    Case((1, 16), (64, 64), lengths=(5, C - 16), sliding_window=20),
    Case((4, 16), (24, 40), torch.bfloat16, (0, 40), is_tree=True),
    Case((7, 9), (128, 128), torch.float16, (0, 70), layout="transposed"),
    Case((1, 64), (80, 80), torch.bfloat16, (1, C - 64), sliding_window=30, softcap=1.5, is_tree=True),
    Case((3, 64), (33, 17), lengths=(0, 99), is_tree=True),
    Case((1, 64), (16, 16), lengths=(C + 1,), sliding_window=C, is_tree=True),
    Case((2, 80), (24, 24), lengths=(0, C + 60)),
    Case((1, 150), (16, 16), torch.float16, (C, 2 * C - 3), sliding_window=100, softcap=1.5),
]


@pytest.mark.parametrize("case", [*pairwise(FACTORS), *LARGE], ids=str)
def test_kernel_equals_reference(case: Case) -> None:
    arguments = case.tensors()
    wide = {name: arguments[name].double() for name in ("query", "keys", "values")}
    want = ragged_attention_reference(**(arguments | wide))
    out = ragged_attention(**arguments)
    assert out.dtype == case.dtype and out.is_contiguous() and out.shape == want.shape
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


def test_many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than one step of the combination takes; later keys weigh more, so that every step rescales."""
    monkeypatch.setattr(fused, "KEYS_PER_SPLIT", 64)
    arguments = Case((1, 2), (16, 24), lengths=(17 * 64 + 3, 8 * 64 - 2, 9 * 64)).tensors()
    arguments["keys"] = arguments["keys"] * torch.arange(arguments["keys"].shape[2], device=DEVICE)[:, None] / 200
    wide = {name: arguments[name].double() for name in ("query", "keys", "values")}
    want = ragged_attention_reference(**(arguments | wide))
    torch.testing.assert_close(ragged_attention(**arguments).double(), want, rtol=1e-5, atol=1e-5)


def rows(arguments: dict[str, Any], index: list[int]) -> dict[str, Any]:
    names = [name for name in ("query", "keys", "values", "lengths", "ancestors") if arguments[name] is not None]
    return arguments | {name: arguments[name][index] for name in names}


ROW_CASES = [
    Case((2, 2), (24, 24), torch.bfloat16, (5, C, 2 * C + 9)),
    Case((1, 4), (64, 64), torch.float32, (C - 2, 0, 2 * C), sliding_window=70, is_tree=True),
]


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_a_row_depends_on_itself_alone(case: Case) -> None:
    """Bit for bit: permuted, alone, in a buffer just long enough for it, and in a longer one."""
    arguments = case.tensors()
    out = ragged_attention(**arguments)
    order = list(range(len(case.lengths)))[::-1]
    assert torch.equal(ragged_attention(**rows(arguments, order)), out[order])
    for row, length in enumerate(case.lengths):
        alone = rows(arguments, [row])
        assert torch.equal(ragged_attention(**alone)[0], out[row])
        for name in ("keys", "values"):
            alone[name] = alone[name][:, :, : length + case.shape[1]]
        assert torch.equal(ragged_attention(**alone)[0], out[row])
        for name in ("keys", "values"):
            alone[name] = torch.nn.functional.pad(alone[name], (0, 0, 0, C))
        assert torch.equal(ragged_attention(**alone)[0], out[row])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_neighbours_and_stale_keys_do_not_matter(case: Case, poison: float) -> None:
    arguments = case.tensors()
    out = ragged_attention(**arguments)
    for name in ("keys", "values"):
        arguments[name] = arguments[name].clone()
        for row, length in enumerate(case.lengths):
            arguments[name][row, :, length + case.shape[1] :] = poison
    assert torch.equal(ragged_attention(**arguments), out)
    arguments["keys"][1], arguments["values"][1], arguments["query"][1] = poison, poison, poison
    poisoned = ragged_attention(**arguments)
    assert poisoned[1].isnan().all()
    others = [row for row in range(len(case.lengths)) if row != 1]
    assert torch.equal(poisoned[others], out[others])


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    for num_keys in (8, C + 8):  # one split and two
        arguments = Case((2, 2), (16, 16), lengths=(0, num_keys - 2)).tensors()
        arguments["ancestors"] = torch.tensor([[0, 2], [0, 2]], device=DEVICE)
        out = ragged_attention(**arguments)
        assert (out[0, 0] == 0).all() and (out[0, 1] != 0).all() and (out[1] != 0).all()


@pytest.mark.parametrize(("size", "dtype"), [(16, torch.float64), (300, torch.float32)])
def test_other_dtypes_and_wide_heads_take_the_reference(size: int, dtype: torch.dtype) -> None:
    arguments = Case((2, 3), (size, 16), dtype, (4, 9)).tensors()
    assert torch.equal(ragged_attention(**arguments), ragged_attention_reference(**arguments))


def test_nothing_to_do() -> None:
    empty = torch.zeros(0, 2, 3, 16, device=DEVICE)
    lengths = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert ragged_attention(empty, empty, empty, lengths, scaling=1.0).shape == (0, 3, 2, 16)
    write_window(empty, empty, empty, empty, lengths)
    compact_window(empty, empty, lengths, lengths[:, None])


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
@pytest.mark.parametrize(("window", "dims"), [(1, (16, 16)), (5, (80, 24)), (37, (33, 128))])
def test_write_equals_reference(window: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Strided states into strided buffers, at both ends of the buffer and past it; nothing else is touched."""
    capacity = 40
    lengths = torch.tensor([0, 3, capacity - window, capacity - 1, capacity, capacity + 7], device=DEVICE)
    states = [torch.randn(6, window, 2, d, device=DEVICE).to(dtype).transpose(1, 2) for d in dims]
    buffers = [torch.randn(8, 2, capacity + 5, d, device=DEVICE).to(dtype) for d in dims]
    want = [buffer.clone() for buffer in buffers]
    write_window(*states, *(buffer[1:-1, :, :capacity] for buffer in buffers), lengths)
    write_window_reference(*states, *(buffer[1:-1, :, :capacity] for buffer in want), lengths)
    for got, expected in zip(buffers, want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("sliding_window", [None, 3, C])
@pytest.mark.parametrize(("first", "end"), [(0, 2), (2, 5), (6, 7), (12, 24)])
def test_a_tree_in_pieces(first: int, end: int, sliding_window: int | None) -> None:
    """The last queries of a window, on both sides of a split of the keys."""
    case = Case((2, 64), (16, 24), lengths=(0, C - 3), sliding_window=sliding_window, is_tree=True)
    whole = case.tensors()
    arguments = whole | {"query": whole["query"][:, :, first:end], "ancestors": whole["ancestors"][:, :end]}
    wide = {name: arguments[name].double() for name in ("query", "keys", "values")}
    want = ragged_attention_reference(**(arguments | wide))
    torch.testing.assert_close(ragged_attention(**arguments).double(), want, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_compact_equals_reference(dtype: torch.dtype) -> None:
    """Rows of a larger cache; paths of several beginnings, one that stays where it is."""
    lengths = torch.tensor([0, 3, 17], device=DEVICE)
    slots = torch.tensor([[0, 2, 5, 9], [0, 1, 2, 3], [0, 1, 4, 5]], device=DEVICE)
    buffers = [torch.randn(5, 2, 45, d, device=DEVICE).to(dtype) for d in (24, 33)]
    want = [buffer.clone() for buffer in buffers]
    compact_window(*(buffer[1:-1, :, :40] for buffer in buffers), lengths, slots)
    compact_window_reference(*(buffer[1:-1, :, :40] for buffer in want), lengths, slots)
    for got, expected in zip(buffers, want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_whole_models(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill of ragged prompts and two windows, the second after a partial rollback."""
    model = tiny.tiny_model(kind, dtype=torch.float32).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, tiny.VOCAB_SIZE, (n,), generator=generator).tolist() for n in (70, 3)]
    tokens = torch.randint(0, tiny.VOCAB_SIZE, (2, 2, 4), generator=generator)

    def logits() -> torch.Tensor:
        runner = Runner(model, "base", 2)
        with torch.no_grad(), borrowed([model]):
            runner.prefill(0, prompts)
            first = runner.forward(tokens[0].to(DEVICE))
            runner.cache.advance(torch.tensor([3, 1]))
            runner.cache.follow([3, 1])
            return torch.stack((first, runner.forward(tokens[1].to(DEVICE))))

    fused_logits = logits()
    monkeypatch.setenv("SPECPROXY_KERNELS", "torch")
    want = logits()
    assert not torch.equal(fused_logits, want), "both took the same path"
    torch.testing.assert_close(fused_logits, want, rtol=1e-4, atol=1e-4)
