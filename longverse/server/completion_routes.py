"""/v1/chat/completions, /v1/completions and /v1/models."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from .answers import Answer, refuse_echo
from .schemas import ChatRequest, CompletionRequest
from .service import ERRORS, STREAMED, Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", responses=ERRORS)

    @routes.post("/chat/completions", responses={200: STREAMED})
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation; documents of /v1/files may stand in it as parts of type file."""
        service.check_model(body.model)
        work = await asyncio.to_thread(service.chat_work, body)
        answer = Answer(
            "chat", service.model, service.engine.tokenizer, [work],
            find_calls=bool(body.tools) and body.tool_choice != "none", return_progress=body.return_progress,
            include_usage=wants_usage(body),
            documents=tuple(dict.fromkeys(name for message in body.messages for name in message.files())),
        )  # fmt: skip
        return await service.respond(request, body, answer, [work])

    @routes.post("/completions", responses={200: STREAMED})
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """Continue texts, with no chat format around them."""
        service.check_model(body.model)
        if body.echo and body.logprobs is not None:
            raise refuse_echo()
        works = await asyncio.to_thread(service.completion_work, body)
        answer = Answer(
            "text", service.model, service.engine.tokenizer, works, return_progress=body.return_progress,
            include_usage=wants_usage(body), echo=bool(body.echo),
        )  # fmt: skip
        return await service.respond(request, body, answer, works)

    def model_record() -> dict[str, Any]:
        return {
            "id": service.model, "object": "model", "created": service.started, "owned_by": "longverse",
            "max_model_len": service.window,
        }  # fmt: skip

    @routes.get("/models")
    async def list_models() -> Any:
        """The model that is served, and its window."""
        return {"object": "list", "data": [model_record()]}

    @routes.get("/models/{model:path}")
    async def retrieve_model(model: str) -> Any:
        service.check_model(model)
        return model_record()

    return routes


def wants_usage(body: ChatRequest | CompletionRequest) -> bool:
    return bool(body.stream and body.stream_options and body.stream_options.include_usage)
