"""Errors as OpenAI's interface words them, so that every client library raises its own exception with our message."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: what was expected, what came and how to mend it.
        param: the field of the request that is at fault.
        code: a word for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The answer's JSON.

        Examples:
            >>> from prefixcore.serving.openai_errors import Refusal
            >>> Refusal("no", param="echo").body()["error"]["type"]
            'invalid_request_error'
        """
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def error_message(body: Any) -> str | None:
    """The message in an error's JSON, as OpenAI, vLLM or another server words it; None: there is none.

    Examples:
        >>> from prefixcore.serving.openai_errors import error_message
        >>> error_message({"error": {"message": "no such model"}})
        'no such model'
    """
    if not isinstance(body, dict):
        return None
    found = body.get("error", body)
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail")
    return found if isinstance(found, str) and found else None
