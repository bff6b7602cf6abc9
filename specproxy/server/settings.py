"""What an operator decides: the model's name, limits, the key, templates. Checked once; knows no web framework."""

from __future__ import annotations

from dataclasses import dataclass, field

from specproxy.chat import ChatTemplate
from specproxy.config import check_integer, check_number
from specproxy.errors import ConfigurationError

__all__ = ["ServerSettings"]


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one server.

    Args:
        model_names: names that requests may give the model; the first is the one in answers.
        api_key: what clients send as a bearer token; None asks for none.
        max_body_bytes: of a request's body.
        max_prompts: prompts of one request.
        max_choices: `n` of one request.
        max_tokens: new tokens of one choice; None leaves it to the model's length.
        request_timeout: seconds after which a request ends; None never.
        base_template, expert_template, anti_expert_template: how each role reads a conversation; see
            `ProxyTunedModel.chat`.

    Raises:
        ConfigurationError: for an unusable value.
    """

    model_names: tuple[str, ...] = ("specproxy",)
    api_key: str | None = field(default=None, repr=False)
    max_body_bytes: int = 4 * 2**20
    max_prompts: int = 128
    max_choices: int = 16
    max_tokens: int | None = None
    request_timeout: float | None = None
    base_template: ChatTemplate | None = None
    expert_template: ChatTemplate | None = None
    anti_expert_template: ChatTemplate | None = None

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ConfigurationError(f"model_names={self.model_names!r} must be names; give at least one.")
        if self.api_key is not None and not self.api_key:
            raise ConfigurationError("api_key is empty; leave it out to ask for none.")
        for name in ("max_body_bytes", "max_prompts", "max_choices"):
            check_integer(name, getattr(self, name), 1, "requests have to fit")
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1, "leave it out for no limit of its own")
        if self.request_timeout is not None and check_number("request_timeout", self.request_timeout) <= 0:
            raise ConfigurationError(f"request_timeout={self.request_timeout!r} must be above 0 seconds.")
