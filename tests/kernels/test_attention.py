"""Window attention against a softmax written out per row, head and query."""

import itertools

import numpy as np
import pytest
import torch

from specproxy_kernels import compact_window, ragged_attention, window_attention, window_bias, write_window
from specproxy_kernels.attention import ragged_attention_reference, write_window_reference


def naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree: list[list[set[int]]] | None = None,
) -> torch.Tensor:
    """out [B, T, H, D_v]: query t of row b sees keys s <= lengths[b] + t, and s > lengths[b] + t - sliding_window.

    With a tree, tree[b][t] are the window keys that query t sees, and a token's position is its number of them.
    """
    batch, heads, window, _ = query.shape
    groups = heads // key.shape[1]
    out = np.zeros((batch, window, heads, value.shape[-1]))
    for b, h, t in itertools.product(range(batch), range(heads), range(window)):
        own = tree[b] if tree is not None else [set(range(i + 1)) for i in range(window)]
        position = {s: s for s in range(lengths[b])} | {lengths[b] + j: lengths[b] + len(own[j]) - 1 for j in own[t]}
        if sliding_window is not None:
            position = {s: p for s, p in position.items() if p > lengths[b] + len(own[t]) - 1 - sliding_window}
        seen = list(position)
        if not seen:
            continue
        keys = key[b, h // groups, seen].double().numpy()
        scores = scaling * keys @ query[b, h, t].double().numpy()
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weight = np.exp(scores - scores.max())
        out[b, t, h] = weight @ value[b, h // groups, seen].double().numpy() / weight.sum()
    return torch.tensor(out)


def tensors(
    batch: int, kv_heads: int, groups: int, window: int, num_keys: int, size: int = 6, value_size: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * groups + 100 * window + num_keys)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return (
        normal(batch, kv_heads * groups, window, size),
        normal(batch, kv_heads, num_keys, size),
        normal(batch, kv_heads, num_keys, value_size),
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 100])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_ragged_window(window: int, groups: int, sliding_window: int | None, softcap: float | None) -> None:
    lengths = [0, 1, 7, 3]
    num_keys = max(lengths) + window
    query, key, value = tensors(4, 2, groups, window, num_keys)
    # Stale keys behind each row's window may hold anything finite.
    for row, length in enumerate(lengths):
        key[row, :, length + window :] = 1e3
        value[row, :, length + window :] = -1e6
    bias = window_bias(torch.tensor(lengths), window, num_keys, groups, torch.float64, sliding_window)
    assert bias.shape == (4, 1, groups * window, num_keys)
    out = window_attention(query, key, value, bias, scaling=0.4, softcap=softcap)
    assert out.shape == (4, window, 2 * groups, 6) and out.is_contiguous()
    torch.testing.assert_close(out, naive(query, key, value, lengths, 0.4, sliding_window, softcap), rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 4, 9])
def test_causal_path(window: int, groups: int, softcap: float | None) -> None:
    query, key, value = tensors(3, 2, groups, window, window, value_size=5)
    out = window_attention(query, key, value, None, scaling=0.3, softcap=softcap, causal=True)
    assert out.shape == (3, window, 2 * groups, 5) and out.is_contiguous()
    torch.testing.assert_close(out, naive(query, key, value, [0] * 3, 0.3, None, softcap), rtol=0, atol=1e-12)
    bias = window_bias(torch.zeros(3, dtype=torch.long), window, window, groups, torch.float64)
    torch.testing.assert_close(
        window_attention(query, key, value, bias, scaling=0.3, softcap=softcap), out, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_no_bias_where_every_key_is_visible(groups: int) -> None:
    query, key, value = tensors(2, 2, groups, 1, 8)
    out = window_attention(query, key, value, None, scaling=0.5)
    torch.testing.assert_close(out, naive(query, key, value, [7, 7], 0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_lower_precision(dtype: torch.dtype, softcap: float | None) -> None:
    lengths = [2, 6]
    query, key, value = (t.to(dtype) for t in tensors(2, 2, 2, 3, 9))
    bias = window_bias(torch.tensor(lengths), 3, 9, 2, dtype)
    assert bias.dtype == dtype
    out = window_attention(query, key, value, bias, scaling=0.4, softcap=softcap)
    assert out.dtype == dtype
    # Scores and weights are rounded to the inputs' precision: a few ulp of values of order one.
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        out.double(), naive(query, key, value, lengths, 0.4, None, softcap), rtol=0, atol=tolerance
    )


def test_strided_inputs() -> None:
    """Queries come as [B, T, H, D] transposed, and keys as a slice of a longer buffer."""
    query, key, value = tensors(2, 2, 2, 3, 12)
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    lengths = [4, 2]
    bias = window_bias(torch.tensor(lengths), 3, 7, 2, torch.float64)
    out = window_attention(strided, key[:, :, :7], value[:, :, :7], bias, scaling=0.4)
    torch.testing.assert_close(out, naive(query, key, value, lengths, 0.4), rtol=0, atol=1e-12)
    causal = window_attention(strided, key[:, :, :3], value[:, :, :3], None, scaling=0.4, causal=True)
    torch.testing.assert_close(causal, naive(query, key, value, [0, 0], 0.4), rtol=0, atol=1e-12)


def test_bias_is_exact() -> None:
    bias = window_bias(torch.tensor([0, 2]), 2, 5, 2, torch.float32, sliding_window=2)
    o, x = 0.0, float("-inf")
    first = [[o, x, x, x, x], [o, o, x, x, x]]
    second = [[x, o, o, x, x], [x, x, o, o, x]]
    assert bias.tolist() == [[[*first, *first]], [[*second, *second]]]


def words(tree: list[list[set[int]]]) -> torch.Tensor:
    """int64 [B, T]: a bit per window key that a query sees."""
    unsigned = [[sum(1 << j for j in seen) for seen in row] for row in tree]
    return torch.tensor([[word - (word >> 63 << 64) for word in row] for row in unsigned])


def random_tree(window: int, generator: torch.Generator) -> list[set[int]]:
    """Every token's ancestors and itself; parents stand before their children."""
    seen: list[set[int]] = []
    for t in range(window):
        parent = int(torch.randint(-1, t, (), generator=generator)) if t else -1
        seen.append({t} | (seen[parent] if parent >= 0 else set()))
    return seen


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sliding_window", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("window", [1, 3, 8, 64])
def test_token_tree(window: int, sliding_window: int | None, softcap: float | None) -> None:
    lengths = [0, 1, 7, 3]
    generator = torch.Generator().manual_seed(window)
    tree = [random_tree(window, generator) for _ in lengths]
    query, key, value = tensors(4, 1, 2, window, max(lengths) + window + 2)
    out = ragged_attention(
        query,
        key,
        value,
        torch.tensor(lengths),
        scaling=0.4,
        softcap=softcap,
        sliding_window=sliding_window,
        ancestors=words(tree),
    )
    want = naive(query, key, value, lengths, 0.4, sliding_window, softcap, tree)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sliding_window", [None, 2, 4])
def test_a_tree_in_pieces(sliding_window: int | None) -> None:
    """The last queries of a window, its other keys being there already."""
    lengths, window = [0, 1, 7], 9
    generator = torch.Generator().manual_seed(3)
    tree = [random_tree(window, generator) for _ in lengths]
    query, key, value = tensors(3, 1, 2, window, max(lengths) + window)
    want = naive(query, key, value, lengths, 0.4, sliding_window, None, tree)
    for first, end in ((0, 1), (0, 4), (3, 7), (8, 9), (2, 9)):
        here = {"scaling": 0.4, "sliding_window": sliding_window, "ancestors": words(tree)[:, :end]}
        out = ragged_attention(query[:, :, first:end], key, value, torch.tensor(lengths), **here)
        torch.testing.assert_close(out, want[:, first:end], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sliding_window", [None, 1, 3, 70])
@pytest.mark.parametrize("window", [1, 5, 64])
def test_a_chain_is_a_tree(window: int, sliding_window: int | None) -> None:
    lengths = torch.tensor([0, 2, 90])
    chain = words([[set(range(t + 1)) for t in range(window)]] * 3)
    arguments = (lengths, window, 90 + window, 2, torch.float32, sliding_window)
    assert torch.equal(window_bias(*arguments), window_bias(*arguments, chain))


def test_what_a_tree_sees_is_exact() -> None:
    """A root with two children, the second with a child: the sliding window counts along a path."""
    tree = [[{0}, {0, 1}, {0, 2}, {0, 2, 3}]]
    bias = window_bias(torch.tensor([2]), 4, 7, 1, torch.float32, sliding_window=3, ancestors=words(tree))
    o, x = 0.0, float("-inf")
    assert bias[0, 0].tolist() == [
        [o, o, o, x, x, x, x],
        [x, o, o, o, x, x, x],
        [x, o, o, x, o, x, x],
        [x, x, o, x, o, o, x],
    ]


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    query, key, value = tensors(2, 1, 2, 2, 5)
    out = ragged_attention(
        query, key, value, torch.tensor([0, 3]), scaling=0.4, ancestors=torch.tensor([[0, 2], [0, 2]])
    )
    assert (out[0, 0] == 0).all() and (out[:, 1] != 0).all() and (out[1, 0] != 0).all()
    torch.testing.assert_close(out, naive(query, key, value, [0, 3], 0.4, tree=[[set(), {1}]] * 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stale", [float("nan"), float("inf")])
def test_stale_keys_may_hold_anything(stale: float) -> None:
    query, key, value = tensors(2, 2, 2, 3, 9)
    lengths = [1, 6]
    want = naive(query, key, value, lengths, 0.4)
    key[0, :, 4:], value[0, :, 4:] = stale, stale
    out = ragged_attention_reference(query, key, value, torch.tensor(lengths), scaling=0.4)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


def test_write_reference() -> None:
    """Against a loop over tokens; what does not fit the buffer is dropped."""
    keys, values = torch.zeros(4, 2, 6, 3), torch.zeros(4, 2, 6, 2)
    key_states, value_states = torch.rand(4, 2, 3, 3) + 1, torch.rand(4, 2, 3, 2) + 1
    lengths = [0, 3, 4, 9]
    want = keys.clone(), values.clone()
    for b, t in itertools.product(range(4), range(3)):
        if lengths[b] + t < 6:
            want[0][b, :, lengths[b] + t], want[1][b, :, lengths[b] + t] = key_states[b, :, t], value_states[b, :, t]
    write_window_reference(key_states, value_states, keys, values, torch.tensor(lengths))
    assert torch.equal(keys, want[0]) and torch.equal(values, want[1])


def test_compact_reference() -> None:
    """Against a loop over positions; what stands behind a path, and before it, is left alone."""
    keys, values = torch.rand(3, 2, 12, 3), torch.rand(3, 2, 12, 2)
    lengths, slots = [0, 3, 5], [[0, 2, 5], [0, 1, 2], [1, 2, 6]]
    want = keys.clone(), values.clone()
    for b, j in itertools.product(range(3), range(3)):
        for new, old in zip(want, (keys, values), strict=True):
            new[b, :, lengths[b] + j] = old[b, :, lengths[b] + slots[b][j]]
    compact_window(keys, values, torch.tensor(lengths), torch.tensor(slots))
    assert torch.equal(keys, want[0]) and torch.equal(values, want[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(2, 8)}, "keys="),
        ({"values": torch.zeros(2, 2, 9, 5)}, "only D and D_v"),
        ({"lengths": torch.zeros(1, dtype=torch.int64)}, "lengths="),
        ({"slots": torch.zeros(2, 3, dtype=torch.int32)}, r"slots=\(2, 3\) of torch.int32"),
        ({"slots": torch.zeros(3, 3, dtype=torch.int64)}, r"slots=\(3, 3\)"),
    ],
)
def test_compact_refuses(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "keys": torch.zeros(2, 2, 10, 8),
        "values": torch.zeros(2, 2, 10, 5),
        "lengths": torch.zeros(2, dtype=torch.int64),
        "slots": torch.zeros(2, 3, dtype=torch.int64),
    }
    compact_window(**arguments)
    with pytest.raises(ValueError, match=message):
        compact_window(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4, 8)}, "four dimensions"),
        ({"query": torch.zeros(2, 5, 3, 8)}, "multiple"),
        ({"query": torch.zeros(2, 4, 3, 6)}, r"\[B, H_kv, S, D\]"),
        ({"keys": torch.zeros(2, 2, 9, 8)}, r"\[B, H_kv, S, D\]"),
        ({"values": torch.zeros(3, 2, 10, 5)}, r"\[B, H_kv, S, D\]"),
        ({"values": torch.zeros(2, 2, 10, 5, dtype=torch.float64)}, "one dtype"),
        ({"keys": torch.zeros(2, 2, 10, 8, device="meta")}, "move them"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, r"lengths=\(2,\) of torch.int32"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths=\(3,\)"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"ancestors": torch.zeros(2, 2, dtype=torch.int64)}, r"ancestors=\(2, 2\)"),
        ({"ancestors": torch.zeros(2, 3, dtype=torch.int32)}, r"ancestors=\(2, 3\) of torch.int32"),
        ({"query": torch.zeros(2, 4, 65, 8), "ancestors": torch.zeros(2, 65, dtype=torch.int64)}, "at most 64"),
    ],
)
def test_attention_refuses(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "query": torch.zeros(2, 4, 3, 8),
        "keys": torch.zeros(2, 2, 10, 8),
        "values": torch.zeros(2, 2, 10, 5),
        "lengths": torch.zeros(2, dtype=torch.int64),
        "scaling": 1.0,
    }
    assert ragged_attention(**arguments).shape == (2, 3, 4, 5)
    with pytest.raises(ValueError, match=message):
        ragged_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_states": torch.zeros(2, 2, 3, 6)}, "keys="),
        ({"value_states": torch.zeros(2, 2, 4, 5)}, "values="),
        ({"keys": torch.zeros(2, 8)}, "keys="),
        ({"values": torch.zeros(2, 2, 9, 5)}, "only D and D_v"),
        ({"values": torch.zeros(2, 2, 10, 5, dtype=torch.float16)}, "convert"),
        ({"lengths": torch.zeros(1, dtype=torch.int64)}, "lengths="),
    ],
)
def test_write_refuses(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "key_states": torch.zeros(2, 2, 3, 8),
        "value_states": torch.zeros(2, 2, 3, 5),
        "keys": torch.zeros(2, 2, 10, 8),
        "values": torch.zeros(2, 2, 10, 5),
        "lengths": torch.zeros(2, dtype=torch.int64),
    }
    write_window(**arguments)
    with pytest.raises(ValueError, match=message):
        write_window(**(arguments | change))
