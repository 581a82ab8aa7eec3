"""What the front makes of vLLM's answers: the adapter's name as the model, and no placeholder in what is counted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .catalog import Served

_DATA = b"data:"


@dataclass(frozen=True)
class Answered:
    """An adapter's request, for its answers.

    Attributes:
        adapter: whose request it is.
        prompts: how many prompts it has.
        streamed: whether it is answered in chunks.
    """

    adapter: Served
    prompts: int = 1
    streamed: bool = False

    def correct(self, answer: Any) -> Any:
        """An answer, or a chunk of a streamed one, as the adapter's own; changed in place.

        Examples:
            >>> from prefixcore.serving.catalog import Served
            >>> from prefixcore.serving.front_answers import Answered
            >>> answered = Answered(Served("capitals", "0" * 64, num_virtual_tokens=20))
            >>> usage = {"prompt_tokens": 23, "completion_tokens": 4, "total_tokens": 27}
            >>> answered.correct({"model": "base", "usage": usage})["usage"]
            {'prompt_tokens': 3, 'completion_tokens': 4, 'total_tokens': 7}
        """
        if not isinstance(answer, dict):
            return answer
        # Events of a stream of OpenAI's Responses, and of Anthropic's Messages, hold what there is of the answer.
        for holder in (answer, answer.get("response"), answer.get("message")):
            if isinstance(holder, dict):
                self._correct(holder)
        return answer

    def _correct(self, answer: dict[str, Any]) -> None:
        virtual = self.adapter.num_virtual_tokens
        if "model" in answer:
            answer["model"] = self.adapter.name
        choices = [choice for choice in answer.get("choices") or () if isinstance(choice, dict)]
        for holder in (answer, *choices):
            ids = holder.get("prompt_token_ids")
            if isinstance(ids, list):
                holder["prompt_token_ids"] = ids[virtual:]
        usage = answer.get("usage")
        if isinstance(usage, dict):
            # A chunk with choices counts the tokens of one prompt; the last chunk, and a whole answer, those of all.
            _count_less(usage, virtual if self.streamed and choices else virtual * self.prompts)

    def event(self, line: bytes) -> bytes:
        """A line of a stream of server-sent events, with the JSON in it corrected."""
        if not line.startswith(_DATA):
            return line
        try:
            answer = json.loads(line[len(_DATA) :])
        except ValueError:  # the last line says [DONE]
            return line
        return _DATA + b" " + to_json(self.correct(answer))


def _count_less(usage: dict[str, Any], placeholders: int) -> None:
    """Takes the placeholders out of what is counted, whichever interface counts."""
    if "total_tokens" not in usage:  # Messages: cached tokens stand beside the others
        cached = usage.get("cache_read_input_tokens") or 0
        _less(usage, "cache_read_input_tokens", placeholders)
        _less(usage, "input_tokens", max(0, placeholders - cached))
        return
    for name in ("prompt_tokens", "input_tokens", "total_tokens"):
        _less(usage, name, placeholders)
    for details in (usage.get("prompt_tokens_details"), usage.get("input_tokens_details")):
        if isinstance(details, dict):
            _less(details, "cached_tokens", placeholders)
            for name in ("input_tokens_per_turn", "cached_tokens_per_turn"):
                if isinstance(turns := details.get(name), list) and turns:
                    details[name] = [max(0, turns[0] - placeholders), *turns[1:]]


def _less(counts: dict[str, Any], name: str, by: int) -> None:
    if isinstance(counts.get(name), int):
        counts[name] = max(0, counts[name] - by)


class Lines:
    """Whole lines of a stream that comes in pieces of any size."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes, *, last: bool = False) -> list[bytes]:
        """The lines that are whole now, each without its line break; with `last` also what is left."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if last and self._rest:
            lines.append(self._rest)
            self._rest = b""
        return lines


def to_json(value: Any) -> bytes:
    """JSON as vLLM's server writes it: without white space, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="surrogatepass")
