"""The folder form of the adapter: `base.generate(..., custom_generate=FOLDER, trust_remote_code=True, expert=...,
...)`.

Transformers hands every argument to this function unchanged, `streamer`, `tokenizer` and `stop_strings` included, so
it needs
no adapter: it calls `specproxy.ProxyTunedModel.generate`.
"""

from typing import Any

from specproxy import ProxyTunedModel


def generate(
    model: Any,
    inputs: Any = None,
    *,
    expert: Any,
    anti_expert: Any = None,
    alpha: float = 1.0,
    tokenizer: Any = None,
    assistant: Any = None,
    input_ids: Any = None,
    **arguments: Any,
) -> Any:
    """Generate from `model` steered by a pair.

    Args:
        model: the base, supplied by Transformers.
        inputs, input_ids: int64 [B, S], the prompts, under either name.
        expert, anti_expert: the pair, loaded Transformers causal language models; None for no anti-expert.
        alpha: proxy strength.
        tokenizer: of the base.
        assistant: a further model of the same vocabulary, for `drafter="assistant"`.
        arguments: of `specproxy.ProxyTunedModel.generate`.

    Returns:
        As `ProxyTunedModel.generate`.
    """
    proxy = ProxyTunedModel(model, expert, anti_expert, tokenizer, alpha, assistant=assistant)
    arguments.pop("synced_gpus", None)
    if arguments.get("generation_config") is None:
        arguments["generation_config"] = model.generation_config  # as Transformers' own methods do
    return proxy.generate(inputs if input_ids is None else input_ids, tokenizer=tokenizer, **arguments)
