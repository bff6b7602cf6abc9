"""What shapes a row's law beyond the vectorised warp: Transformers' processors, and token bans as bit masks.

Bans that depend on a token's index alone (suppressed tokens, minimum lengths, single-token bad words) become masks,
which cost nothing in Python. Where anything depends on the prefix, all of it runs as Transformers' own objects in their
order, once per row and position, with that row's own unpadded prefix. Knows nothing of models or windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from specproxy.config import SamplingParameters, check_integer, check_number
from specproxy.errors import ConfigurationError
from specproxy.grammar import Grammar, GrammarProcessor, GrammarWalk

__all__ = [
    "LawOptions",
    "Processor",
    "RowLaw",
    "TokenBan",
    "configured_processors",
    "configured_warpers",
    "row_law",
]

Processor = Callable[[Tensor, Tensor], Tensor]

# They keep state between calls, or read a batch in which rows are paired: neither survives drafting and rollback.
_STATEFUL = (
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor",
    "AlternatingCodebooksLogitsProcessor",
    "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
    "WhisperNoSpeechDetection",
)


@dataclass(frozen=True)
class TokenBan:
    """Tokens that may not be generated while the index among the generated tokens is below `until` (None: never)."""

    token_ids: frozenset[int]
    until: int | None = None


class CountPenaltyProcessor:
    """Presence and frequency penalties where a row's other options run in Python; the warp has them otherwise.

    Args:
        sampling: the penalties.
        prompt_length: of the base's unpadded prompt, whose tokens do not count.

    Source: OpenAI's API reference, "frequency and presence penalties".
    """

    def __init__(self, sampling: SamplingParameters, prompt_length: int) -> None:
        self._frequency = sampling.frequency_penalty or 0.0
        self._presence = sampling.presence_penalty or 0.0
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] less the penalties for the prefix int64 [1, L]."""
        counts = torch.bincount(input_ids[0, self._prompt_length :], minlength=scores.shape[-1])
        penalty = self._frequency * counts + self._presence * (counts > 0)
        return scores - penalty.to(scores.dtype)


@dataclass(frozen=True)
class RowLaw:
    """How one row's combined logits become a law: processors, then bans and bias, then the vectorised warp."""

    sampling: SamplingParameters
    processors: tuple[Processor, ...] = ()
    bans: tuple[TokenBan, ...] = ()
    removes_invalid: bool = False  # whether the processors take NaN and infinities
    bias: tuple[tuple[int, float], ...] = ()  # per token id, added to its logit
    grammar: GrammarWalk | None = None  # where no processor holds the row to it

    def process(self, prefix: Tensor, logits: Tensor) -> Tensor:
        """Processed logits [V] of one position, whose prefix is int64 [1, L]."""
        scores = logits[None].clone()
        for processor in self.processors:
            scores = processor(prefix, scores)
        return scores[0]


@dataclass(frozen=True)
class LawOptions:
    """Transformers' arguments that shape a law, under their names there; None leaves one out."""

    sampling: SamplingParameters
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    top_h: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    sequence_bias: Any = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    remove_invalid_values: bool | None = None
    renormalize_logits: bool | None = None
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None
    logits_processor: Sequence[Processor] = field(default=())
    grammar: Grammar | None = None  # no argument of Transformers

    def __post_init__(self) -> None:
        for name in ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                value = value.tolist()
                object.__setattr__(self, name, value)
            if value is not None and not (
                isinstance(value, Sequence) and all(isinstance(i, int) and i >= 0 for i in value)
            ):
                raise ConfigurationError(f"{name}={value!r} must be a list of token ids.")
        if any(isinstance(word, Sequence) and len(word) == 0 for word in self.bad_words_ids or ()):
            raise ConfigurationError(f"bad_words_ids={self.bad_words_ids!r} holds an empty word; give token ids.")
        if self.prefix_allowed_tokens_fn is not None and not callable(self.prefix_allowed_tokens_fn):
            raise ConfigurationError(
                f"prefix_allowed_tokens_fn={self.prefix_allowed_tokens_fn!r} must be a function of (row, prefix)."
            )
        if self.grammar is not None and not callable(getattr(self.grammar, "walk", None)):
            raise ConfigurationError(f"grammar={self.grammar!r} is no grammar; give one of specproxy.structured.")
        for processor in self.logits_processor:
            names = {cls.__name__ for cls in type(processor).__mro__}
            if names.intersection(_STATEFUL):
                raise ConfigurationError(
                    f"logits_processor holds a {type(processor).__name__}, which keeps state between calls; only pure "
                    "functions of (input_ids, scores) can run under speculation."
                )
            if not callable(processor):
                raise ConfigurationError(
                    f"logits_processor holds {processor!r}; give callables of (input_ids, scores)."
                )

    @property
    def needs_python(self) -> bool:
        """Whether some option depends on the prefix, or is a filter that the vectorised warp does not have."""
        return self.has_python_warpers or any(
            (
                self.token_bias is None,
                bool(self.no_repeat_ngram_size),
                any(isinstance(word, Sequence) and len(word) > 1 for word in self.bad_words_ids or ()),
                self.prefix_allowed_tokens_fn is not None,
                self.forced_bos_token_id is not None,
                self.forced_eos_token_id is not None,
                bool(self.remove_invalid_values),
                bool(self.renormalize_logits),
                self.exponential_decay_length_penalty is not None,
                bool(self.logits_processor),
            )
        )

    @property
    def token_bias(self) -> tuple[tuple[int, float], ...] | None:
        """`sequence_bias` as pairs of id and bias, where every sequence is one token; None where some is longer."""
        if self.sequence_bias is None:
            return ()
        is_mapping = isinstance(self.sequence_bias, Mapping)
        pairs = list(self.sequence_bias.items() if is_mapping else self.sequence_bias)
        if any(len(sequence) > 1 for sequence, _ in pairs):
            return None
        return tuple((int(sequence[0]), float(value)) for sequence, value in pairs)

    @property
    def has_python_warpers(self) -> bool:
        """Whether a filter is asked for that the vectorised warp does not have, or a step that comes after it."""
        return self.sampling.do_sample and any(
            (
                self.typical_p is not None and self.typical_p < 1,
                bool(self.epsilon_cutoff),
                bool(self.eta_cutoff),
                self.top_h is not None,
                bool(self.renormalize_logits),
            )
        )


def row_law(
    options: LawOptions,
    *,
    row_index: int,
    prompt_length: int,
    min_new_tokens: int,
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
    device: torch.device,
) -> RowLaw:
    """The law of one row, in Transformers' order.

    Args:
        options: of the call.
        row_index: what `prefix_allowed_tokens_fn` is called with.
        prompt_length: of the base's unpadded prompt.
        min_new_tokens: tokens before which no end token may come.
        max_new_tokens: of the row.
        eos_token_ids: its end tokens.
        device: of the logits.

    Raises:
        ConfigurationError: for an option's unusable value.
    """
    processors = configured_processors(
        options,
        row_index=row_index,
        prompt_length=prompt_length,
        min_new_tokens=min_new_tokens,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        device=device,
    )
    walk = None if options.grammar is None else options.grammar.walk()
    if not options.needs_python:  # they were built all the same, so that Transformers has checked their values
        return RowLaw(
            options.sampling,
            bias=options.token_bias or (),
            bans=_bans(options, min_new_tokens, eos_token_ids),
            grammar=walk,
        )
    processors = _merged(processors, options.logits_processor)
    sampling = replace(options.sampling, repetition_penalty=None, presence_penalty=None, frequency_penalty=None)
    if options.sampling.counts_output:
        processors.append(CountPenaltyProcessor(options.sampling, prompt_length))
    if walk is not None:
        processors.append(GrammarProcessor(walk, prompt_length))
    if options.has_python_warpers:
        processors += configured_warpers(options)
        sampling = replace(sampling, temperature=1.0, top_k=None, top_p=None, min_p=None)
    elif options.renormalize_logits:
        processors.append(LogitNormalization())
    return RowLaw(sampling, tuple(processors), removes_invalid=bool(options.remove_invalid_values))


def _merged(own: list[Processor], custom: Sequence[Processor]) -> list[Processor]:
    """As in Transformers: a caller's processor takes the place of one of exactly its type, the others come last."""
    first: dict[type, Processor] = {}
    for processor in custom:
        first.setdefault(type(processor), processor)
    merged = [first.get(type(processor), processor) for processor in own]
    return merged + [processor for processor in custom if not any(processor is other for other in merged)]


def _make(name: str, value: Any, make: Callable[..., Processor], *further: Any) -> Processor:
    """One of Transformers' processors; its complaints name the option."""
    try:
        return make(value, *further)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{name}={value!r} is not usable: {error}") from error


def configured_processors(
    options: LawOptions,
    *,
    row_index: int,
    prompt_length: int,
    min_new_tokens: int,
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
    device: torch.device,
) -> list[Processor]:
    """The processors that Transformers makes from a configuration, in its order; arguments as in `row_law`."""
    eos = torch.tensor(sorted(eos_token_ids), device=device) if eos_token_ids else None
    penalty = options.sampling.repetition_penalty
    processors: list[Processor] = []
    if options.sequence_bias is not None:
        processors.append(_make("sequence_bias", options.sequence_bias, SequenceBiasLogitsProcessor))
    if penalty is not None and penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
    if options.no_repeat_ngram_size:
        processors.append(_make("no_repeat_ngram_size", options.no_repeat_ngram_size, NoRepeatNGramLogitsProcessor))
    if options.bad_words_ids is not None:
        processors.append(_make("bad_words_ids", options.bad_words_ids, NoBadWordsLogitsProcessor, eos))
    if min_new_tokens > 0 and eos is not None:
        processors.append(MinNewTokensLengthLogitsProcessor(prompt_length, min_new_tokens, eos, device=str(device)))
    if options.prefix_allowed_tokens_fn is not None:
        allowed = options.prefix_allowed_tokens_fn
        processors.append(PrefixConstrainedLogitsProcessor(lambda _, prefix: allowed(row_index, prefix), 1))
    if options.forced_bos_token_id is not None:
        bos = check_integer("forced_bos_token_id", options.forced_bos_token_id, 0, "give a token id")
        processors.append(ForcedBOSTokenLogitsProcessor(bos))
    if options.forced_eos_token_id is not None:
        forced_eos = partial(ForcedEOSTokenLogitsProcessor, prompt_length + max_new_tokens, device=str(device))
        processors.append(_make("forced_eos_token_id", options.forced_eos_token_id, forced_eos))
    if options.remove_invalid_values:
        processors.append(InfNanRemoveLogitsProcessor())
    if options.exponential_decay_length_penalty is not None and eos is not None:
        decay = options.exponential_decay_length_penalty
        further = (eos, prompt_length)
        processors.append(_make("exponential_decay_length_penalty", decay, ExponentialDecayLengthPenalty, *further))
    if options.suppress_tokens is not None:
        processors.append(SuppressTokensLogitsProcessor(options.suppress_tokens, device=str(device)))
    if options.begin_suppress_tokens is not None:
        begin = prompt_length + (prompt_length == 1 and options.forced_bos_token_id is not None)
        processors.append(
            SuppressTokensAtBeginLogitsProcessor(options.begin_suppress_tokens, begin, device=str(device))
        )
    return processors


def _bans(options: LawOptions, min_new_tokens: int, eos_token_ids: frozenset[int]) -> tuple[TokenBan, ...]:
    """Bans that depend on the index among the generated tokens alone."""
    bans: list[TokenBan] = []
    words = [word[0] for word in options.bad_words_ids or []]
    bans.append(TokenBan(frozenset(words) - eos_token_ids))  # Transformers never takes an end token for a bad word
    bans.append(TokenBan(eos_token_ids, until=min_new_tokens))
    bans.append(TokenBan(frozenset(int(i) for i in options.suppress_tokens or ())))
    bans.append(TokenBan(frozenset(int(i) for i in options.begin_suppress_tokens or ()), until=1))
    return tuple(ban for ban in bans if ban.token_ids and ban.until != 0)


def configured_warpers(options: LawOptions) -> list[Processor]:
    """The filters that Transformers makes from a configuration when sampling, in its order."""
    sampling = options.sampling
    warpers: list[Processor] = []
    if not sampling.do_sample:
        return warpers
    if sampling.temperature is not None and sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if options.top_h is not None:
        warpers.append(_make("top_h", options.top_h, TopHLogitsWarper))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if options.typical_p is not None and options.typical_p < 1:
        warpers.append(_make("typical_p", options.typical_p, TypicalLogitsWarper))
    if options.epsilon_cutoff:
        warpers.append(_make("epsilon_cutoff", options.epsilon_cutoff, EpsilonLogitsWarper))
    if options.eta_cutoff:
        warpers.append(_make("eta_cutoff", options.eta_cutoff, EtaLogitsWarper))
    if options.renormalize_logits:
        warpers.append(LogitNormalization())
    return warpers
