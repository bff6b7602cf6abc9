"""Conversations: one list of messages, a prompt for every role.

A tuned expert reads the chat format it was tuned on; the untuned base and anti-expert read the same format, or plain
text as in the paper. Knows nothing of models: text to text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from specproxy.errors import ConfigurationError, PromptError
from specproxy.generate import GenerateOutput

__all__ = ["ChatReply", "ChatTemplate", "check_messages", "render_prompt"]

Message = dict[str, str]
ChatTemplate = str | Callable[[Sequence[Message]], str]

_ROLES = ("system", "user", "assistant")


@dataclass
class ChatReply:
    """An answer.

    Args:
        text: of the answer, without special tokens.
        messages: the conversation with the answer appended, ready for the next turn.
        output: tokens and statistics of the call.
    """

    text: str
    messages: list[Message]
    output: GenerateOutput


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """A conversation that ends with the user's turn.

    Raises:
        PromptError: naming the message that is malformed.
    """
    if not messages:
        raise PromptError(f"messages={messages!r} must be a non-empty list of {{'role': ..., 'content': ...}}.")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise PromptError(f"messages[{i}]={message!r} needs a role among {', '.join(_ROLES)}.")
        if not isinstance(message.get("content"), str):
            raise PromptError(f"messages[{i}]={message!r} needs text in 'content'.")
    if messages[-1]["role"] != "user":
        raise PromptError(f"messages end with the {messages[-1]['role']}'s turn; end with the user's.")
    return [dict(message) for message in messages]


def render_prompt(
    messages: Sequence[Message], template: ChatTemplate | None, tokenizer: Any, name: str, continues: bool = False
) -> tuple[str, bool]:
    """One role's prompt, and whether the tokenizer is still to add its special tokens (a template has written them).

    Args:
        messages: the conversation.
        template: "chat", the tokenizer's own template; "raw", the contents alone, a blank line between them; a Jinja
            template; or a function from messages to text. None is "chat" where the tokenizer has a template, else
            "raw".
        tokenizer: of the role.
        name: of the argument, for messages.
        continues: whether the last message is the beginning of the answer and stays open.

    Raises:
        ConfigurationError: "chat" without a template, or a template that cannot be rendered.
    """
    if callable(template):
        return template(messages), False
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if template is None:
        template = "chat" if has_template else "raw"
    if template == "raw":
        return "\n\n".join(message["content"] for message in messages), True
    if template == "chat" and not has_template:
        raise ConfigurationError(f'{name}="chat", but the tokenizer has no chat template; pass "raw" or a template.')
    if template != "chat" and "{{" not in template:
        raise ConfigurationError(f'{name}={template!r} prints no message; pass "chat", "raw" or a Jinja template.')
    own = {} if template == "chat" else {"chat_template": template}
    turn = {"add_generation_prompt": not continues, "continue_final_message": continues}
    try:
        prompt: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **turn, **own)
    except TemplateError as error:
        raise ConfigurationError(f"{name} cannot be rendered: {error}") from error
    return prompt, False
