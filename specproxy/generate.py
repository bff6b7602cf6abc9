"""Transformers' `generate` for a trio: arguments in, rows through the decode loop, sequences out.

Checks every argument before any model runs. Knows nothing of text: token ids only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from specproxy.config import SamplingParameters, SpeculationParameters, check_alpha, check_integer
from specproxy.decode import admit, step
from specproxy.errors import ConfigurationError, LogitsError, PromptError
from specproxy.policy import AdaptiveWindow, FixedWindow, WindowPolicy
from specproxy.state import BASE, ROLES, DecodeState, Row
from specproxy.stats import SpeculationStats
from specproxy.trio import Trio
from specproxy_kernels import row_keys

__all__ = ["GenerateOutput", "generate"]

_UNSUPPORTED = {
    "num_beams": "beam search is not supported; use num_return_sequences of sampling, or greedy decoding",
    "num_beam_groups": "beam search is not supported; use sampling or greedy decoding",
    "constraints": "constrained beam search is not supported; use sampling or greedy decoding",
    "force_words_ids": "constrained beam search is not supported; use sampling or greedy decoding",
    "penalty_alpha": "contrastive search is not supported; use sampling or greedy decoding",
    "guidance_scale": "classifier-free guidance is not supported: alpha steers by the expert instead",
    "watermarking_config": "watermarking is not supported",
    "assistant_model": "the expert drafts here; remove assistant_model",
    "past_key_values": "every call builds its own ragged caches; remove past_key_values",
}


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):
    """Transformers' decoder-only output with `speculation`, what speculation did during the call."""

    speculation: SpeculationStats | None = None


def generate(
    trio: Trio,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    sampling: SamplingParameters,
    speculation: SpeculationParameters,
    max_new_tokens: int,
    alpha: float | Sequence[float] | Tensor,
    seed: int | Sequence[int] | Tensor | None,
    generator: torch.Generator | None,
    role_prompts: dict[str, tuple[Tensor | None, Tensor | None]],
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    streamer: Any,
    unknown: dict[str, Any],
) -> GenerateOutput:
    """Generate for every prompt; see `ProxyTunedModel.generate`, which documents the arguments.

    Raises:
        ConfigurationError, PromptError: before any model runs.
        LogitsError: after every other row is complete.
    """
    _refuse_unknown(unknown)
    check_integer("max_new_tokens", max_new_tokens, 1, "ask for at least one token")
    eos = _eos_ids(trio, eos_token_id)
    pad = _pad_id(trio, pad_token_id, eos)
    prompts = {BASE: _prompt_rows(trio, BASE, "input_ids", input_ids, attention_mask, pad, eos)}
    batch = len(prompts[BASE])
    for role, (ids, mask) in role_prompts.items():
        prompts[role] = _role_prompt_rows(trio, role, ids, mask, input_ids, attention_mask, pad, eos, batch)
    _check_lengths(trio, prompts, max_new_tokens)
    if streamer is not None and batch != 1:
        raise ConfigurationError(f"streamer takes a single prompt, not a batch of {batch}; stream rows one by one.")
    keys = _row_keys(batch, seed, generator, sampling.do_sample)
    rows = [
        Row(
            index=i,
            prompts={role: prompts[role][i] for role in ROLES},
            sampling=sampling,
            alpha=strength,
            key=keys[i],
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos,
        )
        for i, strength in enumerate(_alphas(alpha, batch))
    ]
    if streamer is not None:
        streamer.put(input_ids.cpu())
    stats = _decode(trio, rows, speculation, streamer)
    if streamer is not None:
        streamer.end()
    output = GenerateOutput(sequences=_sequences(input_ids, rows, pad), speculation=stats)
    failed = [row for row in rows if row.finish_reason == "error"]
    if failed:
        raise LogitsError("; ".join(str(row.error) for row in failed), [row.index for row in failed], output)
    return output


def _decode(trio: Trio, rows: list[Row], speculation: SpeculationParameters, streamer: Any) -> SpeculationStats:
    """Run all rows to their ends."""
    began = perf_counter()
    stats = SpeculationStats()
    count = speculation.num_draft_tokens
    policy: WindowPolicy = FixedWindow(count) if isinstance(count, int) else AdaptiveWindow()
    longest = max(len(prompt) for row in rows for prompt in row.prompts.values())
    # Rows shorter than the budget never use all of it: a long budget grows its buffers as it goes.
    capacity = longest + min(rows[0].max_new_tokens, 1024) + (count if isinstance(count, int) else 8) + 1
    state = DecodeState(trio.device, trio.vocabulary.size, trio.vocabulary.allowed, speculation.acceptance)
    with torch.inference_mode(), trio.runners(len(rows), capacity) as runners:
        admit(state, runners, rows)
        streamed = 0
        while len(state):
            step(state, runners, policy, stats)
            if streamer is not None:
                for token in rows[0].tokens[streamed:]:
                    streamer.put(torch.tensor([token]))
                streamed = len(rows[0].tokens)
        seconds = {runner.role: runner.timer.total for runner in runners}
    stats.token_sources = [row.sources for row in rows]
    total = perf_counter() - began
    stats.seconds = {"total": total, **seconds, "other": total - sum(seconds.values())}
    return stats


def _sequences(input_ids: Tensor, rows: list[Row], pad: int) -> Tensor:
    """int64 [B, S + new]: prompts as given, new tokens, finished rows filled with pad."""
    longest = max(len(row.tokens) for row in rows)
    new = [row.tokens + [pad] * (longest - len(row.tokens)) for row in rows]
    return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def _refuse_unknown(unknown: dict[str, Any]) -> None:
    for name, value in unknown.items():
        remedy = _UNSUPPORTED.get(name, "it is not an argument of generate(); remove it")
        raise ConfigurationError(f"{name}={value!r}: {remedy}.")


def _eos_ids(trio: Trio, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        return trio.eos_token_ids()
    ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    return frozenset(check_integer("eos_token_id", i, 0, "give token ids") for i in ids)


def _pad_id(trio: Trio, pad_token_id: int | None, eos: frozenset[int]) -> int:
    if pad_token_id is not None:
        return check_integer("pad_token_id", pad_token_id, 0, "give a token id")
    pad = trio.pad_token_id()
    return pad if pad is not None else min(eos, default=0)


def _prompt_rows(
    trio: Trio, role: str, name: str, ids: Any, mask: Any, pad: int, eos: frozenset[int]
) -> list[list[int]]:
    """Unpadded prompts of one role, checked."""
    mask_name = name.replace("input_ids", "attention_mask")
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = f"a tensor of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise PromptError(f"{name} is {kind}; give an int64 tensor of shape [batch, length].")
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        raise PromptError(f"{name} has shape {list(ids.shape)}; give at least one non-empty prompt as [batch, length].")
    if mask is None:
        # As in Transformers: leading pad ids are padding, unless pad also ends sequences.
        padding = (ids == pad) if pad not in eos and trio.pad_token_id() is not None else torch.zeros_like(ids).bool()
        mask = ~padding.long().cumprod(-1).bool()
    elif not isinstance(mask, Tensor) or mask.shape != ids.shape:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PromptError(f"{mask_name} has shape {shape}, {name} has {list(ids.shape)}; give one flag per token.")
    rows: list[list[int]] = []
    for i, (row, flags) in enumerate(zip(ids.tolist(), mask.bool().tolist(), strict=True)):
        length = sum(flags)
        if length == 0:
            raise PromptError(f"{name}: row {i} is empty under {mask_name}; give every row at least one token.")
        if not all(flags[-length:]):
            raise PromptError(f"{mask_name}: row {i} is padded on the right or inside; pad prompts on the left.")
        prompt = row[-length:]
        size = trio.embedding_sizes[role]
        outside = [token for token in prompt if not 0 <= token < size]
        if outside:
            raise PromptError(
                f"{name}: row {i} holds id {outside[0]}, outside the {role}'s vocabulary of {size}; "
                "encode it with the tokenizer of that model."
            )
        rows.append(prompt)
    return rows


def _role_prompt_rows(
    trio: Trio,
    role: str,
    ids: Tensor | None,
    mask: Tensor | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pad: int,
    eos: frozenset[int],
    batch: int,
) -> list[list[int]]:
    """A role's own prompts, or the base's where it has none."""
    name = f"{role}_input_ids"
    if ids is None:
        if mask is not None:
            raise PromptError(f"{role}_attention_mask was given without {name}; give both or neither.")
        return _prompt_rows(trio, role, "input_ids", input_ids, attention_mask, pad, eos)
    rows = _prompt_rows(trio, role, name, ids, mask, pad, eos)
    if len(rows) != batch:
        raise PromptError(f"{name} has {len(rows)} rows, input_ids has {batch}; give one prompt per row.")
    return rows


def _check_lengths(trio: Trio, prompts: dict[str, list[list[int]]], max_new_tokens: int) -> None:
    for role in ROLES:
        limit = trio.position_limits[role]
        longest = max(map(len, prompts[role]))
        if limit is not None and longest + max_new_tokens > limit:
            raise PromptError(
                f"the {role}'s prompt of {longest} tokens + max_new_tokens={max_new_tokens} exceeds its {limit} "
                f"positions; shorten the prompt or ask for at most {max(limit - longest, 0)} tokens."
            )


def _alphas(alpha: float | Sequence[float] | Tensor, batch: int) -> list[float]:
    if isinstance(alpha, Tensor):
        alpha = alpha.tolist()
    if not isinstance(alpha, Sequence):
        return [check_alpha(alpha)] * batch
    if len(alpha) != batch:
        raise ConfigurationError(f"alpha has {len(alpha)} values for {batch} rows; give one number, or one per row.")
    return [check_alpha(value) for value in alpha]


def _row_keys(
    batch: int, seed: int | Sequence[int] | Tensor | None, generator: torch.Generator | None, do_sample: bool
) -> list[int]:
    """One noise key per row: from the seed, else from `generator`, else from torch's global generator."""
    if seed is not None and generator is not None:
        raise ConfigurationError("seed and generator were both given; give one of them.")
    if seed is None:
        if not do_sample:
            return [0] * batch  # greedy decoding leaves the generators alone
        device = "cpu" if generator is None else generator.device
        keys: list[int] = torch.randint(
            -(2**63), 2**63 - 1, (batch,), dtype=torch.int64, generator=generator, device=device
        ).tolist()
        return keys
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * batch
    indices = [0] * batch if isinstance(seed, Sequence) else list(range(batch))
    if len(seeds) != batch:
        raise ConfigurationError(f"seed has {len(seeds)} values for {batch} rows; give one integer, or one per row.")
    for value in seeds:
        check_integer("seed", value, -(2**63), "give an integer")
    keys = row_keys(seeds, indices).tolist()
    return keys
