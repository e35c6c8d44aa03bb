"""The application: endpoints in OpenAI's shapes over one service."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, File, Form, Header, Request, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from kvote.serve import answers
from kvote.serve.access import Gate, owner_of
from kvote.serve.documents import StoredDocument
from kvote.serve.errors import ApiError, add_handlers
from kvote.serve.schema import ChatRequest, CompletionRequest, DocumentRequest, ResponsesRequest
from kvote.serve.service import Running, Service

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Bytes of a body.
LARGEST_BODY = 2**26
_PAGE = Path(__file__).with_name("page.html")


def application(service: Service, *, hosts: Sequence[str] = LOOPBACK, largest_body: int = LARGEST_BODY) -> FastAPI:
    """The ASGI application. It runs the engine while it is up."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.stop()

    app = FastAPI(title="kvote", lifespan=lifespan)
    add_handlers(app)
    app.add_middleware(Gate, hosts=hosts, most=largest_body)

    @app.middleware("http")
    async def _count(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        route = request.scope.get("route")
        service.metrics.requests.labels(getattr(route, "path", "other"), response.status_code).inc()
        return response

    def owner(authorization: Annotated[str | None, Header()] = None) -> str:
        return owner_of(authorization, service.keys)

    who = Annotated[str, Depends(owner)]
    name, tokenizer = service.name, service.tokenizer

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the engine runs."""
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics", dependencies=[Depends(owner)])
    async def metrics() -> PlainTextResponse:
        """Figures for Prometheus."""
        return PlainTextResponse(service.metrics.text())

    @app.get("/v1/models", dependencies=[Depends(owner)])
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [_model(name)]}

    @app.get("/v1/models/{model:path}", dependencies=[Depends(owner)])
    async def model(model: str) -> dict[str, Any]:
        """The one model."""
        service.check_model(model)
        return _model(name)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatRequest, owner: who, http: Request) -> Any:
        """Answers a conversation."""
        running = service.chat(request, owner)
        if not request.stream:
            return await _whole(http, running, answers.chat(running, name, tokenizer, bool(request.tools)))
        usage = request.stream_options is not None and request.stream_options.include_usage
        return _stream(answers.chat_events(running, name, tokenizer, usage, request.n))

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest, owner: who, http: Request) -> Any:
        """Goes on with texts."""
        running = service.complete(request, owner)
        if not request.stream:
            return await _whole(http, running, answers.completion(running, name, tokenizer))
        usage = request.stream_options is not None and request.stream_options.include_usage
        return _stream(answers.completion_events(running, name, tokenizer, usage))

    @app.post("/v1/responses", response_model=None)
    async def responses(request: ResponsesRequest, owner: who, http: Request) -> Any:
        """Answers a conversation, in the shape of the Responses interface."""
        running = service.respond(request, owner)
        if not request.stream:
            return await _whole(http, running, answers.response(running, name))
        return _stream(answers.response_events(running, name))

    @app.post("/v1/documents")
    async def add_document(request: DocumentRequest, owner: who) -> dict[str, Any]:
        """Reads a text once; chat requests may name it as ``document``."""
        made = await service.read_document(
            request.text, request.name or "document", request.kv_method, request.system, owner
        )
        return _document(made)

    @app.post("/v1/documents/upload")
    async def upload_document(
        owner: who,
        file: Annotated[UploadFile, File()],
        kv_method: Annotated[str | None, Form()] = None,
        system: Annotated[str | None, Form()] = None,
    ) -> dict[str, Any]:
        """As ``/v1/documents``, of a UTF-8 text file."""
        try:
            text = (await file.read()).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ApiError(400, "The file is not UTF-8 text; convert it first.", param="file") from None
        made = await service.read_document(text, (file.filename or "document")[:200], kv_method, system, owner)
        return _document(made)

    @app.get("/v1/documents")
    async def documents(owner: who) -> dict[str, Any]:
        """The documents of this key."""
        return {"object": "list", "data": [_document(made) for made in service.documents.of(owner)]}

    @app.get("/v1/documents/{document}")
    async def document(document: str, owner: who) -> dict[str, Any]:
        """One of them."""
        return _document(service.documents.get(document, owner))

    @app.delete("/v1/documents/{document}")
    async def forget(document: str, owner: who) -> dict[str, Any]:
        """Forgets one of them."""
        service.documents.remove(document, owner)
        service.metrics.documents.set(len(service.documents))
        service.metrics.document_bytes.set(service.documents.total)
        return {"id": document, "object": "document", "deleted": True}

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """A page to try it."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(_PAGE.read_text("utf-8"), headers={"Content-Security-Policy": policy})

    return app


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "kvote"}


def _document(made: StoredDocument) -> dict[str, Any]:
    return {
        "id": made.id,
        "object": "document",
        "created": made.created,
        "name": made.name,
        "tokens": made.tokens,
        "kv_method": made.method,
        "bytes_held": made.nbytes,
    }


async def _whole(http: Request, running: Running, answer: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """The answer. A client that goes away before it has come cancels it."""
    answering = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ApiError(499, "The client went away.")
        return answering.result()
    finally:
        gone.cancel()
        answering.cancel()
        running.cancel()


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _stream(events: AsyncIterator[str]) -> StreamingResponse:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
