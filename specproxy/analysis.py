"""Where a pair changes a base's text, and what happens when it stops. Knows models and numbers, nothing of pages.

Texts are written greedily by the proxy-tuned model; then base and target are read off at every token, from the same
prefix. The two questions are those of the discussion in Liu et al. 2024 (arXiv 2401.08565): are early positions changed
most, and does text repeat without end when the correction is dropped midway?
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specproxy.batches import ContinuationLogits, left_padded, score_continuations
from specproxy.errors import ConfigurationError
from specproxy.model import ProxyTunedModel
from specproxy.schedule import AlphaSchedule
from specproxy.scoring import Estimate, difference, mean
from specproxy.state import BASE
from specproxy.stats import DRAFT

__all__ = ["Analysis", "CutOff", "TextRecord", "TokenRecord", "analyse", "cut_off", "repetition", "token_kind"]

NGRAM = 4
EARLY = 4  # the first so many tokens are the early ones
NUM_ALTERNATIVES = 5
NUM_MOVED = 12

Alternatives = list[tuple[str, float]]


@dataclass(frozen=True)
class TokenRecord:
    """One token of a text, and how base and target saw it.

    Args:
        text: what it adds.
        source: "draft" or "target": who proposed it.
        kind: see `token_kind`.
        departs: whether the target's best token is another than the base's.
        kl: KL(target || base) in nats.
        log_ratio: log target less log base of the token itself, in nats.
        base, target: best tokens and their probabilities.
    """

    text: str
    source: str
    kind: str
    departs: bool
    kl: float
    log_ratio: float
    base: Alternatives
    target: Alternatives


@dataclass(frozen=True)
class TextRecord:
    """A prompt and the tokens written after it, without the end of text."""

    prompt: str
    tokens: list[TokenRecord]


@dataclass(frozen=True)
class CutOff:
    """Texts whose correction stopped after `cutoff` tokens; None never stops.

    Args:
        cutoff: as in `AlphaSchedule`.
        repetition: per text, see `repetition`.
        lengths: per text, new tokens.
        endless: per text, whether it reached the limit of tokens without an end.
    """

    cutoff: int | None
    repetition: list[float]
    lengths: list[int]
    endless: list[bool]

    def to_dict(self) -> dict[str, Any]:
        """Means, with intervals, ready for JSON."""
        return {
            "cutoff": self.cutoff,
            "repetition": mean(self.repetition).to_dict(),
            "length": mean(self.lengths).to_dict(),
            "endless": mean(self.endless).to_dict(),
        }


@dataclass(frozen=True)
class Analysis:
    """What was found.

    Args:
        texts: every text, token by token.
        promoted, demoted: tokens whose probability the pair raises or lowers most, summed over all positions.
        accepted_per_position, drafted_per_position: of the drafts, by their place in the window.
        cutoffs: the ablation; the last entry never stops.
        settings: of the run.
    """

    texts: list[TextRecord]
    promoted: Alternatives
    demoted: Alternatives
    accepted_per_position: list[int]
    drafted_per_position: list[int]
    cutoffs: list[CutOff]
    settings: dict[str, Any]

    def by_position(self) -> list[dict[str, Any]]:
        """Per position of a new token: texts that reach it, share of departures, mean KL, share from drafts."""
        longest = max(len(text.tokens) for text in self.texts)
        return [
            {"position": i, **_summary([text.tokens[i] for text in self.texts if i < len(text.tokens)])}
            for i in range(longest)
        ]

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """The same per kind of token, most frequent first."""
        kinds: dict[str, list[TokenRecord]] = {}
        for text in self.texts:
            for token in text.tokens:
                kinds.setdefault(token.kind, []).append(token)
        return {kind: _summary(tokens) for kind, tokens in sorted(kinds.items(), key=lambda item: -len(item[1]))}

    def early_against_later(self) -> dict[str, dict[str, Estimate]]:
        """Departures and KL of the first `EARLY` tokens, of those behind them, and the difference, per text."""
        found: dict[str, dict[str, Estimate]] = {}
        texts = [text.tokens for text in self.texts if len(text.tokens) > EARLY]
        for name in ("departs", "kl"):
            if not texts:
                break
            early = [float(np.mean([getattr(token, name) for token in tokens[:EARLY]])) for tokens in texts]
            later = [float(np.mean([getattr(token, name) for token in tokens[EARLY:]])) for tokens in texts]
            found[name] = {"early": mean(early), "later": mean(later), "difference": difference(early, later)}
        return found

    def cut_against_whole(self) -> dict[int, dict[str, Estimate]]:
        """Per cut-off: how much more the texts repeat and how many more never end than with the whole correction."""
        whole = self.cutoffs[-1] if self.cutoffs else None
        return {
            cut.cutoff: {
                "repetition": difference(cut.repetition, whole.repetition),
                "endless": difference(cut.endless, whole.endless),
            }
            for cut in self.cutoffs
            if whole is not None and cut.cutoff is not None
        }

    def findings(self) -> list[str]:
        """The paper's two findings, each with whether these models show it: beyond chance, at 95 %.

        The first counts as shown where both departures and KL are larger at the early tokens; the second where
        cut-offs within the text make it repeat more, and more texts never end, than the whole correction does.
        """
        lines = []
        early = self.early_against_later()
        if early:
            shown = all(part["difference"].low is not None and part["difference"].low > 0 for part in early.values())
            lines.append(
                f"Early positions are changed most: {'shown' if shown else 'not shown'}. Of the first {EARLY} tokens "
                f"{early['departs']['early'].format()} % depart from the base's choice, of the later ones "
                f"{early['departs']['later'].format()} %; KL {early['kl']['early'].format(1, 2)} against "
                f"{early['kl']['later'].format(1, 2)} nats."
            )
        cuts = {cutoff: parts for cutoff, parts in self.cut_against_whole().items() if cutoff > 0}
        if cuts:
            repeats, goes_on = (
                any((parts[name].low or 0.0) > 0 for parts in cuts.values()) for name in ("repetition", "endless")
            )
            verdict = "shown" if repeats and goes_on else "in part (it repeats more)" if repeats else "not shown"
            measured = "; ".join(
                f"after {cut.cutoff} tokens {mean(cut.repetition).format()} % of 4-grams repeat and "
                f"{mean(cut.endless).format(100, 0)} % of texts never end"
                for cut in self.cutoffs
                if cut.cutoff
            )
            whole = self.cutoffs[-1]
            lines.append(
                f"Dropping the correction midway makes text repeat without end: {verdict}. "
                f"Dropped {measured}; never dropped {mean(whole.repetition).format()} % and "
                f"{mean(whole.endless).format(100, 0)} %."
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "settings": self.settings,
            "findings": self.findings(),
            "by_position": self.by_position(),
            "by_kind": self.by_kind(),
            "promoted": self.promoted,
            "demoted": self.demoted,
            "accepted_per_position": self.accepted_per_position,
            "drafted_per_position": self.drafted_per_position,
            "cutoffs": [cut.to_dict() for cut in self.cutoffs],
            "texts": [asdict(text) for text in self.texts],
        }


def _summary(tokens: Sequence[TokenRecord]) -> dict[str, Any]:
    return {
        "count": len(tokens),
        "departures": float(np.mean([token.departs for token in tokens])),
        "kl": float(np.mean([token.kl for token in tokens])),
        "drafted": float(np.mean([token.source == DRAFT for token in tokens])),
    }


def token_kind(text: str) -> str:
    """What a token is by its text: "number", "word", "line", "space", "punctuation" or "other"."""
    bare = text.strip()
    if not bare:
        return "line" if "\n" in text else "space" if text else "other"
    if any(c.isdigit() for c in bare):
        return "number"
    if any(c.isalpha() for c in bare):
        return "word"
    return "punctuation" if all(c in string.punctuation for c in bare) else "other"


def repetition(ids: Sequence[int], size: int = NGRAM) -> float:
    """Share of a text's n-grams that stood in it before: 0 where none repeats, near 1 where one repeats without end.

    Args:
        ids: token ids; fewer than `size` give 0.
        size: n.
    """
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def analyse(
    model: ProxyTunedModel,
    prompts: Sequence[str],
    split_text: Callable[[Sequence[int]], list[str]],
    *,
    max_new_tokens: int = 96,
    batch_size: int = 8,
    alpha: float | None = None,
    num_draft_tokens: int | str = 4,
    cutoffs: Sequence[int] = (),
    cutoff_tokens: int = 192,
    **drafting: Any,
) -> Analysis:
    """Write a text after every prompt, and read base and target off at every token.

    Args:
        model: the models, with a tokenizer.
        prompts: texts to continue.
        split_text: from token ids to the text that each adds.
        max_new_tokens: most tokens of a text.
        batch_size: rows at a time.
        alpha: strength; the model's own by default.
        num_draft_tokens: drafts a cycle.
        cutoffs: numbers of tokens after which the ablation stops the correction; none for no ablation.
        cutoff_tokens: most tokens of its texts.
        drafting: further arguments of `ProxyTunedModel.generate`, such as drafter and num_tree_tokens.

    Raises:
        ConfigurationError: no prompts.
    """
    if not prompts:
        raise ConfigurationError("prompts is empty; give at least one.")
    ids = [model.tokenizer(prompt).input_ids for prompt in prompts]
    settings: dict[str, Any] = {"alpha": alpha, "num_draft_tokens": num_draft_tokens, **drafting}
    texts: list[TextRecord] = []
    moved = torch.zeros(model.vocab_size, dtype=torch.float64, device=model.device)
    accepted, drafted = np.zeros(0, int), np.zeros(0, int)
    for start in range(0, len(ids), batch_size):
        rows = ids[start : start + batch_size]
        new, output = _write(model, rows, max_new_tokens, **settings)
        accepted = _added(accepted, output.speculation.accepted_per_position)
        drafted = _added(drafted, output.speculation.drafted_per_position)
        kept = [row[:-1] if row[-1] in model._trio.eos_token_ids() else row for row in new]
        written = [i for i, row in enumerate(kept) if row]
        scored = score_continuations(model._trio, {BASE: [rows[i] for i in written]}, [kept[i] for i in written], alpha)
        by_row = dict(zip(written, scored, strict=True))
        for i, row in enumerate(kept):
            tokens: list[TokenRecord] = []
            if i in by_row:
                laws = _laws(by_row[i])
                moved += (laws[1].exp() - laws[0].exp()).sum(0)
                sources = output.speculation.token_sources[i]
                tokens = _records(model, row, split_text(row), sources, *laws)
            texts.append(TextRecord(prompts[start + i], tokens))
    if not any(text.tokens for text in texts):
        raise ConfigurationError("every text ends at once; give other prompts.")
    order = moved.argsort(descending=True).tolist()
    named = [(model.tokenizer.decode([i]), float(moved[i])) for i in (*order[:NUM_MOVED], *order[-NUM_MOVED:])]
    ablation = [
        cut_off(model, ids, cutoff, max_new_tokens=cutoff_tokens, batch_size=batch_size, **settings)
        for cutoff in ([*sorted(set(cutoffs)), None] if cutoffs else [])
    ]
    return Analysis(
        texts,
        [(text, by) for text, by in named[:NUM_MOVED] if by > 0],
        [(text, by) for text, by in reversed(named[NUM_MOVED:]) if by < 0],
        accepted.tolist(),
        drafted.tolist(),
        ablation,
        settings
        | {
            "alpha": model.alpha if alpha is None else alpha,
            "num_prompts": len(prompts),
            "max_new_tokens": max_new_tokens,
            "cutoff_tokens": cutoff_tokens,
        },
    )


def cut_off(
    model: ProxyTunedModel,
    prompts: Sequence[Sequence[int]],
    cutoff: int | None,
    *,
    max_new_tokens: int,
    batch_size: int,
    **settings: Any,
) -> CutOff:
    """Texts whose correction stops after so many new tokens.

    Args:
        model: the models.
        prompts: token ids.
        cutoff: tokens after which the base goes on alone; None for never.
        max_new_tokens, batch_size: as in `analyse`.
        settings: further arguments of `ProxyTunedModel.generate`.
    """
    result = CutOff(cutoff, [], [], [])
    schedule = None if cutoff is None else AlphaSchedule(cutoff=cutoff)
    ends = model._trio.eos_token_ids()
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        new, _ = _write(model, rows, max_new_tokens, alpha_schedule=schedule, **settings)
        for row in new:
            result.repetition.append(repetition(row))
            result.lengths.append(len(row))
            result.endless.append(len(row) == max_new_tokens and row[-1] not in ends)
    return result


def _write(
    model: ProxyTunedModel, rows: Sequence[Sequence[int]], max_new_tokens: int, **arguments: Any
) -> tuple[list[list[int]], Any]:
    """New tokens of every row, ends included, and the output of generate."""
    ids, mask = left_padded(rows, model.device)
    output: Any = model.generate(ids, mask, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **arguments)
    new = output.sequences[:, ids.shape[1] :].tolist()
    lengths = [len(sources) for sources in output.speculation.token_sources]
    return [row[:length] for row, length in zip(new, lengths, strict=True)], output


def _added(total: Any, counts: Sequence[int]) -> Any:
    size = max(len(total), len(counts))
    return np.pad(total, (0, size - len(total))) + np.pad(np.array(counts, int), (0, size - len(counts)))


def _laws(line: ContinuationLogits) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T, V] of base and target in float64, over the ids that they share."""
    target = line.target.double()
    base = line.by_role[BASE][:, : target.shape[1]].double().masked_fill(target.isneginf(), -torch.inf)
    return base.log_softmax(-1), target.log_softmax(-1)


def _records(
    model: ProxyTunedModel, ids: list[int], pieces: list[str], sources: list[str], base: Tensor, target: Tensor
) -> list[TokenRecord]:
    ratio = torch.where(target.isneginf(), 0.0, target - base)
    kl = (target.exp() * ratio).sum(-1).clamp(min=0).tolist()
    departs = (base.argmax(-1) != target.argmax(-1)).tolist()
    best = [_best(model.tokenizer, law) for law in (base, target)]
    return [
        TokenRecord(
            text=pieces[t],
            source=sources[t],
            kind=token_kind(model.tokenizer.decode([token])),
            departs=departs[t],
            kl=kl[t],
            log_ratio=float(ratio[t, token]),
            base=best[0][t],
            target=best[1][t],
        )
        for t, token in enumerate(ids)
    ]


def _best(tokenizer: Any, law: Tensor) -> list[Alternatives]:
    """The best tokens of every position, as text, and their probabilities."""
    top = law.topk(min(NUM_ALTERNATIVES, law.shape[-1]))
    return [
        [(tokenizer.decode([i]), p) for i, p in zip(ids, values, strict=True)]
        for ids, values in zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
    ]
