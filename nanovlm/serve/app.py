"""The server's addresses: /v1/chat/completions, /v1/models and /health."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from nanovlm.serve.images import read_images
from nanovlm.serve.limits import RequestError
from nanovlm.serve.protocol import ChatRequest, Completion, read_request, usage
from nanovlm.serve.queue import AnswerQueue, Job, Question

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
ADDRESSES = {"/v1/chat/completions": "POST", "/v1/models": "GET"}
BODY_SECONDS = 30  # for sending a request
CLIENT_GONE = 499  # as nginx writes it; nobody receives it


def build_app(queue: AnswerQueue, name: str, created: int, origins: Sequence[str]) -> FastAPI:
    """The server without its page.

    name: of the model, in `model` and /v1/models; created: when it was loaded.
    origins: of other sites' pages that may ask (CORS).
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # Also where no other site may ask: its presence keeps Gradio from allowing them all.
    app.add_middleware(
        CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
    )
    entry = {"id": name, "object": "model", "created": created, "owned_by": "nanovlm"}

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def refuse_plainly(_: Request, error: HTTPException) -> Response:
        told = RequestError(str(error.detail), error.status_code)
        return JSONResponse(told.body(), told.status, error.headers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_model(model, name)
        return entry

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        job = queue.new_job()
        try:
            asked = await _read(request, job, name)
        except BaseException:
            job.close()
            raise
        job.watching = asyncio.create_task(_close_when_gone(request, job))
        if asked.stream:
            events = _events(job, Completion(name), asked, request.scope["facts"])
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        return JSONResponse(await _whole(job, Completion(name), request.scope["facts"]))

    @app.api_route("/v1", methods=METHODS)
    @app.api_route("/v1/{rest:path}", methods=METHODS)
    async def unknown(request: Request) -> Response:
        method = ADDRESSES.get(request.url.path)
        if method:
            raise RequestError(f"not allowed to {request.method} here; {method} it", 405)
        raise RequestError("there is nothing at this address", 404, code="unknown_url")

    return app


async def _read(request: Request, job: Job, name: str) -> ChatRequest:
    """Read a request and let its question wait; raises RequestError."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        # What pages of other sites may send without asking has another type.
        raise RequestError("the Content-Type has to be application/json", 415)
    limits = job.queue.limits
    try:
        async with asyncio.timeout(min(BODY_SECONDS, limits.seconds)):
            body = await request.body()
    except TimeoutError:
        raise RequestError("the request took too long to arrive", 408) from None
    except ClientDisconnect:
        raise RequestError("the client left", CLIENT_GONE) from None
    asked = await asyncio.to_thread(read_request, body, limits)
    del body
    _check_model(asked.model, name)
    longest = asked.max_new_tokens(limits.tokens)
    try:
        async with asyncio.timeout(job.seconds_left()):
            images = await read_images(asked.urls, limits)
            messages = [turn.message() for turn in asked.messages]
            await job.ask(Question(messages, images, longest, asked.sampling(), tuple(asked.stop)))
    except TimeoutError:
        raise _too_slow(job) from None
    return asked


async def _whole(job: Job, completion: Completion, facts: dict[str, Any]) -> dict[str, Any]:
    try:
        async for _ in job.texts():
            pass
    except TimeoutError:
        raise _too_slow(job) from None
    finally:
        job.close()
    assert job.answer
    _note(job, facts)
    return completion.whole(job.answer)


async def _events(
    job: Job, completion: Completion, asked: ChatRequest, facts: dict[str, Any]
) -> AsyncIterator[str]:
    """The answer as server-sent events."""

    def event(data: dict[str, Any]) -> str:
        if asked.stream_options.include_usage and "error" not in data:
            data = {"usage": None, **data}
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    try:
        yield event(completion.chunk({"role": "assistant", "content": ""}))
        async for text in job.texts():
            yield event(completion.chunk({"content": text}))
        assert job.answer
        yield event(completion.chunk({}, job.answer.finish_reason))
        if asked.stream_options.include_usage:
            yield event(completion.usage_chunk(job.answer))
        yield "data: [DONE]\n\n"
        _note(job, facts)
    except TimeoutError:
        facts["note"] = "too slow"
        yield event(_too_slow(job).body())
    except RequestError as error:
        facts["note"] = error.message
        yield event(error.body())
    finally:
        if not job.answer:
            facts.setdefault("note", "client gone")
        job.close()


async def _close_when_gone(request: Request, job: Job) -> None:
    """Give the place back when the client leaves, or its response is complete."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.close()


def _note(job: Job, facts: dict[str, Any]) -> None:
    assert job.answer
    numbers = usage(job.answer)
    facts.update(prompt=numbers["prompt_tokens"], written=numbers["completion_tokens"])


def _check_model(asked: str, name: str) -> None:
    if asked != name:
        raise RequestError(
            f"there is no model {asked[:100]!r} here; ask for {name!r}",
            404,
            "model",
            "model_not_found",
        )


def _too_slow(job: Job) -> RequestError:
    return RequestError(
        f"the answer took longer than {job.queue.limits.seconds:g} s (--timeout)",
        504,
        code="timeout",
    )
