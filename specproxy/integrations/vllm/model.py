"""The composite as a vLLM model: three of vLLM's own models side by side, their logits combined.

Each keeps its own configuration, weights, quantisation and attention layers. vLLM pages keys and values, batches,
shards and draws tokens; it sees one model whose hidden states are the three models' in a row.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig, replace
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import maybe_prefix
from vllm.platforms import current_platform
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

from specproxy.integrations.vllm.composite import ROLES
from specproxy.integrations.vllm.roles import composite_of, role_model_configs
from specproxy.state import ANTI_EXPERT, BASE, EXPERT
from specproxy_kernels import LogitPair, combine_logits

__all__ = ["ProxyTunedForCausalLM"]

_logger = init_logger(__name__)


class ProxyTunedForCausalLM(nn.Module):
    """Base, expert and anti-expert as one causal language model.

    Args:
        vllm_config: of the composite.
        prefix: of parameter and attention layer names.

    Source: Liu et al. 2024, "Tuning Language Models by Proxy", arXiv 2401.08565.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self._allowed: Tensor | None
        if vllm_config.speculative_config is not None and _loses_temperatures():
            _logger.warning_once(
                "This vLLM's CPU backend samples wrongly under speculation (vllm-project/vllm issue 55005): "
                "serve greedy requests only, or leave --speculative-config out."
            )
        self._load_config = vllm_config.load_config
        self._composite = composite_of(vllm_config.model_config)
        self._configs = role_model_configs(vllm_config.model_config)
        self.models: Any = nn.ModuleDict()  # of models whose methods PyTorch does not know
        for role in ROLES:
            config = self._configs[role]
            config.verify_with_parallel_config(vllm_config.parallel_config)
            with set_model_tag(role):  # a compilation cache of its own
                self.models[role] = initialize_model(
                    vllm_config=_role_config(vllm_config, config), prefix=maybe_prefix(prefix, role)
                )
        self._hidden_sizes = [self._configs[role].get_hidden_size() for role in ROLES]
        # Drawn ids are below the shared size, which every role has; drafts are below the expert's width.
        self._last_ids = {
            role: width - 1 for role, width in self._composite.widths.items() if width < self._composite.width
        }
        self.register_buffer("_allowed", self._composite.vocabulary.allowed, persistent=False)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The base's embeddings; vLLM asks every model for some. `forward` takes ids only."""
        embeddings: Tensor = self.models[BASE].embed_input_ids(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> Tensor:
        """Hidden states of the three models.

        Args:
            input_ids: [T] tokens of all requests.
            positions: int64 [T].
            intermediate_tensors, inputs_embeds: None.

        Returns:
            [T, sum of the hidden sizes], in the order of `ROLES`.
        """
        if intermediate_tensors is not None or inputs_embeds is not None:
            raise NotImplementedError("the composite takes token ids: no pipeline stages, no prompt embeddings.")
        hidden = []
        for role in ROLES:
            # A draft that a smaller model cannot read is never accepted; what the model says after it is not used.
            ids = input_ids.clamp(max=self._last_ids[role]) if role in self._last_ids else input_ids
            hidden.append(self.models[role](input_ids=ids, positions=positions))
        self._hidden_sizes = [part.shape[-1] for part in hidden]
        return torch.cat(hidden, dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Combined logits.

        Args:
            hidden_states: [T, sum of the hidden sizes], rows of what `forward` returned.

        Returns:
            float32 [T, V_expert], -inf at ids that are not shared; None where this rank gathers no logits.
        """
        parts = hidden_states.split(self._hidden_sizes, dim=-1)
        logits = {role: self.models[role].compute_logits(part) for role, part in zip(ROLES, parts, strict=True)}
        if any(value is None for value in logits.values()):
            return None
        base, expert, anti_expert = (logits[role][:, None] for role in (BASE, EXPERT, ANTI_EXPERT))  # [T, 1, V]
        alpha = torch.full(base.shape[:2], self._composite.alpha, dtype=torch.float64, device=base.device)
        size = self._composite.vocabulary.size
        combined, _ = combine_logits(base, [LogitPair(expert, anti_expert, alpha)], size, self._allowed)
        return nn.functional.pad(combined[:, 0], (0, self._composite.width - size), value=-torch.inf)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load every role from its own folder, by the loader that the user chose.

        Args:
            weights: of the composite's folder, which has none.
        """
        for role in ROLES:
            get_model_loader(self._load_config).load_weights(self.models[role], self._configs[role])


def _role_config(vllm_config: VllmConfig, model_config: ModelConfig) -> VllmConfig:
    """The engine's configuration with one role's model, quantisation and attention window."""
    text = model_config.hf_text_config
    kinds = set(getattr(text, "layer_types", None) or ())
    cache_config = copy.copy(vllm_config.cache_config)
    # vLLM gives this window to every layer that has none of its own, and set it by the base.
    cache_config.sliding_window = model_config.get_sliding_window() if kinds <= {"sliding_attention"} else None
    return replace(vllm_config, model_config=model_config, cache_config=cache_config, quant_config=None)


def _loses_temperatures() -> bool:
    """Whether rejection sampling on this platform gets other temperatures than were asked for."""
    if not current_platform.is_cpu():
        return False
    given, ends = torch.tensor([0.5, 0.25], device="cpu"), torch.tensor([2, 3], dtype=torch.int32, device="cpu")
    return expand_batch_to_tokens(given, ends, 3).tolist() != [0.5, 0.5, 0.25]
