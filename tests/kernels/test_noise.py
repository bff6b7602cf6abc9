"""Counter noise: the integers against published answers and independent implementations, the floats against their
laws."""

import itertools
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from specproxy_kernels import noise
from specproxy_kernels.noise import (
    PURPOSE_COIN,
    PURPOSE_RESIDUAL,
    PURPOSE_TOKEN,
    coin_noise,
    gumbel_noise,
    philox,
    row_keys,
    window_noise,
)
from specproxy_kernels.reference import NoiseStream

LEVEL = 1e-8  # of each statistical test; seeds are fixed


def words(counter: list[int], key: int) -> list[int]:
    signed = key - 2**64 if key >= 2**63 else key
    return [int(word) for word in philox([torch.tensor([c]) for c in counter], torch.tensor([signed]))]


def plain_philox(counter: list[int], key: int) -> list[int]:
    """Philox-4x32-10 in Python integers, from the paper's description."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter: list[int], key: int, answer: list[int]) -> None:
    """The vectors that Random123 publishes for philox4x32-10."""
    assert words(counter, key) == answer
    assert plain_philox(counter, key) == answer


def test_philox_equals_python_integers() -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, size=(300, 4))
    counters[:40] = rng.choice([0, 1, 2**31, 2**32 - 1], size=(40, 4))
    keys = rng.integers(0, 2**64, size=300, dtype=np.uint64)
    keys[:4] = [0, 2**63, 2**63 - 1, 2**64 - 1]
    got = philox(list(torch.tensor(counters).T), torch.tensor(keys.view(np.int64)))
    want = [plain_philox([int(c) for c in counter], int(key)) for counter, key in zip(counters, keys, strict=True)]
    assert torch.stack(got, 1).tolist() == want


@pytest.mark.parametrize("key_shape", [(), (3,), (1, 3), (2, 1), (2, 3), (4, 2, 3)], ids=str)
def test_philox_broadcasts_its_key(key_shape: tuple[int, ...]) -> None:
    """The key may have dimensions of size one, and dimensions of its own."""
    counters = [torch.arange(6).view(2, 3) + 100 * i for i in range(4)]
    counters[1] = torch.tensor(7)  # without dimensions
    key = torch.arange(math.prod(key_shape)).view(key_shape) + 2**40
    got = philox(counters, key)
    shape = torch.broadcast_shapes((2, 3), key_shape)
    assert all(word.shape == shape for word in got)
    wide = [counter.expand(shape).flatten() for counter in counters]
    for i, full_key in enumerate(key.expand(shape).flatten().tolist()):
        assert [int(word.flatten()[i]) for word in got] == plain_philox([int(c[i]) for c in wide], full_key)


TRITON_PROGRAM = """
import torch, triton, triton.language as tl

@triton.jit
def words(key_ptr, c_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    c0, c1, c2, c3 = (
        tl.load(c_ptr + i), tl.load(c_ptr + N + i), tl.load(c_ptr + 2 * N + i), tl.load(c_ptr + 3 * N + i)
    )
    r0, r1, r2, r3 = tl.philox(tl.load(key_ptr), c0, c1, c2, c3)
    tl.store(out_ptr + i, r0)
    tl.store(out_ptr + N + i, r1)
    tl.store(out_ptr + 2 * N + i, r2)
    tl.store(out_ptr + 3 * N + i, r3)

from specproxy_kernels.noise import philox
generator = torch.Generator().manual_seed(1)
for key in (0, 1, 2**63 - 1, -1, -(2**63), 0x299F31D0A4093822):
    counters = torch.randint(0, 2**32, (4, 64), generator=generator)
    counters[:, 0], counters[:, 1] = 0, 2**32 - 1
    out = torch.empty(4, 64, dtype=torch.int32)
    words[(1,)](torch.tensor([key]), counters.to(torch.uint32).view(torch.int32), out, 64)
    want = torch.stack(philox(list(counters), torch.tensor([key])))
    assert torch.equal(out.long() & 0xFFFFFFFF, want), key
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_philox_equals_triton(tmp_path: Path) -> None:
    """`tl.philox` under the interpreter, in a process of its own: the variable is read when triton is imported."""
    program = tmp_path / "words.py"  # triton reads the source of its kernels from a file
    program.write_text(TRITON_PROGRAM)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_row_keys_of_neighbours_are_distinct() -> None:
    seeds = [*range(-50, 50), 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 2**64 - 51]
    pairs = list(itertools.product(seeds[:-1], range(40)))
    keys = row_keys([seed for seed, _ in pairs], [row for _, row in pairs])
    assert keys.dtype == torch.int64 and keys.device.type == "cpu"
    assert len(set(keys.tolist())) == len({(seed % 2**64, row) for seed, row in pairs})


def test_row_keys_reduce_seeds_modulo_two_to_the_64() -> None:
    rows = [0, 3]
    for seed in (-1, 0, 12345, 2**63):
        for shift in (2**64, -(2**64), 2**70, -(3 * 2**64)):
            assert torch.equal(row_keys([seed] * 2, rows), row_keys([seed + shift] * 2, rows))


def test_row_keys_differ_from_noise_words() -> None:
    """Keys come from a purpose of their own: the noise of a row whose key is the seed shares no word with them."""
    purposes = {PURPOSE_TOKEN, PURPOSE_COIN, PURPOSE_RESIDUAL, noise._PURPOSE_ROW_KEY}
    assert len(purposes) == 4


def test_row_key_is_the_documented_word_pair() -> None:
    low, high, _, _ = plain_philox([7, 0, 3, 0], 99)
    assert int(row_keys([99], [7])) % 2**64 == low | high << 32


def uniform_of(bits: int) -> np.float32:
    return min(np.float32(bits >> 1) * np.float32(2.0**-31), np.float32(1 - 2.0**-24))


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 1024, 1025, 5000])
@pytest.mark.parametrize("block", [False, True])
def test_layout_of_the_vocabulary(vocab_size: int, block: bool) -> None:
    """id = 1024 * tile + 256 * lane + r reads word `lane` of counter 256 * tile + r, whatever the vocabulary's size."""
    key = row_keys([1, 2], [0, 0])
    index = torch.tensor([[0, 1, 70000], [5, 6, 2**31]])
    start = torch.tensor([4, 9]) if block else None
    got = gumbel_noise(key, index, PURPOSE_RESIDUAL, vocab_size, start)
    assert got.shape == (2, 3, vocab_size) and got.dtype == torch.float32
    rng = np.random.default_rng(2)
    ids = {
        0,
        vocab_size - 1,
        *rng.integers(0, vocab_size, size=12).tolist(),
        *(i for i in (255, 256) if i < vocab_size),
    }
    for row, column, v in itertools.product(range(2), range(3), ids):
        tile, rest = divmod(v, 1024)
        lane, r = divmod(rest, 256)
        nonce = int(start[row]) + 1 if start is not None else 0
        counter = [256 * tile + r, int(index[row, column]), PURPOSE_RESIDUAL, nonce]
        bits = plain_philox(counter, int(key[row]) % 2**64)[lane]
        uniform = max(float(uniform_of(bits)), 2.0**-32)
        np.testing.assert_allclose(float(got[row, column, v]), -np.log(-np.log1p(-uniform)), rtol=3e-6, atol=3e-7)


def test_noise_of_an_id_does_not_depend_on_the_vocabulary_size() -> None:
    key, index = row_keys([3], [0]), torch.arange(4)[None]
    widest = gumbel_noise(key, index, PURPOSE_TOKEN, 5000)
    for vocab_size in (1, 5, 255, 256, 257, 1023, 1024, 1025, 4096):
        assert torch.equal(gumbel_noise(key, index, PURPOSE_TOKEN, vocab_size), widest[..., :vocab_size])


def test_noise_does_not_depend_on_batch_or_window() -> None:
    key = row_keys([4] * 6, range(6))
    index = torch.arange(5) + torch.tensor([[0], [1], [2], [3], [4], [5]])
    start = index[:, 0]
    together = gumbel_noise(key, index, PURPOSE_TOKEN, 300, start)
    coins = coin_noise(key, index, start)
    for row, column in itertools.product(range(6), range(5)):
        one = (key[row : row + 1], index[row : row + 1, column : column + 1])
        alone = gumbel_noise(*one, PURPOSE_TOKEN, 300, start[row : row + 1])
        assert torch.equal(alone[0, 0], together[row, column])
        assert torch.equal(coin_noise(*one, start[row : row + 1])[0, 0], coins[row, column])


def test_stream_reads_the_documented_counters() -> None:
    key, start = row_keys([5] * 3, range(3)), torch.tensor([0, 4, 11])
    for block_start in (None, start):
        index = start[:, None] + torch.arange(4)
        stream = NoiseStream(key, start, block_start)
        assert torch.equal(stream.coins(4), coin_noise(key, index, block_start))
        accepted = torch.tensor([0, 3, 2])
        at_next = (start + accepted)[:, None]
        token = gumbel_noise(key, at_next, PURPOSE_TOKEN, 7, block_start)[:, 0]
        residual = gumbel_noise(key, at_next, PURPOSE_RESIDUAL, 7, block_start)[:, 0]
        # Before and after the drafts' noise was drawn, for less than the window and for all of it.
        for count in (0, 2, 4, 3):
            if count:
                assert torch.equal(
                    stream.tokens(count, 7), gumbel_noise(key, index[:, :count], PURPOSE_TOKEN, 7, block_start)
                )
            assert torch.equal(stream.coins(4), coin_noise(key, index, block_start))
            assert torch.equal(stream.coins(2), coin_noise(key, index[:, :2], block_start))
            assert torch.equal(stream.next_token(accepted, "rejection", 4, 7), residual)
            assert torch.equal(stream.next_token(accepted, "block", 4, 7), residual)
            assert torch.equal(stream.next_token(accepted, "coupled", 4, 7), token)


def test_window_noise_equals_what_is_drawn_apart() -> None:
    key, start = row_keys([5] * 3, range(3)), torch.tensor([0, 4, 11])
    index = start[:, None] + torch.arange(4)
    for vocab_size, block_start in itertools.product((1, 7, 256, 257, 1025), (None, start)):
        gumbel, coins = window_noise(key, index, vocab_size, block_start)
        assert torch.equal(gumbel, gumbel_noise(key, index, PURPOSE_TOKEN, vocab_size, block_start))
        assert torch.equal(coins, coin_noise(key, index, block_start))


def test_extreme_words_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Word 0 and the largest word: a uniform below 1, and Gumbel values without infinities."""
    for word, lowest, highest in ((0, 22.0, 22.3), (1, 22.0, 22.3), (2**32 - 1, -3.0, -2.7)):
        monkeypatch.setattr(
            noise, "philox", lambda counter, key, word=word: [counter[0] * 0 + counter[1] * 0 + word] * 4
        )
        coins = coin_noise(torch.tensor([0]), torch.tensor([[0]]))
        gumbel = gumbel_noise(torch.tensor([0]), torch.tensor([[0]]), PURPOSE_TOKEN, 3)
        assert 0 <= float(coins) < 1
        assert bool(((gumbel > lowest) & (gumbel < highest)).all())


@pytest.fixture(scope="module")
def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """Gumbel noise [20000, 2, 40] and coins [20000, 40] of distinct rows."""
    key = row_keys([6] * 20000, range(20000))
    gumbel = gumbel_noise(key, torch.arange(2).expand(20000, -1), PURPOSE_TOKEN, 40)
    coins = coin_noise(key, torch.arange(40).expand(20000, -1))
    return gumbel, coins


def test_coins_are_uniform(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    coins = sample[1].double().numpy().ravel()
    assert coins.min() >= 0 and coins.max() < 1
    counts = np.bincount((coins * 512).astype(int), minlength=512)
    assert stats.chisquare(counts).pvalue > LEVEL
    pairs = sample[1].double().numpy()
    cells = (pairs[:, :-1] * 16).astype(int) * 16 + (pairs[:, 1:] * 16).astype(int)
    assert stats.chisquare(np.bincount(cells[:, ::2].ravel(), minlength=256)).pvalue > LEVEL


def test_gumbel_is_gumbel(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    values = sample[0].double().numpy().ravel()
    assert np.isfinite(values).all()
    counts = np.bincount((stats.gumbel_r.cdf(values) * 512).astype(int).clip(max=511), minlength=512)
    assert stats.chisquare(counts).pvalue > LEVEL
    # Four moments within six standard errors.
    z = (values - np.euler_gamma) / (np.pi / np.sqrt(6))
    for power, moment in ((1, 0.0), (2, 1.0), (3, stats.gumbel_r.stats(moments="s")), (4, 5.4)):
        assert abs((z**power).mean() - moment) < 6 * (z**power).std() / np.sqrt(z.size)


def test_words_of_a_row_are_unrelated() -> None:
    """Rank correlation between any two of: purposes, positions, rows, block starts, ids and the coin at the same
    place."""
    count = 20000
    key = row_keys([7] * count, range(count))
    zero, one = torch.zeros(count, 1, dtype=torch.long), torch.ones(count, 1, dtype=torch.long)
    series = {
        "token": gumbel_noise(key, zero, PURPOSE_TOKEN, 1),
        "residual": gumbel_noise(key, zero, PURPOSE_RESIDUAL, 1),
        "coin": coin_noise(key, zero),
        "next position": gumbel_noise(key, one, PURPOSE_TOKEN, 1),
        "next row": gumbel_noise(key.roll(1), zero, PURPOSE_TOKEN, 1),
        "block 0": gumbel_noise(key, zero, PURPOSE_TOKEN, 1, zero[:, 0]),
        "block 1": gumbel_noise(key, zero, PURPOSE_TOKEN, 1, one[:, 0]),
        "coin of block 0": coin_noise(key, zero, zero[:, 0]),
        "id 1": gumbel_noise(key, zero, PURPOSE_TOKEN, 2)[..., 1:],
        "id 256": gumbel_noise(key, zero, PURPOSE_TOKEN, 257)[..., 256:],
        "next seed": gumbel_noise(row_keys([8] * count, range(count)), zero, PURPOSE_TOKEN, 1),
        "residual of the next position": gumbel_noise(key, one, PURPOSE_RESIDUAL, 1),
    }
    ranks = {name: stats.rankdata(values.numpy().ravel()) for name, values in series.items()}
    for (first, a), (second, b) in itertools.combinations(ranks.items(), 2):
        correlation = np.corrcoef(a, b)[0, 1]
        assert abs(correlation) * np.sqrt(count) < stats.norm.isf(LEVEL / 2), (first, second)
        counts = np.zeros((16, 16))
        np.add.at(counts, ((a - 1).astype(int) * 16 // count, (b - 1).astype(int) * 16 // count), 1)
        assert stats.chisquare(counts.ravel()).pvalue > LEVEL, (first, second)


def test_no_two_places_share_a_word() -> None:
    """Coins, token and residual noise of neighbouring places: all words of one row are distinct but for chance."""
    key = row_keys([9], [0])
    index = torch.arange(20)[None]
    everything = [coin_noise(key, index).ravel()]
    for purpose in (PURPOSE_TOKEN, PURPOSE_RESIDUAL):
        everything += [gumbel_noise(key, index, purpose, 40).ravel()]
    for start in range(4):
        block = torch.tensor([start])
        everything += [
            gumbel_noise(key, index, PURPOSE_TOKEN, 40, block).ravel(),
            coin_noise(key, index, block).ravel(),
        ]
    values = torch.cat(everything)
    # About n^2 / 2^24 pairs collide in float32 by chance.
    assert len(values) - len(values.unique()) < 12
