"""The HTTP interface: OpenAI's, with documents. docs/api.md describes it; /openapi.json is made from the routes."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from .. import __version__
from ..errors import UserError
from ..inference.engine import Engine
from . import completion_routes, file_routes
from .errors import JSON, ApiError, invalid
from .guard import Guard
from .library import Library
from .metrics import Metrics
from .schemas import ChatRequest, CompletionRequest
from .service import Service, Settings
from .worker import Worker

STATIC = Path(__file__).parent / "static"


def create_app(engine: Engine, worker: Worker, library: Library, settings: Settings | None = None) -> FastAPI:
    """The application. Its end does not stop the worker: who made it does."""
    settings = settings or Settings()
    metrics = Metrics()
    service = Service(engine, worker, library, settings, metrics)
    app = FastAPI(
        title="longverse", version=__version__, docs_url=None, redoc_url=None, generate_unique_id_function=_operation
    )
    app.add_middleware(
        Guard, api_key=settings.api_key, hosts=settings.hosts, max_body=settings.max_body,
        max_upload=settings.max_upload, metrics=metrics,
    )  # fmt: skip
    _handle_errors(app)
    app.include_router(completion_routes.router(service))
    app.include_router(file_routes.router(service))
    _add_own_routes(app, service)
    return app


def _operation(route: APIRoute) -> str:
    return route.name


def _handle_errors(app: FastAPI) -> None:
    known = set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def users(request: Request, error: Exception) -> Response:
        return ApiError(400, str(error), code="invalid_value").response()

    async def schema(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return invalid(list(error.errors()), known).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ApiError):  # raised while the framework read the body
            return error.__cause__.response()
        said = {
            400: "The body cannot be read: send valid JSON in UTF-8, or to /v1/files a form with one file.",
            404: "There is nothing at this address.",
            405: "This address does not take that method.",
        }
        message = said.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    async def defect(request: Request, error: Exception) -> Response:
        return ApiError(500, f"The server failed on this request ({type(error).__name__}).").response()

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(UserError, users)
    app.add_exception_handler(RequestValidationError, schema)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, defect)


def _add_own_routes(app: FastAPI, service: Service) -> None:
    worker = service.worker
    page = (STATIC / "index.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> Any:
        """Whether the server takes work. 503 while it stops."""
        with_work = {"status": "stopping" if worker.stopping else "ok", "model": service.model, "version": __version__}
        return JSON(with_work, 503 if worker.stopping else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Any:
        """Prometheus' text format."""
        sessions = worker.sessions
        gauges: dict[str, float] = {
            "longverse_requests_waiting": len(worker.waiting),
            "longverse_requests_active": len(worker.active),
            "longverse_sessions": len(sessions.entries),
            "longverse_session_bytes": sessions.used_bytes,
            "longverse_documents": len(service.library.about),
            "longverse_window_tokens": service.window,
            "longverse_memory_bytes": resident_bytes(),
            "longverse_uptime_seconds": round(time.time() - service.started, 1),
        }
        counters: dict[str, float] = {"longverse_sessions_evicted_total": sessions.evicted}
        text = await asyncio.to_thread(service.metrics.render, gauges, counters)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Any:
        return HTMLResponse(page, headers={"Cache-Control": "no-cache"})

    app.mount("/static", Static(directory=STATIC), name="static")


class Static(StaticFiles):
    """The page's files, asked for anew after an update; unchanged ones cost an empty answer."""

    def file_response(self, *arguments: Any, **more: Any) -> Response:
        response = super().file_response(*arguments, **more)
        response.headers["Cache-Control"] = "no-cache"
        return response


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)
