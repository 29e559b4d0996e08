"""/v1/files: documents are uploaded once, read into the model once, and asked many times."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from starlette.responses import FileResponse

from .answers import reading_chunks
from .errors import too_long
from .generate import Reading
from .service import ERRORS, Service
from .stream import EventStream

MOST_PARAGRAPHS = 500


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/files", responses=ERRORS)
    library = service.library

    @routes.post("")
    async def upload_file(
        file: Annotated[UploadFile, File()], purpose: Annotated[str, Form(max_length=64)] = "user_data"
    ) -> Any:
        """Store a document and read its text. The answer says how many tokens it has and whether it fits."""
        async with service.uploads:
            known = await asyncio.to_thread(library.add, file.file, file.filename or "document", purpose)
        return service.file_record(known)

    @routes.get("")
    async def list_files(
        purpose: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: Annotated[str | None, Query(max_length=64)] = None,
        order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    ) -> Any:
        """The stored documents, the newest first."""
        found = sorted(library.about.values(), key=lambda known: (known.created_at, known.id), reverse=order == "desc")
        found = [known for known in found if purpose is None or known.purpose == purpose]
        if after is not None:
            place = next((n for n, known in enumerate(found) if known.id == after), len(found))
            found = found[place + 1 :]
        rows = [service.file_record(known) for known in found[:limit]]
        return {
            "object": "list", "data": rows, "has_more": len(found) > limit,
            "first_id": rows[0]["id"] if rows else None, "last_id": rows[-1]["id"] if rows else None,
        }  # fmt: skip

    @routes.get("/{file_id}")
    async def retrieve_file(file_id: str) -> Any:
        """What is known of a document, and whether the model has read it."""
        return service.file_record(library.get(file_id))

    @routes.delete("/{file_id}")
    async def delete_file(file_id: str) -> Any:
        """Forget a document."""
        await asyncio.to_thread(library.delete, file_id)
        service.prompts.forget(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    @routes.get("/{file_id}/content", response_class=FileResponse)
    async def file_content(file_id: str) -> Any:
        """The file as it was uploaded; never as something a browser would show."""
        return FileResponse(
            library.source(file_id), media_type="application/octet-stream", filename=library.get(file_id).filename
        )

    @routes.get("/{file_id}/paragraphs")
    async def file_paragraphs(
        file_id: str,
        first: Annotated[int, Query(ge=1, le=2**31)] = 1,
        count: Annotated[int, Query(ge=1, le=MOST_PARAGRAPHS)] = 100,
        at: Annotated[int | None, Query(ge=0, le=2**31, description="Begin near this character instead.")] = None,
    ) -> Any:
        """The document's text by paragraphs, with pages and character offsets."""
        document = await asyncio.to_thread(library.document, file_id)
        if at is not None:
            first = max(1, document.paragraph_at(at).number - count // 4)
        rows = [
            {
                "number": paragraph.number, "page": paragraph.page, "start": paragraph.start, "end": paragraph.end,
                "level": paragraph.level, "heading": list(paragraph.heading), "text": paragraph.text,
            }
            for paragraph in document.paragraphs[first - 1 : first - 1 + count]
        ]  # fmt: skip
        return {
            "object": "list", "data": rows, "total": len(document.paragraphs), "pages": document.pages,
            "unit": document.unit,
        }  # fmt: skip

    @routes.post("/{file_id}/read")
    async def read_file(file_id: str, request: Request) -> Any:
        """Read a document into the model now, so that questions need not wait: a stream of prompt_progress."""
        known = library.get(file_id)
        beginning = await asyncio.to_thread(service.prompts.usual_beginning, (file_id,))
        if len(beginning) >= service.window:
            raise too_long(len(beginning), 0, service.window, service.model, False)
        keeping = service.settings.keeping
        work = Reading(beginning, service.planned(len(beginning)), known.filename, keeping)
        running = service.run(request, None, [work])
        done = {"object": "file.reading", "id": file_id, "status": "ready"}
        return EventStream(
            reading_chunks(running, lambda: done | {"file": service.file_record(known)}),
            service.settings.keep_alive,
            running.cancel,
        )

    return routes
