"""Proxy-tuning inside vLLM: one composite model that holds base, expert and anti-expert.

`specproxy vllm-config` writes the composite's folder (`composite`); vLLM finds the class through the entry point
`vllm.general_plugins`, which calls `register` in each of its processes. Only `roles` and `model` import vLLM.
"""

from __future__ import annotations

from specproxy.integrations.vllm.composite import ARCHITECTURE

__all__ = ["register"]


def register() -> None:
    """Make the composite's architecture known to vLLM, and its folder checked before vLLM loads anything."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from specproxy.integrations.vllm.roles import CompositeCheck

    ModelRegistry.register_model(ARCHITECTURE, "specproxy.integrations.vllm.model:ProxyTunedForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = CompositeCheck
