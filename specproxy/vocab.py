"""The vocabulary that three models share: which ids may be generated, and whether their tokenizers agree.

Knows nothing of models beyond the width of their logits. Padded widths differ inside one family, so widths alone say
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specproxy.errors import VocabularyError
from specproxy_kernels import pack_allowed_tokens

__all__ = ["SharedVocabulary", "check_drafts_vocabulary", "share_vocabulary"]


@dataclass(frozen=True)
class SharedVocabulary:
    """Ids below `size` take part; `allowed`, int32 [1, 1, ceil(size / 32)], marks the valid ones; None: all are."""

    size: int
    allowed: Tensor | None = None


def _id_to_token(tokenizer: Any) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def share_vocabulary(widths: Mapping[str, int], tokenizers: Mapping[str, Any]) -> SharedVocabulary:
    """The ids that every model can read and write.

    Args:
        widths: per role, the width of its logits.
        tokenizers: per role, its tokenizer; roles without one are taken to agree with the others.

    Returns:
        The shared ids: those that every tokenizer knows, below the smallest width; all below it where there is no
        tokenizer.

    Raises:
        VocabularyError: where two tokenizers give one id to different tokens, naming the first such id, or share none.
    """
    width = min(widths.values())
    known = {role: _id_to_token(tokenizer) for role, tokenizer in tokenizers.items() if tokenizer is not None}
    if not known:
        return SharedVocabulary(width)
    roles = list(known)
    first = known[roles[0]]
    shared = set(first)
    for role in roles[1:]:
        other = known[role]
        if other is first:
            continue
        shared &= other.keys()
        differing = min((i for i in shared if other[i] != first[i]), default=None)
        if differing is not None:
            raise VocabularyError(
                f"the tokenizers differ: id {differing} is {first[differing]!r} for the {roles[0]} and "
                f"{other[differing]!r} for the {role}. Proxy-tuning adds logits id by id: use models of one family."
            )
    shared = {i for i in shared if 0 <= i < width}
    if not shared:
        raise VocabularyError(
            f"the tokenizers of {', '.join(roles)} share no id below {width}; use models of one family."
        )
    size = max(shared) + 1
    if len(shared) == size:
        return SharedVocabulary(size)
    allowed = torch.zeros(size, dtype=torch.bool)
    allowed[list(shared)] = True
    return SharedVocabulary(size, pack_allowed_tokens(allowed)[None, None])


def check_drafts_vocabulary(
    vocabulary: SharedVocabulary, role: str, width: int, tokenizer: Any, tokenizers: Mapping[str, Any]
) -> None:
    """Hold a model that only drafts against the vocabulary, which does not depend on it.

    Args:
        vocabulary: shared by the models of the law.
        role: of the drafting model, for messages.
        width: of its logits.
        tokenizer: its own, or None.
        tokenizers: of the models of the law, per role; the first that there is counts.

    Raises:
        VocabularyError: it gives an id to another token, or lacks one.
    """
    reference = next((name for name, known in tokenizers.items() if known is not None), None)
    if reference is not None:
        share_vocabulary({reference: vocabulary.size, role: width}, {reference: tokenizers[reference], role: tokenizer})
    if width < vocabulary.size:
        raise VocabularyError(f"the {role} has {width} ids, the trio shares {vocabulary.size}; use one of its family.")
