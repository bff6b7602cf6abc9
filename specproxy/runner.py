"""One model with its cache: window tokens in, logits out. Knows nothing of the other models or of sampling."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specproxy.adapters import EVERY_TOKEN, LoraSwitch
from specproxy.attention import WINDOW_KEYWORD
from specproxy.cache import RaggedCache
from specproxy.errors import UnsupportedModelError
from specproxy.graphs import Graphs, bucket
from specproxy.nodes import Nodes
from specproxy.timing import ForwardTimer

__all__ = ["Runner", "check_supported", "logits_width", "position_limit"]

_ROLLBACK_LAYER_TYPES = {"full_attention", "sliding_attention"}
_MAX_PREFILL_TOKENS = 2048  # per forward and row: bounds the attention bias of long ragged prompts


def check_supported(model: PreTrainedModel, role: str) -> None:
    """Refuse architectures that cannot run ragged windows with rollback.

    Raises:
        UnsupportedModelError: naming the architecture and the reason.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "forward"):
        raise UnsupportedModelError(f"{role}={name} is not a Transformers model; load it with AutoModelForCausalLM.")
    text = config.get_text_config(decoder=True)
    kind = f"{role}: {name} ({config.model_type})"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder; use a decoder-only causal language model.")
    layer_types = set(getattr(text, "layer_types", None) or ())
    other = sorted(layer_types - _ROLLBACK_LAYER_TYPES)
    if getattr(model, "_is_stateful", False) or other:
        detail = f"layers of type {', '.join(other)}" if other else "recurrent state"
        raise UnsupportedModelError(
            f"{kind} has {detail}, which cannot be rolled back by length; use full or sliding-window attention."
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{kind} does not call Transformers' attention interface, so its attention cannot be ragged; "
            "use an architecture that does (Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX, OPT, Phi-3, OLMo 2, ...)."
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{kind} shares keys and values between layers, which is not supported.")
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {part.get("rope_type") for part in rope.values() if isinstance(part, dict)}
    if "dynamic" in kinds:
        raise UnsupportedModelError(
            f"{kind} uses dynamic rotary scaling, which changes with the longest row of a batch; use a fixed scaling."
        )


def logits_width(model: PreTrainedModel) -> int:
    """Width of the model's logits."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if weight is not None else int(model.config.get_text_config().vocab_size)


def position_limit(model: PreTrainedModel) -> int | None:
    """Positions the model was built for, or None where its configuration names no limit."""
    text = model.config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond this length the rotary factors change, and keys already cached would no longer fit.
        limit = rope.get("original_max_position_embeddings", limit)
    return int(limit) if limit else None


class Runner:
    """A model and its ragged cache.

    Args:
        model: a supported Transformers causal language model, in the window attention of `specproxy.attention.borrowed`
            whenever a method here is called.
        role: "base", "expert" or "anti_expert"; for messages.
        max_rows: rows of the cache.
        graphs: where given, forwards of windows are captured and replayed.
        adapter: of a model whose weights serve a role with the adapter and one without.
        is_tuned: which of the two this is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        role: str,
        max_rows: int,
        graphs: Graphs | None = None,
        adapter: LoraSwitch | None = None,
        is_tuned: bool = False,
    ) -> None:
        self.model = model
        self.role = role
        self.adapter = adapter
        self.is_tuned = is_tuned
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.cache = RaggedCache(max_rows, self.device)
        self.graphs = graphs
        self.timer = ForwardTimer(role, self.device)
        if graphs is not None:
            graphs.timers.append(self.timer)
        self.max_positions = position_limit(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._checked = False

    def forward(self, tokens: Tensor, *, offset: int | list[int] = 0, nodes: Nodes | None = None) -> Tensor:
        """Logits of a window of every active row.

        Args:
            tokens: int64 [n, T], for rows 0 .. n - 1.
            offset: positions past the rows' committed lengths at which the window starts, of all rows or of each.
            nodes: of a token tree, on this model's device: the tokens are its nodes from number `offset` on, and those
                before them have been run.

        Returns:
            [n, T, V] in the model's dtype. The lengths are not changed: `advance` the cache to keep positions.
        """
        if self.graphs is None or isinstance(offset, list):
            return self._forward(tokens, offset, nodes)
        return self._replay(tokens, offset, nodes)

    def _forward(self, tokens: Tensor, offset: int | list[int] | Tensor, nodes: Nodes | None = None) -> Tensor:
        start = self.timer.begin()
        logits = self._run(tokens, first=0, offset=offset, nodes=nodes)
        self.timer.end(start, tuple(tokens.shape))
        return logits

    def _replay(self, tokens: Tensor, offset: int, nodes: Nodes | None) -> Tensor:
        """`_forward` by the capture for a bucket of rows; those behind the given ones are idle."""
        assert self.graphs is not None
        count, size = tokens.shape
        self.cache.reserve(max(self.cache.host_lengths[:count]) + offset + size)
        width = bucket(count, self.cache.max_rows)
        padded = torch.nn.functional.pad(tokens.to(self.device), (0, 0, 0, width - count))
        key, title = ("forward", self.role, width, size), f"{self.role} ({width} x {size} tokens)"
        if nodes is None:
            inputs = (padded, torch.full((), offset, dtype=torch.long, device=self.device))
            return self.graphs.run(key, self.cache.capacity, self._forward, inputs, title=title)[:count].clone()

        def run(tokens: Tensor) -> Tensor:
            return self._forward(tokens, offset, nodes)

        key_of_tree = (*key, nodes.shape, offset)
        return self.graphs.run(key_of_tree, self.cache.capacity, run, (padded,), title=title)[:count].clone()

    def prefill(self, first: int, prompts: list[list[int]]) -> None:
        """Fill rows from `first` on with prompts (right-padded together); their lengths become those of the prompts.

        Time spent here counts in the timer's total.
        """
        self.cache.set_lengths(first, [0] * len(prompts))
        for chunk in range(0, max(map(len, prompts)), _MAX_PREFILL_TOKENS):
            self.extend(first, [prompt[chunk : chunk + _MAX_PREFILL_TOKENS] for prompt in prompts])

    def extend(self, first: int, pieces: list[list[int]], *, all_logits: bool = False) -> Tensor:
        """Append pieces of prompts (right-padded together) to rows from `first` on, whose lengths grow by as much.

        Args:
            first: the first row.
            pieces: token ids per row, not all empty.
            all_logits: whether the logits of every position are wanted.

        Returns:
            The model's logits [n, T, V]; of the last position alone, [n, 1, V], where it can leave out the others.
        """
        start = self.timer.begin()
        size = max(map(len, pieces))
        tokens = torch.tensor([piece + [0] * (size - len(piece)) for piece in pieces], dtype=torch.long)
        lengths = self.cache.host_lengths[first : first + len(pieces)]
        logits = self._run(tokens.to(self.device), first=first, offset=0, logits_to_keep=0 if all_logits else 1)
        self.cache.set_lengths(first, [length + len(piece) for length, piece in zip(lengths, pieces, strict=True)])
        self.timer.end(start)
        return logits

    def _run(
        self,
        tokens: Tensor,
        *,
        first: int,
        offset: int | list[int] | Tensor,
        nodes: Nodes | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        window = self.cache.begin(first, tokens.shape[0], tokens.shape[1], offset, nodes)
        positions = window.positions
        if self.max_positions is not None:
            # Drafts behind a row's budget may stand past its last position. No row keeps them, but a table is read.
            positions = positions.clamp(max=self.max_positions - 1)
        keywords: dict[str, Any] = {WINDOW_KEYWORD: window}
        if logits_to_keep and self._keeps_logits:
            keywords["logits_to_keep"] = logits_to_keep
        adapted: AbstractContextManager[None] = nullcontext()
        if self.adapter is not None:
            adapted = self.adapter.applied(EVERY_TOKEN if self.is_tuned else None)
        try:
            with adapted:
                output = self.model(
                    input_ids=tokens.to(self.device),
                    position_ids=positions,
                    past_key_values=self.cache,
                    use_cache=True,
                    **keywords,
                )
        finally:
            self.cache.window = None
        if not self._checked:
            self._check_attention(window.num_attended)
        logits: Tensor = output.logits
        return logits

    def _check_attention(self, num_attended: int) -> None:
        """After the first forward: the model must have cached and attended through us in every layer."""
        num_layers = len(self.cache.layers)
        if num_attended == 0 or num_attended != num_layers:
            raise UnsupportedModelError(
                f"{self.role}: {type(self.model).__name__} called the attention interface {num_attended} times for "
                f"{num_layers} cached layers, so its attention cannot be ragged; use a supported architecture."
            )
        self._checked = True
