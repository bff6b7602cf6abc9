"""From checked arguments to a row of the decode loop: what `generate()` and the engine share on the way in.

Knows nothing of batches, streams or requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from specproxy.config import check_alpha, check_integer
from specproxy.errors import ConfigurationError, PromptError
from specproxy.processors import LawOptions, row_law
from specproxy.row import BASE, Row, StoppingCriterion
from specproxy.runner import position_limit
from specproxy.schedule import CONSTANT, AlphaSchedule
from specproxy.suffix import LookupCorpus
from specproxy.trio import Trio

__all__ = [
    "assistant_of",
    "check_assistant",
    "check_corpus",
    "check_ids",
    "check_lengths",
    "end_ids",
    "make_row",
    "pair_strengths",
]


def check_ids(trio: Trio, role: str, where: str, prompt: Sequence[int]) -> None:
    """Hold a prompt's ids against the vocabulary of the model that reads them.

    Args:
        trio: whose models are meant.
        role: of the model.
        where: what the message calls the prompt.
        prompt: token ids.

    Raises:
        PromptError: naming the first id that the model does not have.
    """
    size = trio.embedding_sizes[role]
    outside = [token for token in prompt if not 0 <= token < size]
    if outside:
        raise PromptError(
            f"{where} holds id {outside[0]}, outside the {role}'s vocabulary of {size}; "
            "encode it with the tokenizer of that model."
        )


def check_lengths(trio: Trio, prompts: dict[str, list[list[int]]], max_new_tokens: int) -> None:
    """Hold prompts and budget against every role's positions.

    Args:
        trio: whose models are meant.
        prompts: per role, ids of every row.
        max_new_tokens: of every row.

    Raises:
        PromptError: naming the role, its longest prompt and the tokens that are left.
    """
    for role, limit in trio.position_limits.items():
        longest = max(map(len, prompts[role]))
        if limit is not None and longest + max_new_tokens > limit:
            raise PromptError(
                f"the {role}'s prompt of {longest} tokens + max_new_tokens={max_new_tokens} exceeds its {limit} "
                f"positions; shorten the prompt or ask for at most {max(limit - longest, 0)} tokens."
            )


def end_ids(trio: Trio, eos_token_id: int | Iterable[int] | Tensor | None) -> frozenset[int]:
    """The tokens that end a row: those given, else those of the models' generation configurations.

    Raises:
        ConfigurationError: for what is no token id.
    """
    if eos_token_id is None:
        return trio.eos_token_ids()
    if isinstance(eos_token_id, Tensor):
        eos_token_id = eos_token_id.tolist()
    ids = list(eos_token_id) if isinstance(eos_token_id, Iterable) else [eos_token_id]
    return frozenset(check_integer("eos_token_id", i, 0, "give token ids") for i in ids)


def pair_strengths(trio: Trio, alpha: Any) -> tuple[float, ...]:
    """One row's strength of every pair.

    Args:
        trio: whose pairs are meant.
        alpha: a number for the first pair, the others keep theirs; one number per pair; or None for the model's.

    Raises:
        ConfigurationError: for what is no finite number, or too many or few of them.
    """
    defaults = tuple(pair.alpha for pair in trio.pairs)
    if alpha is None:
        return defaults
    if not isinstance(alpha, Sequence) or isinstance(alpha, str):
        return (check_alpha(alpha), *defaults[1:])
    if len(alpha) != len(defaults):
        raise ConfigurationError(
            f"alpha has {len(alpha)} values in a row for {len(defaults)} pairs; give one per pair."
        )
    return tuple(map(check_alpha, alpha))


def assistant_of(trio: Trio) -> PreTrainedModel:
    """The assistant, where it is to draft.

    Raises:
        ConfigurationError: there is none.
    """
    if trio.assistant is None:
        raise ConfigurationError('drafter="assistant" needs an assistant; construct the model with assistant=...')
    return trio.assistant


def check_assistant(trio: Trio, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Hold the base's prompts and the budget against the assistant, which reads them too.

    Raises:
        ConfigurationError: there is no assistant.
        PromptError: it cannot read the prompts, or has too few positions.
    """
    assistant = assistant_of(trio)
    size = int(assistant.get_input_embeddings().weight.shape[0])
    outside = next((token for prompt in prompts for token in prompt if token >= size), None)
    if outside is not None:
        raise PromptError(f"the prompt holds id {outside}, outside the assistant's vocabulary of {size}.")
    limit, longest = position_limit(assistant), max(map(len, prompts))
    if limit is not None and longest + max_new_tokens > limit:
        raise PromptError(
            f"the prompt of {longest} tokens + max_new_tokens={max_new_tokens} exceeds the assistant's {limit} "
            "positions; use another drafter."
        )


def check_corpus(corpus: Any) -> None:
    """Hold what lookup is to copy from to its kind.

    Raises:
        ConfigurationError: it is neither a LookupCorpus nor None.
    """
    if corpus is not None and not isinstance(corpus, LookupCorpus):
        raise ConfigurationError(f"corpus is a {type(corpus).__name__}; give a LookupCorpus.")


def make_row(
    trio: Trio,
    index: int,
    prompts: dict[str, list[int]],
    law: LawOptions,
    *,
    alphas: tuple[float, ...],
    key: int,
    min_new_tokens: int,
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
    stopping_criteria: Sequence[StoppingCriterion] = (),
    schedule: AlphaSchedule = CONSTANT,
    corpus: LookupCorpus | None = None,
) -> Row:
    """One row, its law made from the options of its call; arguments as in `Row` and `row_law`.

    Raises:
        ConfigurationError: for an option's unusable value.
    """
    own = row_law(
        law,
        row_index=index,
        prompt_length=len(prompts[BASE]),
        min_new_tokens=min_new_tokens,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        device=trio.device,
    )
    outside = [token for token, _ in own.bias if token >= trio.vocabulary.size]
    if outside:
        raise ConfigurationError(
            f"sequence_bias holds id {outside[0]}, outside the shared vocabulary of {trio.vocabulary.size}; "
            "leave it out."
        )
    return Row(
        index=index,
        prompts=prompts,
        law=own,
        alphas=alphas,
        key=key,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        stopping_criteria=stopping_criteria,
        schedule=schedule,
        corpus=corpus,
    )
