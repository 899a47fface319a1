"""The server's application: routes, and the way of a request from its body to its answer."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from expertctl.core.errors import unknown_name
from expertctl.core.models.serving.requests import TextRequest

from .answers import Answer, Kind
from .bodies import read_json_body
from .errors import RequestError
from .generation import Generation
from .guard import Guard
from .limits import Limits
from .metrics import Metrics
from .models import ServedModel
from .playground import playground_response
from .protocol import ChatRequest, CompletionRequest, GenerationRequest, parse_request

_LONG_TEXT = 20_000
"""Characters from which a prompt is tokenised in another thread."""
_STALLED_S = 30.0
"""Seconds after the time limit of a request in which its client must have read the answer."""
_DEFAULT_COMPLETION_TOKENS = 16


def server_app(
    models: Sequence[ServedModel], limits: Limits, *, token: str | None = None, is_local: bool = True
) -> ASGIApp:
    """Return the application that serves some models."""
    server = _Server({model.name: model for model in models}, limits, Metrics(models))
    routes = [
        Route("/", playground_response),
        Route("/health", server.health),
        Route("/metrics", server.metrics_page),
        Route("/v1/models", server.list_models),
        Route("/v1/models/{name:path}", server.show_model),
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
    ]
    handlers: Any = {RequestError: _error_response, HTTPException: _http_error_response}
    app = Starlette(routes=routes, exception_handlers=handlers)
    known = {route.path for route in routes}

    def count(path: str, status: int) -> None:
        server.metrics.requests.labels(path if path in known else "other", str(status)).inc()

    return Guard(app, token=token, is_local=is_local, count=count)


async def _error_response(request: Request, error: RequestError) -> Response:
    return error.response()


async def _http_error_response(request: Request, error: HTTPException) -> Response:
    return RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()


@dataclass(frozen=True)
class _Texts:
    """The texts that a request asks for."""

    requests: list[TextRequest]
    prompt_tokens: int
    """Tokens of the prompts, each counted once."""


class _Server:
    """The endpoints."""

    def __init__(self, models: Mapping[str, ServedModel], limits: Limits, metrics: Metrics) -> None:
        self._models, self._limits, self.metrics = models, limits, metrics
        self._started = int(time.time())

    async def health(self, request: Request) -> Response:
        """Answer that the server runs."""
        return JSONResponse({"status": "ok"})

    async def metrics_page(self, request: Request) -> Response:
        """Answer with the measurements."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def list_models(self, request: Request) -> Response:
        """List the models."""
        return JSONResponse({"object": "list", "data": [self._model_card(model) for model in self._models.values()]})

    async def show_model(self, request: Request) -> Response:
        """Describe one model."""
        return JSONResponse(self._model_card(self._model(request.path_params["name"])))

    def _model_card(self, model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "expertctl",
            "max_model_len": model.max_length,
            "experts": list(model.experts),
            "shares": model.has_shares(),
            "chat": model.has_template,
        }

    def _model(self, name: str) -> ServedModel:
        if name not in self._models:
            message = str(unknown_name("model", name, self._models, listed_as="served"))
            raise RequestError(404, message, param="model", code="model_not_found")
        return self._models[name]

    async def complete(self, request: Request) -> Response:
        """Answer `/v1/completions`."""
        asked = parse_request(CompletionRequest, await read_json_body(request, self._limits))
        model = self._model(asked.model)
        prompts = [await _in_thread_if_long(model, prompt) for prompt in asked.prompts]
        if not prompts:
            raise RequestError(400, "prompt: at least one is needed", param="prompt")
        texts = self._texts(model, asked, prompts, asked.max_tokens or _DEFAULT_COMPLETION_TOKENS, asked.logprobs)
        return await self._answer(request, model, asked, texts, "completion")

    async def chat(self, request: Request) -> Response:
        """Answer `/v1/chat/completions`."""
        asked = parse_request(ChatRequest, await read_json_body(request, self._limits))
        model = self._model(asked.model)
        if asked.tool_choice not in (None, "auto", "none"):
            raise RequestError(400, "tool_choice: only 'auto' and 'none' are supported", param="tool_choice")
        tools = asked.tools or [] if asked.tool_choice != "none" else []
        messages = asked.template_messages()
        prompt = await asyncio.to_thread(model.encode_chat, messages, tools)
        room = max(model.max_length - len(prompt), 1)
        wanted = asked.max_completion_tokens or asked.max_tokens or min(self._limits.max_tokens, room)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        texts = self._texts(model, asked, [prompt], wanted, logprobs)
        return await self._answer(request, model, asked, texts, "chat")

    def _texts(
        self,
        model: ServedModel,
        asked: GenerationRequest,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int,
        logprobs: int | None,
    ) -> _Texts:
        """Return the texts of a request; raises `RequestError` for what exceeds a limit or the model cannot do."""
        count = len(prompts) * (asked.n or 1)
        limits = self._limits
        if count > limits.choices:
            raise RequestError(400, f"{count} texts in one request, at most {limits.choices}", param="n")
        if max_tokens > limits.max_tokens:
            raise RequestError(400, f"max_tokens is {max_tokens}, at most {limits.max_tokens}", param="max_tokens")
        if (logprobs or 0) > limits.alternatives:
            raise RequestError(
                400, f"{logprobs} alternatives per token, at most {limits.alternatives}", param="logprobs"
            )
        if asked.shares and not model.has_shares(asked.decoder):
            raise RequestError(
                400,
                f"model '{model.name}' does not mix the experts' predictions per token; request shares from an ensemble",
                param="shares",
            )
        for prompt in prompts:
            if len(prompt) + max_tokens > model.max_length:
                raise RequestError(
                    400,
                    f"the prompt has {len(prompt)} tokens; with {max_tokens} new tokens it exceeds the model's "
                    f"{model.max_length} positions; shorten the prompt or request fewer tokens",
                    code="context_length_exceeded",
                )
        seed = asked.seed if asked.seed is not None else secrets.randbits(63)
        temperature = 1.0 if asked.temperature is None else asked.temperature
        requests = [
            TextRequest(
                prompt,
                max_tokens,
                temperature,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                top_k=max(asked.top_k or 0, 0),
                seed=seed + index,
                stop=tuple(asked.stop),
                logprobs=logprobs,
                shares=asked.shares,
                ignore_eos=asked.ignore_eos,
            )
            for index, prompt in enumerate(prompt for prompt in prompts for _ in range(asked.n or 1))
        ]
        return _Texts(requests, sum(map(len, prompts)))

    async def _answer(
        self, request: Request, model: ServedModel, asked: GenerationRequest, texts: _Texts, kind: Kind
    ) -> Response:
        address = request.client.host if request.client is not None else ""
        generation = Generation(
            texts.requests,
            streams=bool(asked.stream),
            client=f"{address} {asked.user or ''}",
            seconds=self._limits.request_seconds,
        )
        has_logprobs = texts.requests[0].logprobs is not None
        answer = Answer(
            model, kind, len(texts.requests), texts.prompt_tokens, logprobs=has_logprobs, shares=asked.shares
        )
        generation.start(await model.engine(asked.without, asked.decoder))
        self.metrics.tokens.labels(model.name, "prompt").inc(texts.prompt_tokens)
        if asked.stream:
            return _EventStream(self, model, generation, answer, asked.includes_usage)
        async with self._measured(model, generation) as begin, _watched(request.receive, generation):
            async for updates in generation.updates():
                self._measure_first(model, begin)
                for update in updates:
                    answer.add(update.index, update.progress)
        return JSONResponse(answer.whole())

    @asynccontextmanager
    async def _measured(self, model: ServedModel, generation: Generation) -> AsyncIterator[list[float]]:
        """Measure the block, and give up the texts if it does not end."""
        begin = [time.perf_counter()]
        try:
            yield begin
        finally:
            generation.cancel()
            self.metrics.tokens.labels(model.name, "generated").inc(generation.num_tokens)
            self.metrics.seconds.labels(model.name).observe(time.perf_counter() - begin[0])

    def _measure_first(self, model: ServedModel, begin: list[float]) -> None:
        if len(begin) == 1:
            begin.append(time.perf_counter())
            self.metrics.first_seconds.labels(model.name).observe(begin[1] - begin[0])

    async def stream(
        self, model: ServedModel, generation: Generation, answer: Answer, with_usage: bool, receive: Receive, send: Send
    ) -> None:
        """Send an answer as server-sent events, as many in one piece as there are."""

        async def send_events(contents: Sequence[Any], *, more: bool = True) -> None:
            data = "".join(
                f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n" for content in contents
            )
            await send({"type": "http.response.body", "body": data.encode(), "more_body": more})

        async with (
            self._measured(model, generation) as begin,
            _watched(receive, generation),
            asyncio.timeout(self._limits.request_seconds + _STALLED_S),
        ):
            if first := answer.first_chunks():
                await send_events(first)
            try:
                async for updates in generation.updates():
                    self._measure_first(model, begin)
                    await send_events([answer.chunk(update.index, update.progress) for update in updates])
            except RequestError as error:  # the status is sent already
                await send_events([error.content(), "[DONE]"], more=False)
                return
            await send_events([*([answer.usage_chunk()] if with_usage else []), "[DONE]"], more=False)


class _EventStream(Response):
    """A streamed answer."""

    def __init__(
        self, server: _Server, model: ServedModel, generation: Generation, answer: Answer, with_usage: bool
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._server, self._arguments = server, (model, generation, answer, with_usage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        with suppress(TimeoutError):  # the client does not read; the connection is closed
            await self._server.stream(*self._arguments, receive, send)


@asynccontextmanager
async def _watched(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Give up the texts as soon as the client hangs up."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def _in_thread_if_long(model: ServedModel, prompt: str | list[int]) -> tuple[int, ...]:
    if len(prompt) < _LONG_TEXT:
        return model.encode(prompt)
    return await asyncio.to_thread(model.encode, prompt)
