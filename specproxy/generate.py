"""Transformers' `generate` for a trio: arguments in, rows through the decode loop, sequences out.

Checks every argument before any model runs. Knows nothing of text: token ids only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import MaxTimeCriteria, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from specproxy.config import SpeculationParameters, check_integer
from specproxy.decode import admit, step
from specproxy.draft import ExpertDrafter
from specproxy.errors import ConfigurationError, LogitsError, PromptError
from specproxy.options import GenerationOptions
from specproxy.policy import FixedWindow, WindowPolicy, fixed_tree
from specproxy.rows import (
    check_assistant,
    check_corpus,
    check_ids,
    check_lengths,
    end_ids,
    make_row,
    pair_strengths,
)
from specproxy.schedule import CONSTANT, AlphaSchedule
from specproxy.state import ASSISTANT, BASE, DecodeState, Row
from specproxy.stats import SpeculationStats
from specproxy.suffix import LookupCorpus
from specproxy.trio import Trio
from specproxy_kernels import kernel_path, row_keys

__all__ = ["GenerateOutput", "generate"]


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):
    """Transformers' decoder-only output with `speculation`, what speculation did during the call."""

    speculation: SpeculationStats | None = None


def generate(
    trio: Trio,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    options: GenerationOptions,
    alpha: float | Sequence[float] | Tensor | None = None,
    alpha_schedule: AlphaSchedule | Sequence[AlphaSchedule | None] | None = None,
    seed: int | Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
    role_prompts: dict[str, tuple[Tensor | None, Tensor | None]] | None = None,
    streamer: Any = None,
    corpus: LookupCorpus | None = None,
) -> GenerateOutput:
    """Generate for every prompt; see `ProxyTunedModel.generate`, which documents the arguments.

    Raises:
        ConfigurationError, PromptError: before any model runs.
        LogitsError: after every other row is complete.
    """
    eos = end_ids(trio, options.eos_token_id)
    pad = _pad_id(trio, options.pad_token_id, eos)
    prompts = {BASE: _prompt_rows(trio, BASE, "input_ids", input_ids, attention_mask, pad, eos)}
    for role, (ids, mask) in (role_prompts or {}).items():
        if role not in trio.models and (ids is not None or mask is not None):
            raise PromptError(f"{role}_input_ids was given, but the model has no {role}; leave it out.")
    for role in trio.models:
        if role != BASE:
            ids, mask = (role_prompts or {}).get(role, (None, None))
            prompts[role] = _role_prompt_rows(trio, role, ids, mask, input_ids, attention_mask, pad, eos)
    copies = options.num_return_sequences
    if copies > 1:
        prompts = {role: [prompt for prompt in rows for _ in range(copies)] for role, rows in prompts.items()}
        input_ids = input_ids.repeat_interleave(copies, dim=0)
    batch = len(prompts[BASE])
    least, most = options.budget(input_ids.shape[1])
    check_lengths(trio, prompts, most)
    if options.speculation.drafter == ASSISTANT:
        check_assistant(trio, prompts[BASE], most)
    check_corpus(corpus)
    if streamer is not None and not (hasattr(streamer, "put") or hasattr(streamer, "put_row")):
        raise ConfigurationError(f"streamer={streamer!r} has neither put() nor put_row(); give a streamer.")
    if streamer is not None and batch != 1 and not hasattr(streamer, "put_row"):
        raise ConfigurationError(
            f"streamer={type(streamer).__name__} takes one sequence of {batch}; use a RowStreamer."
        )
    if options.max_time is not None and not trio.ranks.is_alone:
        raise ConfigurationError(
            f"max_time={options.max_time!r}: processes that share a base have clocks of their own; use max_new_tokens."
        )
    stopping = _stopping_criteria(options)
    # Normalisation changes recorded scores, no law: without them it is spared.
    law = options.law if options.output_scores else replace(options.law, renormalize_logits=None)
    keys = trio.ranks.agree_on(_row_keys(batch, seed, generator, options.law.sampling.do_sample))
    schedules = _schedules(alpha_schedule, batch, copies)
    rows = [
        make_row(
            trio,
            i,
            {role: rows[i] for role, rows in prompts.items()},
            law,
            alphas=strengths,
            key=keys[i],
            min_new_tokens=least,
            max_new_tokens=most,
            eos_token_ids=eos,
            stopping_criteria=stopping,
            schedule=schedules[i],
            corpus=corpus,
        )
        for i, strengths in enumerate(_alphas(trio, alpha, batch, copies))
    ]
    records = options.output_scores or options.output_logits
    stats = _decode(trio, rows, options.speculation, records, _Feed(streamer, input_ids, rows))
    output = GenerateOutput(
        sequences=_sequences(input_ids, rows, pad),
        scores=_recorded([row.scores for row in rows]) if options.output_scores else None,
        logits=_recorded([row.logits for row in rows]) if options.output_logits else None,
        speculation=stats,
    )
    failed = [row for row in rows if row.finish_reason == "error"]
    if failed:
        raise LogitsError("; ".join(str(row.error) for row in failed), [row.index for row in failed], output)
    return output


class _Feed:
    """Hands new tokens to a streamer: token by token to one of Transformers', block by block to a `RowStreamer`."""

    def __init__(self, streamer: Any, input_ids: Tensor, rows: list[Row]) -> None:
        self.streamer, self.rows = streamer, rows
        self.by_row = hasattr(streamer, "put_row")
        self.sent = [0] * len(rows)
        self.ended = [False] * len(rows)
        if streamer is not None and not self.by_row:
            streamer.put(input_ids.cpu())

    def advance(self) -> None:
        """Send what has come since the last call."""
        if self.streamer is None:
            return
        for i, row in enumerate(self.rows):
            new = row.tokens[self.sent[i] :]
            self.sent[i] = len(row.tokens)
            if self.by_row:
                if new:
                    self.streamer.put_row(i, new)
            else:
                for token in new:
                    self.streamer.put(torch.tensor([token]))
            if row.finish_reason is not None and not self.ended[i]:
                self.ended[i] = True
                self.streamer.end_row(i) if self.by_row else self.streamer.end()


def _decode(
    trio: Trio, rows: list[Row], speculation: SpeculationParameters, records_logits: bool, feed: _Feed
) -> SpeculationStats:
    """Run all rows to their ends."""
    began = perf_counter()
    stats = SpeculationStats(kernels=kernel_path(trio.device))
    count, drafter = speculation.num_draft_tokens, speculation.drafter or ExpertDrafter.name
    longest = max(len(prompt) for row in rows for prompt in row.prompts.values())
    # A long budget is rarely used up: its buffers grow as it goes.
    window = max(8 if isinstance(count, str) else count, speculation.num_tree_tokens) + 1
    capacity = longest + min(rows[0].max_new_tokens, 1024) + window
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        runners = stack.enter_context(trio.runners(len(rows), capacity, speculation.cuda_graphs))
        policy: WindowPolicy
        if isinstance(count, str):
            policy = stack.enter_context(trio.policy(speculation.drafter, captured=runners.graphs is not None))
        else:
            policy = FixedWindow(count, drafter, fixed_tree(speculation, trio.vocabulary.size))
        state = DecodeState(
            runners.max_rows,
            trio.device,
            trio.vocabulary.size,
            trio.vocabulary.allowed,
            speculation.acceptance,
            tuple(trio.models),
            records_logits,
            runners.state_buffers,
        )
        admit(state, runners, rows)
        while len(state):
            step(state, runners, policy, stats)
            feed.advance()
        seconds: dict[str, float] = {}
        for runner in runners.all_runners:
            name = runner.role.rstrip("_0123456789")
            seconds[name] = seconds.get(name, 0.0) + runner.timer.total
    stats.token_sources = [row.sources for row in rows]
    total = perf_counter() - began
    stats.seconds = {"total": total, **seconds, "other": total - sum(seconds.values())}
    return stats


def _stopping_criteria(options: GenerationOptions) -> list[Any]:
    """Transformers' own criteria for times and stop strings, then the caller's."""
    criteria: list[Any] = []
    if options.max_time is not None:
        criteria.append(MaxTimeCriteria(options.max_time))
    if options.stop_strings is not None:
        criteria.append(StopStringCriteria(options.tokenizer, options.stop_strings))
    return [*criteria, *options.stopping_criteria]


def _recorded(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Per new token float32 [B, V]; NaN where a row had ended."""
    width = max((line.shape[0] for row in rows for line in row), default=0)
    if width == 0:
        return ()  # every row failed at its first token
    device = next(line.device for row in rows for line in row)
    ended = torch.full((width,), torch.nan, device=device)
    steps = max(map(len, rows))
    # Copies, since what inference mode made could not take part in a caller's gradients.
    return tuple(torch.stack([row[t].clone() if t < len(row) else ended for row in rows]) for t in range(steps))


def _sequences(input_ids: Tensor, rows: list[Row], pad: int) -> Tensor:
    """int64 [B, S + new]: prompts as given, new tokens, finished rows filled with pad."""
    longest = max(len(row.tokens) for row in rows)
    new = [row.tokens + [pad] * (longest - len(row.tokens)) for row in rows]
    return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


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
        check_ids(trio, role, f"{name}: row {i}", prompt)
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
) -> list[list[int]]:
    """A role's own prompts, or the base's where it has none."""
    name = f"{role}_input_ids"
    if ids is None:
        if mask is not None:
            raise PromptError(f"{role}_attention_mask was given without {name}; give both or neither.")
        return _prompt_rows(trio, role, "input_ids", input_ids, attention_mask, pad, eos)
    rows = _prompt_rows(trio, role, name, ids, mask, pad, eos)
    if len(rows) != len(input_ids):
        raise PromptError(f"{name} has {len(rows)} rows, input_ids has {len(input_ids)}; give one prompt per row.")
    return rows


def _alphas(
    trio: Trio, alpha: float | Sequence[float] | Tensor | None, batch: int, copies: int
) -> list[tuple[float, ...]]:
    """Strength of every pair, per row. A number or one per row is that of the first pair; [B, pairs] gives all."""
    values: Any = alpha.tolist() if isinstance(alpha, Tensor) else alpha
    if not isinstance(values, Sequence) or isinstance(values, str):
        return [pair_strengths(trio, values)] * batch
    if len(values) * copies == batch:
        values = [value for value in values for _ in range(copies)]  # one per prompt
    if len(values) != batch:
        raise ConfigurationError(f"alpha has {len(values)} values for {batch} rows; give one number, or one per row.")
    return [pair_strengths(trio, value) for value in values]


def _schedules(
    schedule: AlphaSchedule | Sequence[AlphaSchedule | None] | None, batch: int, copies: int
) -> list[AlphaSchedule]:
    """Each row's schedule: one for the call, or one per row or prompt, None where its strengths are constant."""
    given = [schedule] * batch if schedule is None or isinstance(schedule, AlphaSchedule) else schedule
    if not isinstance(given, Sequence) or not all(one is None or isinstance(one, AlphaSchedule) for one in given):
        raise ConfigurationError(f"alpha_schedule={schedule!r} is no schedule; give an AlphaSchedule, or one per row.")
    if len(given) * copies == batch:
        given = [one for one in given for _ in range(copies)]
    if len(given) != batch:
        raise ConfigurationError(f"alpha_schedule has {len(given)} values for {batch} rows; give one, or one per row.")
    return [CONSTANT if one is None else one for one in given]


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
