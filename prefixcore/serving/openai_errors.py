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


_ANTHROPIC = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


def error_body(refusal: Refusal, path: str) -> dict[str, Any]:
    """The answer's JSON as the interface at `path` words it: Anthropic's for its Messages, else OpenAI's.

    Examples:
        >>> from prefixcore.serving.openai_errors import Refusal, error_body
        >>> error_body(Refusal("no"), "/v1/messages")
        {'type': 'error', 'error': {'type': 'invalid_request_error', 'message': 'no'}}
    """
    if not path.startswith("/v1/messages"):
        return refusal.body()
    kind = _ANTHROPIC.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": refusal.message}}


def error_event(refusal: Refusal, path: str, number: int) -> dict[str, Any]:
    """The JSON of an event that ends a stream of the interface at `path`; `number`: how many events came before."""
    if not path.startswith("/v1/responses"):
        return error_body(refusal, path)
    found = {"code": refusal.code, "message": refusal.message, "param": refusal.param}
    return {"type": "error", **found, "sequence_number": number}


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
