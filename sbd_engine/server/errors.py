"""What a client is told: errors in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import (
    SbdDeviceError,
    SbdError,
    SbdGrammarError,
    SbdLengthError,
    SbdMemoryError,
    SbdTypeError,
    SbdValueError,
)

_MOST_CHARACTERS = 500  # a message may quote what a client sent
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """status: HTTP's. param: the field that is wrong. code: a name for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if len(message) > _MOST_CHARACTERS:
            message = f"{message[:_MOST_CHARACTERS]} ..."
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _KINDS.get(self.status, usual),
                "param": self.param,
                "code": self.code,
            }
        }


TOO_LONG = "context_length_exceeded"  # OpenAI's code


def refused(error: SbdError, param: str, names: Mapping[str, str] | None = None) -> ApiError:
    """What an engine refuses before it starts: the client's to mend. The field is the first
    argument that the message names, else `param`; names: fields that have another name than the
    engine's argument, as an error has them."""
    fields = names or {}
    message = re.sub(r"`(\w+)`", lambda m: fields.get(m[1], m[0]), str(error))
    named = re.search(r"`(\w+)`", message)
    code = TOO_LONG if isinstance(error, SbdLengthError) else None
    return ApiError(400, message, named[1] if named else param, code)


def failed(error: Exception) -> ApiError:
    """What ended a text that had started, or one that could not start for want of memory."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (SbdMemoryError, SbdDeviceError)):
        return ApiError(
            503,
            str(error),
            code="out_of_memory" if isinstance(error, SbdMemoryError) else "device_failed",
        )
    if isinstance(error, SbdGrammarError):
        return ApiError(400, str(error))
    if isinstance(error, (SbdValueError, SbdTypeError)):
        return ApiError(500, str(error))
    return ApiError(500, "the server failed: its log says where")
