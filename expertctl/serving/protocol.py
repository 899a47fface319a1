"""Requests of OpenAI's API, with fields of expertctl's own: what is read, what is ignored and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .errors import RequestError

_REFUSED = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "functions": (None, []),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
}
"""Fields that are not supported, with the values that change nothing."""
_IGNORED = ("metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that do not concern the text."""


def _as_texts(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def _none_as_empty(value: Any) -> Any:
    return [] if value is None else value


Texts = Annotated[list[str], BeforeValidator(_as_texts)]
Names = Annotated[list[str], BeforeValidator(_none_as_empty)]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(BaseModel):
    """Fields of both kinds of requests."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Texts = Field([], max_length=16)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Who the request is for; users of one client take turns."""
    ignore_eos: bool = False
    """Continue after the end-of-sequence token, as in vLLM."""
    without: Names = []
    """Experts to disable."""
    decoder: str | None = None
    """Name of the server's decoder, or `none`."""
    shares: bool = False
    """Whether to return each expert's share of each token."""

    @property
    def includes_usage(self) -> bool:
        """Whether a streamed answer ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """A request to `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as tokens."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        return [prompt] if is_one else list(prompt)


class ChatRequest(GenerationRequest):
    """A request to `/v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | None = None
    """`auto`, or `none`, with which the template does not see the tools."""
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)

    def template_messages(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates read them; raises `RequestError` for content that is no text."""
        return [_template_message(message, index) for index, message in enumerate(self.messages)]


Request = TypeVar("Request", bound=GenerationRequest)


def parse_request(kind: type[Request], content: Mapping[str, Any]) -> Request:
    """Return a checked request; raises `RequestError` that names the first field that is wrong or not supported."""
    for name, harmless in _REFUSED.items():
        if name in content and content[name] not in harmless:
            raise RequestError(400, f"'{name}' is not supported by this server", param=name, code="unsupported")
    known = {name: value for name, value in content.items() if name not in (*_REFUSED, *_IGNORED)}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(400, f"{place or 'the body'}: {message}", param=place or None) from None
    except RecursionError:
        raise RequestError(400, "the body's JSON is nested too deeply") from None


def _template_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    where = f"messages.{index}"
    if not isinstance(message.get("role"), str):
        raise RequestError(400, f"{where}.role: a message needs a role", param=f"{where}.role")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part_text(part, f"{where}.content") for part in content)
    if content is not None and not isinstance(content, str):
        raise RequestError(400, f"{where}.content: must be a text or a list of parts", param=f"{where}.content")
    result = {**message, "content": content or ""}
    if calls := message.get("tool_calls"):
        result["tool_calls"] = [_with_arguments(call, f"{where}.tool_calls") for call in calls]
    return result


def _part_text(part: Any, where: str) -> str:
    if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
        raise RequestError(400, f"{where}: only parts of type 'text' are supported", param=where)
    return str(part["text"])


def _with_arguments(call: Any, where: str) -> Any:
    """Return a tool call whose arguments are an object, as templates expect, not its JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(400, f"{where}: a tool call needs a function", param=where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise RequestError(400, f"{where}: the arguments are not valid JSON", param=where) from None
    return {**call, "function": {**function, "arguments": arguments}}
