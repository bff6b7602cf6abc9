"""Two roles of one set of weights in one forward: the untuned model's window, and behind it the tuned one's.

Knows nothing of sampling or of what the roles are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specproxy.attention import WINDOW_KEYWORD
from specproxy.graphs import bucket
from specproxy.packed import PackedCache, PackedWindow
from specproxy.runner import Runner

__all__ = ["PackedRunner"]


class PackedRunner:
    """Runs an untuned and a tuned role over windows of their own, with one pass over the weights that they share.

    Attention runs for each by itself; the rest costs what a forward over all tokens costs. Its time counts as the
    untuned role's.

    Args:
        untuned, tuned: runners of the two roles, of one model and one adapter.
    """

    def __init__(self, untuned: Runner, tuned: Runner) -> None:
        assert untuned.model is tuned.model and tuned.adapter is not None
        self._runners = (untuned, tuned)
        self._model, self._adapter = tuned.model, tuned.adapter

    def forward(self, untuned: Tensor, tuned: Tensor, *, tuned_offset: int = 0) -> tuple[Tensor, Tensor]:
        """Logits of both roles' windows.

        Args:
            untuned: int64 [n, T], tokens of rows 0 .. n - 1 behind their lengths.
            tuned: int64 [n, T'], likewise.
            tuned_offset: positions past the tuned role's lengths at which its window starts.

        Returns:
            [n, T, V] and [n, T', V] in the model's dtype; the lengths are not changed.
        """
        graphs, count = self._runners[0].graphs, untuned.shape[0]
        if graphs is None:
            return self._forward(untuned, tuned, tuned_offset)
        cache = self._runners[0].cache
        for runner, end in zip(self._runners, (untuned.shape[1], tuned_offset + tuned.shape[1]), strict=True):
            runner.cache.reserve(max(runner.cache.host_lengths[:count]) + end)
        width, device = bucket(count, cache.max_rows), self._runners[0].device
        # Rows behind the given ones are idle.
        padded = [torch.nn.functional.pad(part.to(device), (0, 0, 0, width - count)) for part in (untuned, tuned)]
        offset = torch.full((), tuned_offset, dtype=torch.long, device=device)
        roles = tuple(runner.role for runner in self._runners)
        key = ("packed", *roles, width, untuned.shape[1], tuned.shape[1])
        title = f"{' and '.join(roles)} ({width} x {untuned.shape[1]} + {tuned.shape[1]} tokens)"
        generation = tuple(runner.cache.capacity for runner in self._runners)
        logits = graphs.run(key, generation, self._forward, (*padded, offset), title=title)
        return logits[0][:count].clone(), logits[1][:count].clone()

    def _forward(self, untuned: Tensor, tuned: Tensor, tuned_offset: int | Tensor) -> tuple[Tensor, Tensor]:
        timer, device = self._runners[0].timer, self._runners[0].device
        start = timer.begin()
        tokens, caches = (untuned.to(device), tuned.to(device)), [runner.cache for runner in self._runners]
        offsets = (0, tuned_offset)
        window = PackedWindow(
            [
                cache.begin(0, part.shape[0], part.shape[1], offset)
                for cache, part, offset in zip(caches, tokens, offsets, strict=True)
            ]
        )
        positions, limit = window.positions, self._runners[0].max_positions
        if limit is not None:
            # As in `Runner`: drafts behind a row's budget may stand past the model's last position.
            positions = positions.clamp(max=limit - 1)
        try:
            with self._adapter.applied(slice(untuned.numel(), None)):
                output = self._model(
                    input_ids=window.join(tokens),
                    position_ids=positions,
                    past_key_values=PackedCache(caches, window),
                    use_cache=True,
                    **{WINDOW_KEYWORD: window},
                )
        finally:
            for cache in caches:
                cache.window = None
        first, second = output.logits[0].split([untuned.numel(), tuned.numel()])
        timer.end(start, tuple(untuned.shape))
        return first.unflatten(0, untuned.shape), second.unflatten(0, tuned.shape)
