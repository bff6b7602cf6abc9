"""Window attention against a softmax written out per row, head and query."""

import itertools

import numpy as np
import pytest
import torch

from specproxy_kernels import window_attention, window_bias


def naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """out [B, T, H, D_v]: query t of row b sees keys s <= lengths[b] + t, and s > lengths[b] + t - sliding_window."""
    batch, heads, window, _ = query.shape
    groups = heads // key.shape[1]
    out = np.zeros((batch, window, heads, value.shape[-1]))
    for b, h, t in itertools.product(range(batch), range(heads), range(window)):
        last = lengths[b] + t
        first = 0 if sliding_window is None else max(0, last - sliding_window + 1)
        keys = key[b, h // groups, first : last + 1].double().numpy()
        scores = scaling * keys @ query[b, h, t].double().numpy()
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weight = np.exp(scores - scores.max())
        out[b, t, h] = weight @ value[b, h // groups, first : last + 1].double().numpy() / weight.sum()
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
