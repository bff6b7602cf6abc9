"""`ProxyTunedLM`: the harness's model over a `ProxyTunedModel`. Knows requests, nothing of tasks or data.

Generation runs in batches through the speculative loop. Likelihoods come from the combined logits, by a plain forward
of every model: they score text that is there, so that there is nothing to speculate on.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text, resolve_max_length
from rich.console import Console
from rich.progress import track

from specproxy.batches import left_padded, score_continuations
from specproxy.chat import render_prompt
from specproxy.config import check_alpha, check_integer
from specproxy.errors import ConfigurationError, PromptError
from specproxy.model import ProxyTunedModel
from specproxy.stats import SpeculationStats

__all__ = ["ProxyTunedLM", "quiet_loggers"]

_BASE, _EXPERT, _ANTI_EXPERT = "base", "expert", "anti_expert"


@register_model("specproxy")
class ProxyTunedLM(HFLM):
    """A proxy-tuned model under lm-evaluation-harness.

    Args:
        model: a loaded model with a tokenizer; or None, and `demo`, or `base`, `expert` and `anti_expert` name one.
        demo: task of the embedded trio.
        base, expert, anti_expert, assistant, tokenizer: folders or hub names, as in `ProxyTunedModel.from_pretrained`.
        alpha: proxy strength; the model's own by default.
        num_draft_tokens, acceptance, drafter, num_tree_tokens: as in `ProxyTunedModel.generate`; 0 drafts are per-step
            decoding.
        seed: of tasks that sample; every generation has a key of its own that follows from it and its place in the run.
        batch_size: rows of a batch.
        max_length: tokens of prompt and output together; the least that the models' configurations name by default.
        max_gen_toks: of tasks that name no length of their own.
        base_template, expert_template, anti_expert_template: how a role reads a conversation when the harness applies
            chat templates: "chat", "raw" or a Jinja template, as in `ProxyTunedModel.chat`.
        device, dtype: of models that are loaded here.
        max_batch_size: the harness's; unused.

    Attributes:
        speculation: statistics of every batch generated so far.

    Raises:
        ConfigurationError: an unusable value.
    """

    def __init__(
        self,
        model: ProxyTunedModel | None = None,
        *,
        demo: str | None = None,
        base: str | None = None,
        expert: str | None = None,
        anti_expert: str | None = None,
        assistant: str | None = None,
        tokenizer: str | None = None,
        alpha: float | None = None,
        num_draft_tokens: int | str = 4,
        acceptance: str = "rejection",
        drafter: str | None = None,
        num_tree_tokens: int = 0,
        seed: int = 0,
        batch_size: int | str | None = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        base_template: str | None = None,
        expert_template: str | None = None,
        anti_expert_template: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        if model is None:
            names = {_BASE: base, _EXPERT: expert, _ANTI_EXPERT: anti_expert}
            model = _load(names | {"assistant": assistant, "tokenizer": tokenizer}, demo, device, dtype)
        if model.tokenizer is None:
            raise ConfigurationError("tokenizer=None: tasks are text; construct the model with a tokenizer.")
        if isinstance(batch_size, str) and not batch_size.isdecimal():
            raise ConfigurationError(f"batch_size={batch_size!r} must be a number; rows are not counted by trial here.")
        # The harness adds a pad token to the tokenizer it is given; the caller's stays as it is.
        with quiet_loggers():
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(model.tokenizer),
                backend="causal",
                batch_size=check_integer("batch_size", int(batch_size or 8), 1, "give a number of rows"),
                max_length=max_length,
            )
        self._max_gen_toks = check_integer("max_gen_toks", max_gen_toks, 1, "give a number of tokens")
        self._alpha = model.alpha if alpha is None else check_alpha(alpha)
        self._speculation: dict[str, Any] = {
            "num_draft_tokens": num_draft_tokens,
            "acceptance": acceptance,
            "drafter": drafter,
            "num_tree_tokens": num_tree_tokens,
        }
        self._seed = check_integer("seed", seed, -(2**63), "give an integer")
        self._drawn = 0
        self._templates = {_BASE: base_template, _EXPERT: expert_template, _ANTI_EXPERT: anti_expert_template}
        if anti_expert_template is None:
            self._templates[_ANTI_EXPERT] = base_template
        # What each role reads in place of a context that a template has rendered, and whether its tokenizer is still to
        # add special tokens. The harness passes on the base's text alone.
        self._rendered: dict[str, dict[str, tuple[str, bool]]] = {}
        self.speculation: list[SpeculationStats] = []

    @property
    def trio_model(self) -> ProxyTunedModel:
        """The model that is evaluated."""
        model: ProxyTunedModel = self._model
        return model

    @property
    def max_length(self) -> int:
        """Most tokens of a row: the least that any role's configuration allows."""
        if self._max_length:
            return int(self._max_length)
        models = self.trio_model._trio.models.values()
        return min(int(resolve_max_length(m.config, default=self._DEFAULT_MAX_LENGTH)) for m in models)

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task names no number."""
        return self._max_gen_toks

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside results; asks no hub."""
        model = self.trio_model
        return {
            "model_num_parameters": {role: m.num_parameters() for role, m in model._trio.models.items()},
            "model_dtype": str(model.dtype),
            "alpha": self._alpha,
            **self._speculation,
        }

    # Conversations: a prompt for every role.

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The base's template, for the record."""
        return self._templates[_BASE] or getattr(self.tokenizer, "chat_template", None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """What the base reads of a conversation; what the others read is kept beside it.

        Raises:
            ConfigurationError: a template that cannot be rendered, or two conversations that the base reads alike and
                another role does not.
        """
        texts = {}
        for role, template in self._templates.items():
            tokenizer = self.trio_model.expert_tokenizer if role == _EXPERT else self.tokenizer
            texts[role] = render_prompt(
                chat_history, template, tokenizer, f"{role}_template", continues=not add_generation_prompt
            )
        key = texts[_BASE][0]
        if self._rendered.setdefault(key, texts) != texts:
            raise ConfigurationError(
                f"base_template={self._templates[_BASE]!r} renders two conversations alike that the expert reads as "
                "different ones; use a template that keeps them apart."
            )
        return key

    def _prompt_ids(self, role: str, context: str) -> list[int]:
        """Tokens of a context as a role reads it."""
        if context in self._rendered:
            text, adds_special_tokens = self._rendered[context][role]
            tokenizer = self.trio_model.expert_tokenizer if role == _EXPERT else self.tokenizer
            ids: list[int] = tokenizer.encode(text, add_special_tokens=adds_special_tokens)
        else:
            ids = self.tok_encode(context)
        return ids or [self.prefix_token_id]

    # Generation.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts of all requests, in their order.

        Args:
            requests: with arguments (context, generation arguments): `until`, `max_gen_toks`, `do_sample`,
                `temperature`, and further ones of `ProxyTunedModel.generate`.
            disable_tqdm: no progress bar, which there is at a terminal only.
        """
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda arguments: (-len(arguments[0]), arguments[0]),
            group_by="gen_kwargs",
            group_fn=lambda arguments: arguments[1],
        )
        texts: list[str] = []
        chunks = list(order.get_batched(n=self.batch_size))
        console = Console(stderr=True)
        for chunk in track(chunks, "Generating", console=console, disable=disable_tqdm or not console.is_terminal):
            contexts = [context for context, _ in chunk]
            new = self._generate(contexts, chunk[0][1])
            for (context, arguments), text in zip(chunk, new, strict=True):
                self.cache_hook.add_partial("generate_until", (context, arguments), text)
            texts += new
        result: list[str] = order.get_original(texts)
        return result

    def _generate(self, contexts: Sequence[str], arguments: dict[str, Any]) -> list[str]:
        given = normalize_gen_kwargs(arguments, self.max_gen_toks)
        most, until = given.pop("max_gen_toks"), [stop for stop in given.pop("until") if stop]
        if not given["do_sample"]:
            given.pop("temperature", None)
        room = self.max_length - most
        if room < 1:
            raise ConfigurationError(
                f"max_gen_toks={most} leaves no room for a prompt in max_length={self.max_length}; ask for fewer."
            )
        model = self.trio_model
        roles = {"": _BASE, "expert_": _EXPERT, "anti_expert_": _ANTI_EXPERT}
        if not any(context in self._rendered for context in contexts):
            roles = {"": _BASE}  # every role reads the base's prompt
        if model.anti_expert is None:
            roles.pop("anti_expert_", None)
        for prefix, role in roles.items():
            rows = [self._prompt_ids(role, context)[-room:] for context in contexts]  # as the harness, from the left
            given[f"{prefix}input_ids"], given[f"{prefix}attention_mask"] = left_padded(rows, model.device)
        if given["do_sample"]:
            given["seed"] = [self._seed + self._drawn + i for i in range(len(contexts))]
            self._drawn += len(contexts)
        # The end of text ends a row by its id, which is cheaper than by its string.
        eos = {*model._trio.eos_token_ids(), self.eot_token_id}
        end = self.tokenizer.decode([self.eot_token_id])
        stops = [stop for stop in until if stop != end]
        output: Any = model.generate(
            **given,
            **self._speculation,
            alpha=self._alpha,
            max_new_tokens=most,
            eos_token_id=sorted(eos),
            stop_strings=stops or None,
            tokenizer=self.tokenizer,
            return_dict_in_generate=True,
        )
        self.speculation.append(output.speculation)
        new = output.sequences[:, given["input_ids"].shape[1] :].tolist()
        lengths = [len(sources) for sources in output.speculation.token_sources]
        texts = [self.tok_decode(row[:length]) for row, length in zip(new, lengths, strict=True)]
        return [postprocess_generated_text(text, stops, None) for text in texts]

    # Likelihoods.

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of every continuation under the target, and whether it is the greedy one."""
        by_length = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        answers: dict[int, tuple[float, bool]] = {}
        size = override_bs or self.batch_size
        for start in range(0, len(by_length), size):
            chunk = by_length[start : start + size]
            for i, answer in zip(chunk, self._score([requests[i] for i in chunk]), strict=True):
                answers[i] = answer
                if requests[i][0] is not None:  # parts of a rolling text are cached as a whole
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return [answers[i] for i in range(len(requests))]

    def _score(self, chunk: Sequence[Any]) -> list[tuple[float, bool]]:
        continuations = [list(continuation) for _, _, continuation in chunk]
        prompts: dict[str, list[list[int]]] = {role: [] for role in (_BASE, _EXPERT, _ANTI_EXPERT)}
        for texts, context_ids, continuation in chunk:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise PromptError(
                    f"a continuation of {len(continuation)} tokens leaves no prompt in max_length={self.max_length}."
                )
            context = texts[0] if texts is not None else None
            for role, rows in prompts.items():
                # The continuation's leading spaces are tokens of its own already.
                ids = context_ids if context not in self._rendered else self._prompt_ids(role, context)
                rows.append(list(ids)[-room:])
        scored = score_continuations(self.trio_model._trio, prompts, continuations, self._alpha)
        answers = []
        for line, continuation in zip(scored, continuations, strict=True):
            ids = torch.tensor(continuation, device=line.target.device)
            total = line.target.log_softmax(-1).gather(1, ids[:, None]).sum()
            answers.append((float(total), bool((line.target.argmax(-1) == ids).all())))
        return answers


def _load(names: dict[str, str | None], demo: str | None, device: str | None, dtype: str | None) -> ProxyTunedModel:
    """The model that the harness's `model_args` name."""
    given: dict[str, Any] = {role: name for role, name in names.items() if name is not None}
    precision = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and not isinstance(precision, torch.dtype):
        raise ConfigurationError(f"dtype={dtype!r} is no dtype of torch.")
    if not set(given) - {"assistant"}:
        return ProxyTunedModel.demo(
            demo or "arithmetic", device=device, dtype=precision, assistant=given.get("assistant")
        )
    if demo is not None or not {_BASE, _EXPERT} <= set(given):
        raise ConfigurationError("base and expert, with or without anti_expert, go together, and without demo.")
    return ProxyTunedModel.from_pretrained(**given, dtype=precision, device_map=device, progress=False)


@contextlib.contextmanager
def quiet_loggers() -> Iterator[None]:
    """The harness warns of what is meant here: loaded models, tasks that override its own."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
