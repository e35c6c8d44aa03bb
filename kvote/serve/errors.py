"""Errors in the shape that OpenAI's clients understand."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kvote.errors import KvoteError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered: HTTP ``status``, a sentence, and the field that was wrong."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, fallback)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status == 429 else None
        return JSONResponse(self.body, self.status, headers)


def told(error: Exception) -> ApiError:
    """The message to a client about an error that came while its request was answered."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MemoryError):
        return ApiError(503, "Memory ran out; send the request again, shorter or later.", code="out_of_memory")
    if isinstance(error, KvoteError):
        return ApiError(400, str(error))
    return ApiError(500, "The server failed to answer; its log says why.", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Every error that leaves the application has OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(KvoteError)
    async def _kvote(_: Request, error: KvoteError) -> JSONResponse:
        return told(error).response

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        message = str(first["msg"]).removeprefix("Value error, ")
        return ApiError(400, f"{where}: {message}" if where else message, param=where or None).response

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        made = ApiError(error.status_code, str(error.detail)).response
        made.headers.update(error.headers or {})
        return made
