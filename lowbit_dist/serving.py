"""A trained model behind HTTP, as OpenAI's completions: POST /v1/completions and GET /v1/models.

One thread makes texts, one after the other, so that a seed means the same text whoever else asks.  A client
that goes away gives up its turn.  Whatever of OpenAI's request this model cannot
do is refused by name.  Only this machine is answered, by a name that is its own, so that no page of the web
reaches it through a browser.
"""

import asyncio
import json
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from lowbit_dist.errors import ConfigError
from lowbit_dist.trained import Trained

HOST = "127.0.0.1"
END_TIMEOUT = 5  # seconds that texts which are being streamed have when the server ends
Say = Callable[[str], None]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Completion(BaseModel):
    """OpenAI's request, and vLLM's `top_k`; a field that has one value alone is not supported otherwise."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | list[str]
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    echo: Literal[False] = False
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    logprobs: None = None
    suffix: None = None
    logit_bias: None = None
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]


class Refused(Exception):
    """A request that is not answered."""

    def __init__(self, message: str, status: int = 400, field: str | None = None):
        self.message, self.status, self.field = message, status, field


class ClientGone(Exception):
    """Nobody waits for the text any more."""


def application(trained: Trained, name: str) -> FastAPI:
    """Serves the model, loaded here, as `name`."""
    # A mistake in the tokenizer is told now, and not in the first answer.
    assert trained.tokenizer is not None
    network = trained.network(integer=True)
    made = int(time.time())
    maker = ThreadPoolExecutor(1, "texts")
    app = FastAPI(title=f"lowbit serve {name}", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    def complete(asked: Completion, prompt: str, say: Say) -> dict[str, Any]:
        return trained.generate(
            prompt, max_new_tokens=asked.max_tokens, temperature=asked.temperature, top_k=asked.top_k,
            top_p=asked.top_p, seed=secrets.randbits(63) if asked.seed is None else asked.seed,
            stop=asked.stops, network=network, stream=say,
        )  # fmt: skip

    def begin(asked: Completion, prompt: str) -> _Text:
        text = _Text(asyncio.get_running_loop())
        text.loop.run_in_executor(maker, text.make, partial(complete, asked, prompt))
        return text

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": made, "owned_by": "lowbit-dist"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions")
    async def completions(asked: Completion, request: Request) -> Response:
        if asked.model not in (None, name):
            raise Refused(f"there is no model {asked.model!r} here; write {name!r}", 404, "model")
        if not asked.prompts or (asked.stream and len(asked.prompts) > 1):
            raise Refused(f"there are {len(asked.prompts)} prompts; write one", field="prompt")
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
            "created": int(time.time()), "model": name,
        }  # fmt: skip
        if not asked.stream:
            answers = [await _whole(begin(asked, prompt), request) for prompt in asked.prompts]
            choices = [_choice(i, answer["text"], answer) for i, answer in enumerate(answers)]
            return JSONResponse({**head, "choices": choices, "usage": _usage(answers)})
        text = begin(asked, asked.prompts[0])
        await text.next()  # the prompt, once nothing is wrong with the request
        if await request.is_disconnected():
            text.is_unwanted.set()
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(_events(text, head, with_usage), media_type="text/event-stream")

    @app.exception_handler(Refused)
    def refuse(_: Any, error: Refused) -> JSONResponse:
        message, field = map(_sayable, (error.message, error.field))
        what = {"type": "invalid_request_error", "param": field, "code": None}
        return JSONResponse({"error": {"message": message, **what}}, error.status)

    @app.exception_handler(HTTPException)
    def refuse_request(_: Any, error: HTTPException) -> JSONResponse:
        return refuse(_, Refused(error.detail, error.status_code))

    @app.exception_handler(ConfigError)
    def refuse_options(_: Any, error: ConfigError) -> JSONResponse:
        return refuse(_, Refused(_in_fields(str(error))))

    @app.exception_handler(RequestValidationError)
    def refuse_fields(_: Any, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return refuse(_, Refused(f"the request is not JSON: {first['ctx']['error']}"))
        field = ".".join(str(part) for part in first["loc"][1:2]) or None
        return refuse(_, Refused(f"{field or 'the request'}: {first['msg']}", field=field))

    return app


class _Text:
    """A text that one thread makes and a loop reads, piece by piece; the last is `generate`'s answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.is_unwanted = threading.Event()
        self._pieces: asyncio.Queue[str | dict[str, Any] | BaseException] = asyncio.Queue()

    def make(self, complete: Callable[[Say], dict[str, Any]]) -> None:
        try:
            if not self.is_unwanted.is_set():
                self._put(complete(self._say))
        except ClientGone:
            pass
        except BaseException as error:
            self._put(error)

    async def next(self) -> str | dict[str, Any]:
        piece = await self._pieces.get()
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def _say(self, text: str) -> None:
        if self.is_unwanted.is_set():
            raise ClientGone
        self._put(text)

    def _put(self, piece: str | dict[str, Any] | BaseException) -> None:
        self.loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


async def _whole(text: _Text, request: Request) -> dict[str, Any]:
    try:
        while isinstance(piece := await text.next(), str):
            if await request.is_disconnected():
                raise Refused("nobody waits for the text", 499)
        return piece
    finally:
        text.is_unwanted.set()


async def _events(text: _Text, head: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    def event(**content: Any) -> str:
        return f"data: {json.dumps({**head, **content})}\n\n"

    try:
        while isinstance(piece := await text.next(), str):
            yield event(choices=[_choice(0, piece)])
        yield event(choices=[_choice(0, "", piece)])
        if with_usage:
            yield event(choices=[], usage=_usage([piece]))
        yield "data: [DONE]\n\n"
    finally:
        text.is_unwanted.set()


def _choice(index: int, text: str, answer: dict[str, Any] | None = None) -> dict[str, Any]:
    reason = None if answer is None else "stop" if answer["finished"] else "length"
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _usage(answers: list[dict[str, Any]]) -> dict[str, int]:
    read, new = (sum(answer[key] for answer in answers) for key in ("prompt_tokens", "tokens"))
    return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}


def _in_fields(message: str) -> str:
    """A message of `generate` in the words of a request."""
    words = message.replace("--max-new-tokens", "max_tokens")
    return re.sub(r"--([a-z]+)(-[a-z]+)?", lambda match: match[0][2:].replace("-", "_"), words)


def _sayable(text: str | None) -> str | None:
    """Without halves of characters, which JSON may hold and UTF-8 may not."""
    return None if text is None else text.encode(errors="backslashreplace").decode()


def listen(port: int) -> socket.socket:
    """What a server on this machine's own address hears; ConfigError if the port is taken."""
    heard = socket.socket()
    heard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        heard.bind((HOST, port))
        heard.listen()
    except OSError as error:
        heard.close()
        raise ConfigError(f"--port ({port}) cannot be served: {error.strerror}; write another") from None
    return heard


def serve(app: FastAPI, heard: socket.socket) -> None:
    """Answers until SIGINT or SIGTERM."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=END_TIMEOUT)
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    uvicorn.Server(config).run(sockets=[heard])


def _is_news(record: logging.LogRecord) -> bool:
    """Not that a request ended with the server."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
