"""Requests as clients write them: OpenAI's fields, vLLM's extras and this project's own, checked field by field.

What would change the answer and cannot be had is refused; OpenAI's fields that change no answer are taken and ignored;
unknown ones are an error. Knows nothing of models or tokens.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from specproxy.config import MAX_DRAFT_TOKENS

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "ErrorBody",
    "ErrorResponse",
    "GenerationRequest",
    "StreamOptions",
    "TokenizeRequest",
]

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
_T = TypeVar("_T")


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no text") from error
    return value


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
_Key = Annotated[int, Field(ge=0, lt=2**31)]  # keys of objects are text in JSON
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorBody(BaseModel):
    """What went wrong: a sentence, its kind, the parameter that it is about, a code."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorBody


class StreamOptions(_Wire):
    """What a stream tells beside text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None


class _JsonSchema(_Wire):
    name: Text | None = None
    description: Text | None = None
    # A pydantic model has a method of this name.
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None  # every schema is held to


class _ResponseFormat(_Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> _ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type=json_schema, and neither without the other")
        if self.json_schema is not None and self.json_schema.schema_ is None:
            raise ValueError("json_schema.schema is missing")
        return self


class _StructuredOutputs(_Wire):
    """As in vLLM: one way of several to say what an answer has to be."""

    # A method of pydantic's goes by the name of the first.
    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: list[Annotated[Text, Field(min_length=1)]] | None = Field(default=None, min_length=1)
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> _StructuredOutputs:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.json_object)) != 1:
            raise ValueError("give one of json, regex, choice and json_object")
        return self


class GenerationRequest(_Wire):
    """What completions and chats have in common. A field that is null counts as not given."""

    model: Text | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[Number, Field(ge=0)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[_Key, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: list[Annotated[Text, Field(min_length=1)]] = Field(default_factory=list, max_length=MAX_STOP_STRINGS)
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: bool = False
    alpha: Annotated[Number, Field(ge=-100, le=100)] | None = None
    num_draft_tokens: Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)] | None = None
    return_speculation: bool = False
    response_format: _ResponseFormat | None = None
    structured_outputs: _StructuredOutputs | None = None
    # Taken for the sake of OpenAI's clients; no answer depends on them.
    user: Text | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _hold_together(self: _T) -> _T:
        assert isinstance(self, GenerationRequest)
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs cannot be streamed; use stream=false")
        if self.structure is not None:
            if self.response_format is not None and self.response_format.type != "text" and self.structured_outputs:
                raise ValueError("response_format and structured_outputs were both given; give one of them")
            if self.ignore_eos or self.min_tokens:
                raise ValueError("structured output ends where its grammar does; leave ignore_eos and min_tokens out")
        return self

    @property
    def structure(self) -> tuple[str, Any] | None:
        """What the answer has to be: "json" and a schema, "regex" and a pattern, "choice" and texts; None: anything."""
        wanted = self.structured_outputs
        if wanted is not None:
            for kind, value in (("json", wanted.json_), ("regex", wanted.regex), ("choice", wanted.choice)):
                if value is not None:
                    return kind, value
            return "json", {"type": "object"}
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return "json", {"type": "object"} if form.json_schema is None else form.json_schema.schema_


class CompletionRequest(GenerationRequest):
    """Body of `/v1/completions`."""

    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if isinstance(value, list) and (not value or [] in value):
            raise ValueError("holds no prompt, or an empty one; give at least one token each")
        return value

    @model_validator(mode="after")
    def _can_be_had(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of={self.best_of} is not supported; choose among n={self.n} answers yourself")
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs cannot be streamed; use stream=false")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several prompts, as a list: texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class _TextPart(_Wire):
    type: Literal["text"]
    text: Text


class _Message(BaseModel):
    """One turn. Further fields, such as `name`, are read by no template here."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[_TextPart]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """Body of `/v1/chat/completions`."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _can_be_had(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.max_completion_tokens is not None:
            if self.max_tokens is not None and self.max_tokens != self.max_completion_tokens:
                raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
            if self.min_tokens > self.max_completion_tokens:
                raise ValueError(f"min_tokens={self.min_tokens} exceeds max_completion_tokens")
            self.max_tokens = self.max_completion_tokens
        return self

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages as templates read them."""
        return [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in self.messages
        ]


class TokenizeRequest(_Wire):
    """Body of `/tokenize`: a prompt, or a conversation as the base reads it."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[_Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(_Wire):
    """Body of `/detokenize`."""

    model: Text | None = None
    tokens: list[TokenId]
