"""Logit bias, frequency and presence penalties of the warp, against a loop over rows, positions and ids."""

import numpy as np
import pytest
import torch

from specproxy_kernels import WarpParameters, pack_allowed_tokens, warp_law

BATCH, WINDOW, VOCAB = 3, 4, 7


@pytest.mark.parametrize("shared_bias", [True, False])
def test_bias_and_penalties_of_every_prefix(shared_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logits, bias = normal(BATCH, WINDOW, VOCAB), normal(1 if shared_bias else BATCH, VOCAB)
    frequency, presence = normal(BATCH), normal(BATCH)
    repetition, temperature = normal(BATCH).exp(), normal(BATCH).exp()
    counts = torch.randint(0, 3, (BATCH, VOCAB), generator=generator, dtype=torch.int32)
    seen = torch.rand(BATCH, VOCAB, generator=generator) < 0.4
    allowed = torch.rand(BATCH, WINDOW, VOCAB, generator=generator) < 0.8
    drafts = torch.tensor([[2, 2, 5], [0, 1, 0], [6, 6, 6]])
    law = warp_law(
        logits,
        WarpParameters(
            temperature,
            repetition_penalty=repetition,
            seen=seen,
            frequency_penalty=frequency,
            presence_penalty=presence,
            counts=counts,
            logit_bias=bias,
            allowed=pack_allowed_tokens(allowed),
            any_greedy=False,
        ),
        drafts,
        torch.arange(WINDOW).expand(BATCH, -1),
    )
    for b in range(BATCH):
        for w in range(WINDOW):
            prefix = drafts[b, :w].tolist()
            expected = np.empty(VOCAB)
            for v in range(VOCAB):
                value = float(logits[b, w, v]) + float(bias[0 if shared_bias else b, v])
                if seen[b, v] or v in prefix:
                    value *= float(repetition[b]) if value < 0 else 1 / float(repetition[b])
                times = int(counts[b, v]) + prefix.count(v)
                value -= float(frequency[b]) * times + float(presence[b]) * (times > 0)
                expected[v] = value / float(temperature[b]) if allowed[b, w, v] else -np.inf
            np.testing.assert_allclose(law.z[b, w].numpy(), expected, rtol=1e-12)
            np.testing.assert_allclose(np.exp(law.log_prob()[b, w].numpy()).sum(), 1, rtol=1e-12)
