"""Packs documents into rows of token ids with one loss weight per position.

A row starts with a document, as a prompt does at inference; documents follow one another, each closed by the end of
text, and the last is cut where the row ends. Knows texts and a tokenizer, not models.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from training.arithmetic import Problem, Step, unmark

Document = tuple[list[int], list[float]]
"""Token ids and their loss weights, the end of text included."""


@dataclass(frozen=True)
class Rows:
    """Packed rows.

    Args:
        ids: uint16 [rows, length + 1].
        weights: float16 [rows, length + 1]; the weight of predicting the id at the same place.
    """

    ids: np.ndarray
    weights: np.ndarray


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Document]:
    """Encodes texts (marks allowed) into documents; a token's weight is the least of its characters'."""
    plain = [unmark(text) for text in texts]
    encoded = tokenizer([text for text, _ in plain], return_offsets_mapping=True)
    documents: list[Document] = []
    for ids, offsets, (_, weights) in zip(encoded["input_ids"], encoded["offset_mapping"], plain, strict=True):
        each = [min(weights[start:end], default=1.0) for start, end in offsets]
        documents.append(([*ids, tokenizer.eos_token_id], [*each, 1.0]))
    return documents


def encode_problem(tokenizer: PreTrainedTokenizerFast, problem: Problem | Step) -> Document:
    """Encodes a problem (or a step asked without a story) as tuned; only answer and end of text carry weight."""
    prompt = tokenizer(problem.prompt)["input_ids"]
    answer = [*tokenizer(problem.tuned_answer)["input_ids"], tokenizer.eos_token_id]
    return prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)


def pack(documents: Iterable[Document], length: int) -> Rows:
    """Packs documents, in order, into rows of `length` + 1 ids; one longer than a row goes on in rows of its own.

    Args:
        documents: What to pack.
        length: Training length in tokens.

    Returns:
        Full rows only; what does not fill the last one is left out.
    """
    size = length + 1
    rows: list[Document] = []
    ids: list[int] = []
    weights: list[float] = []
    for document_ids, document_weights in documents:
        ids += document_ids
        weights += document_weights
        if len(ids) < size:
            continue
        rows.append((ids[:size], weights[:size]))
        if len(document_ids) > size:  # only a long document goes on, one token shared so that each is predicted once
            start = size - 1
            while len(ids) - start >= size:
                rows.append((ids[start : start + size], weights[start : start + size]))
                start += size - 1
        ids, weights = [], []
    return Rows(np.array([r[0] for r in rows], dtype=np.uint16), np.array([r[1] for r in rows], dtype=np.float16))


def mix(sources: Sequence[tuple[Sequence[Document], int]], seed: int) -> list[Document]:
    """Mixes sources by token count.

    Args:
        sources: Pairs of documents and how many tokens to take (a source that is too short is repeated).
        seed: Seed of the shuffle.

    Returns:
        The documents taken, shuffled.
    """
    taken: list[Document] = []
    for documents, tokens in sources:
        count = 0
        index = 0
        while count < tokens:
            document = documents[index % len(documents)]
            taken.append(document)
            count += len(document[0])
            index += 1
    random.Random(seed).shuffle(taken)
    return taken
