"""vLLM's model configurations of the three roles, and the check of a composite before anything is loaded."""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from specproxy.errors import ConfigurationError, UnsupportedModelError
from specproxy.integrations.vllm.composite import Composite, inspect_roles, read_composite
from specproxy.state import BASE

__all__ = ["CompositeCheck", "composite_of", "role_model_configs"]


def composite_of(model_config: ModelConfig) -> Composite:
    """What the configuration of a composite says, with the overrides of this run."""
    return read_composite(model_config.hf_config.to_dict(), model_config.model)


def role_model_configs(model_config: ModelConfig) -> dict[str, ModelConfig]:
    """A configuration per role, read from the role's own folder.

    Args:
        model_config: the composite's. `--quantization` is the base's; what a checkpoint says of its own quantisation
            counts for every role.

    Raises:
        UnsupportedModelError: an architecture that vLLM lacks, or one that keeps more than attention's keys and values.
    """
    composite = composite_of(model_config)
    configs = {}
    for role, name in composite.names.items():
        try:
            config = ModelConfig(
                model=name,
                runner="generate",
                tokenizer=model_config.tokenizer,
                tokenizer_mode=model_config.tokenizer_mode,
                trust_remote_code=model_config.trust_remote_code,
                dtype=model_config.dtype,
                seed=model_config.seed,
                max_model_len=model_config.max_model_len,
                quantization=model_config.quantization if role == BASE else None,
                enforce_eager=model_config.enforce_eager,
                max_logprobs=model_config.max_logprobs,
                config_format=model_config.config_format,
            )
        except ValueError as error:
            raise UnsupportedModelError(f"{role}={name} cannot run in vLLM: {error}") from error
        for kind in ("is_encoder_decoder", "is_attention_free", "is_hybrid", "is_multimodal_model"):
            if getattr(config, kind):
                raise UnsupportedModelError(
                    f"{role}: {config.architecture} {kind.replace('_', ' ')}; use a text decoder of attention layers."
                )
        configs[role] = config
    return configs


class CompositeCheck(VerifyAndUpdateConfig):
    """What vLLM calls with the composite's configuration, in the process that the user started."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check that the three models are there, fit together, and are those that the folder was written for.

        Raises:
            SpecProxyError: where they are not.
        """
        composite = composite_of(model_config)
        report = inspect_roles(composite.names, model_config.tokenizer)
        if report.widths != composite.widths or report.vocabulary.size != composite.vocabulary.size:
            raise ConfigurationError(
                f"{model_config.model}: the models have changed since the folder was written (logits {report.widths}, "
                f"written for {composite.widths}); write it again with `specproxy vllm-config`."
            )
        role_model_configs(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Keep one cache group where a model drafts.

        vLLM 0.32 hands a draft model the block table of the first group, whichever its own is: where layers with and
        without a sliding window form several, drafts overwrite other layers' keys and values and the tokens are wrong.
        Without the hybrid manager there is one group; windowed layers then keep all positions and attend to their own.
        """
        if vllm_config.speculative_config is not None:
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
