"""What every route shares: the engine, its tokenizers and settings; prompts become ids, requests become handles.

Knows requests and the engine; nothing of HTTP or of the form of answers.
"""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specproxy.chat import check_messages, render_prompt
from specproxy.engine import Engine, RequestHandle
from specproxy.errors import ConfigurationError, PromptError
from specproxy.grammar import Grammar
from specproxy.server.errors import WireError
from specproxy.server.grammars import Grammars
from specproxy.server.settings import ServerSettings
from specproxy.server.wire import ChatRequest, CompletionRequest, GenerationRequest
from specproxy.state import ANTI_EXPERT, BASE, EXPERT
from specproxy.text import OutputText
from specproxy_kernels import row_keys

__all__ = ["Choice", "Prompt", "Service", "choice_seed"]

_GREEDY_BELOW = 1e-5  # temperatures under it are greedy: nothing but the likeliest token could be drawn
_DEFAULT_MAX_TOKENS = 16  # of a completion, as in OpenAI's API


@dataclass(frozen=True)
class Prompt:
    """Token ids per role, and the text that they stand for."""

    ids: dict[str, list[int]]
    text: str

    @property
    def base(self) -> list[int]:
        """What the base reads."""
        return self.ids[BASE]


@dataclass
class Choice:
    """One answer on its way.

    Args:
        index: among the request's answers.
        prompt: what it follows.
        handle: of the engine.
        text: where its tokens become text.
    """

    index: int
    prompt: Prompt
    handle: RequestHandle
    text: OutputText


def choice_seed(seed: int | None, number: int) -> int | None:
    """The seed of a prompt's answer number `number`: the request's own for the first, others drawn from it."""
    if seed is None or number == 0:
        return seed
    return int(row_keys([seed], [number])[0])


class _StopText:
    """A stopping criterion: the row ends with the token that completes a stop string.

    It is called once for every token that is kept, in order, and looks at no others.

    Args:
        text: its own copy, that nobody else pushes to.
    """

    def __init__(self, text: OutputText) -> None:
        self._text = text

    def __call__(self, input_ids: Tensor, scores: Any) -> bool:
        """Whether the text has come to its end with the last token of int64 [1, L]."""
        self._text.push(int(input_ids[0, -1]))
        return self._text.stopped_by is not None


class Service:
    """An engine with what serving it takes.

    Args:
        engine: whose model has a tokenizer.
        settings: of the server.

    Raises:
        ConfigurationError: the model has no tokenizer, or a template cannot be used.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        if engine.model.tokenizer is None:
            raise ConfigurationError("no tokenizer was found beside the base; a server needs one.")
        self.engine, self.settings = engine, settings
        self.tokenizer = engine.model.tokenizer
        # The loop's thread decodes too, and a tokenizer is not made for two threads.
        self._loop_tokenizer = copy.deepcopy(self.tokenizer)
        self.created = int(time.time())
        self.eos_token_ids = frozenset(_listed(engine.model.generation_config.eos_token_id))
        self.grammars = Grammars(self.tokenizer, self.eos_token_ids)
        self.render([{"role": "user", "content": "Hello"}])  # a template's fault shows before a client does

    # Names and limits.

    @property
    def model_name(self) -> str:
        """What answers call the model."""
        return self.settings.model_names[0]

    def check_model(self, name: str | None) -> None:
        """Hold a request's model against those served.

        Raises:
            WireError: 404 for another one.
        """
        if name is not None and name not in self.settings.model_names:
            served = ", ".join(self.settings.model_names)
            message = f"the model {name!r} does not exist; served are: {served}."
            raise WireError(404, message, param="model", code="model_not_found")

    def _check_limits(self, request: GenerationRequest, num_prompts: int) -> None:
        limits = self.settings
        if num_prompts > limits.max_prompts:
            raise WireError(400, f"{num_prompts} prompts exceed the server's {limits.max_prompts}.", param="prompt")
        if request.n > limits.max_choices:
            raise WireError(400, f"n={request.n} exceeds the server's {limits.max_choices}.", param="n")
        if limits.max_tokens is not None and (request.max_tokens or 0) > limits.max_tokens:
            message = f"max_tokens={request.max_tokens} exceeds the server's {limits.max_tokens}."
            raise WireError(400, message, param="max_tokens")

    # Prompts.

    def encode(self, text: str, *, role: str = BASE, adds_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            PromptError: there are none.
        """
        tokenizer = self.engine.model.expert_tokenizer if role == EXPERT else self.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=adds_special_tokens).input_ids
        if not ids:
            raise PromptError("the prompt is empty; give at least one character.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included.

        Raises:
            PromptError: an id that the tokenizer does not have.
        """
        outside = next((i for i in ids if i >= len(self.tokenizer)), None)
        if outside is not None:
            raise PromptError(f"id {outside} is outside the vocabulary of {len(self.tokenizer)}.")
        text: str = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    def completion_prompts(self, request: CompletionRequest) -> list[Prompt]:
        """What every role reads of each of a completion's prompts."""
        prompts = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                ids, text = self.encode(prompt, adds_special_tokens=request.add_special_tokens), prompt
            else:
                ids, text = prompt, self.decode(prompt)
            prompts.append(Prompt({BASE: ids}, text))
        return prompts

    def render(self, messages: list[dict[str, str]]) -> Prompt:
        """What every role reads of a conversation.

        Raises:
            PromptError, ConfigurationError: of the conversation, or of a template.
        """
        conversation = check_messages(messages)
        settings, model = self.settings, self.engine.model
        templates = {
            BASE: (settings.base_template, self.tokenizer, "base_template"),
            EXPERT: (settings.expert_template, model.expert_tokenizer, "expert_template"),
        }
        if settings.anti_expert_template is not None:
            templates[ANTI_EXPERT] = (settings.anti_expert_template, self.tokenizer, "anti_expert_template")
        ids, text = {}, ""
        for role, (template, tokenizer, name) in templates.items():
            rendered, adds_special_tokens = render_prompt(conversation, template, tokenizer, name)
            ids[role] = self.encode(rendered, role=role, adds_special_tokens=adds_special_tokens)
            text = rendered if role == BASE else text
        return Prompt(ids, text)

    # Requests.

    def submit(
        self,
        request: CompletionRequest | ChatRequest,
        prompts: Sequence[Prompt],
        request_id: str,
        grammar: Grammar | None = None,
    ) -> list[Choice]:
        """Put `n` answers to every prompt in the engine's queue, each held to `grammar`: all of them, or none.

        Raises:
            WireError, ConfigurationError, PromptError: the request is not usable.
            EngineFull, EngineClosed: the engine takes it not now, or not any more.
        """
        self._check_limits(request, len(prompts))
        choices: list[Choice] = []
        try:
            for prompt in prompts:
                for number in range(request.n):
                    choices.append(self._submit_one(request, prompt, len(choices), number, request_id, grammar))
        except BaseException:
            for choice in choices:
                choice.handle.cancel()
            raise
        return choices

    def _submit_one(
        self,
        request: CompletionRequest | ChatRequest,
        prompt: Prompt,
        index: int,
        number: int,
        request_id: str,
        grammar: Grammar | None,
    ) -> Choice:
        criteria = [_StopText(self._output_text(request, prompt, self._loop_tokenizer))] if request.stop else []
        is_sampled = request.temperature >= _GREEDY_BELOW
        filters: dict[str, Any] = {
            "temperature": request.temperature,
            "top_k": max(request.top_k, 0),
            "top_p": request.top_p,
            "min_p": request.min_p or None,
        }
        bias = [[[token], value] for token, value in (request.logit_bias or {}).items()]
        handle = self.engine.submit(
            prompt.base,
            role_prompts={role: ids for role, ids in prompt.ids.items() if role != BASE and ids != prompt.base},
            max_new_tokens=self._max_tokens(request, prompt),
            min_new_tokens=request.min_tokens or None,
            do_sample=is_sampled,
            **(filters if is_sampled else {}),
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty or None,
            frequency_penalty=request.frequency_penalty or None,
            sequence_bias=bias or None,
            seed=choice_seed(request.seed, number),
            alpha=request.alpha,
            num_draft_tokens=request.num_draft_tokens,
            stop_token_ids=request.stop_token_ids,
            ignore_eos=request.ignore_eos,
            logprobs=_top_logprobs(request),
            prompt_logprobs=_prompt_logprobs(request),
            grammar=grammar,
            stopping_criteria=criteria,
            deadline=self.settings.request_timeout,
            request_id=f"{request_id}-{index}",
        )
        return Choice(index, prompt, handle, self._output_text(request, prompt, self.tokenizer))

    def _output_text(self, request: GenerationRequest, prompt: Prompt, tokenizer: Any) -> OutputText:
        ends = frozenset() if request.ignore_eos else self.eos_token_ids
        return OutputText(
            tokenizer,
            request.stop,
            ends | frozenset(request.stop_token_ids),
            request.min_tokens,
            request.include_stop_str_in_output,
            request.skip_special_tokens,
            prompt.base,
        )

    def _max_tokens(self, request: CompletionRequest | ChatRequest, prompt: Prompt) -> int:
        if request.max_tokens is not None:
            return request.max_tokens
        room = max(self.engine.max_model_len - max(map(len, prompt.ids.values())), 1)
        most = room if self.settings.max_tokens is None else min(room, self.settings.max_tokens)
        most = most if isinstance(request, ChatRequest) else min(most, _DEFAULT_MAX_TOKENS)
        return max(most, request.min_tokens)


def _top_logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    """How many of the likeliest tokens an answer names beside each of its own; None for no logarithms."""
    if isinstance(request, ChatRequest):
        return request.top_logprobs if request.logprobs else None
    return request.logprobs


def _prompt_logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    if request.prompt_logprobs is None and isinstance(request, CompletionRequest) and request.echo:
        return request.logprobs
    return request.prompt_logprobs


def _listed(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else value


def make_id(prefix: str) -> str:
    """A name that no other answer has."""
    return f"{prefix}-{uuid.uuid4().hex}"
