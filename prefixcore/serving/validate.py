"""Whether a server answers with each adapter of a registry as transformers does: a server is found out, not trusted.

It may be any with OpenAI's interface. Each check asks it over HTTP and holds what comes to a reference.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .client import ServingError
from .validate_judge import Judge, largest
from .validate_leaks import find_leaks
from .validate_lines import FAILED, PASSED, UNTESTED, UNTOLD, Line, in_words
from .validate_probes import Probes
from .validate_reference import Reference
from .validate_server import AT_ONCE, Answered, Asker, attempt


@dataclass
class Validation:
    """The checks of one server.

    Attributes:
        asker: of the server.
        reference: what is right.
        probes: the prompts of each adapter.
        digests: of each adapter.
        base: the server's name of the bare model; None: it has none, or it is not known.
        cards: what the server says of its models; None: it lists none.
        tolerance: of log-probabilities; None: by the reference's dtype.
        progress: told what is done.
    """

    asker: Asker
    reference: Reference
    probes: Mapping[str, Probes]
    digests: Mapping[str, str]
    base: str | None = None
    cards: list[dict[str, Any]] | None = None
    tolerance: float | None = None
    progress: Callable[[str], object] = lambda text: None

    def run(self) -> list[Line]:
        """All checks; what the server answers is never an exception, but a line."""
        self.judge = Judge(self.reference, self.tolerance)
        lines = list(self._unknown_model())
        served = []
        for name in self.probes:
            self.progress(f"{name}: tokens, log-probabilities, stream, chat, refusals")
            found = self._served(name)
            lines.append(found)
            if found.verdict == PASSED:
                served.append(name)
                lines += [*self._answers(name), *self._dropped(name)]
        lines += self._bare()
        self.progress("the same texts under several adapters and under none")
        lines += find_leaks(self.asker, self.judge, self.probes, served, self.base, self.cards)
        return lines

    # -- the checks

    def _unknown_model(self) -> Iterator[Line]:
        name = f"no-such-model-{secrets.token_hex(4)}"
        check, subject = "unknown model", "a name that there is not"
        try:
            self.asker.complete(name, "x")
        except ServingError as error:
            if error.status is not None and 400 <= error.status < 500:
                yield Line(check, subject, PASSED, "refused")
            else:
                yield Line(check, subject, FAILED, str(error))
            return
        yield Line(check, subject, FAILED, "it is answered: the server answers with some model, whatever is asked for")

    def _served(self, name: str) -> Line:
        cards = {card.get("id"): card for card in self.cards or ()}
        card = cards.get(name) or {}
        expected = self.digests[name]
        # A prefix that the server has baked from what lies in the folder has a digest of its own.
        stated = expected if card.get("baked_from") == expected else card.get("digest")
        numbers = {"digest": expected, "listed": None if self.cards is None else name in cards}
        if stated is not None and stated != expected:
            what = f"the server has the digest {str(stated)[:12]}, the folder {expected[:12]}"
            return Line("served", name, FAILED, what, {**numbers, "server digest": stated})
        try:
            self.asker.complete(name, self.probes[name].prompts[0])
        except ServingError as error:
            return Line("served", name, FAILED, str(error), numbers)
        how = "by this digest" if stated else "listed" if numbers["listed"] else "not listed"
        return Line("served", name, PASSED, how, numbers)

    def _answers(self, name: str) -> Iterator[Line]:
        probes = self.probes[name]
        judged, telling = [], 0
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda prompt: attempt(self.asker.complete, name, prompt), probes.prompts))
        wrong: list[str] = []
        for prompt, answer in zip(probes.prompts, answers, strict=True):
            if isinstance(answer, str):
                wrong.append(answer)
                continue
            ids = self.reference.ids(prompt)
            found = self.judge.judge(name, ids, answer, self.asker.tokens)
            judged.append(found)
            telling += not self.judge.are_equal(name, None, ids)
            if not found.is_right(self.judge.tolerance):
                whose = self.judge.whose(name, ids, answer, self.asker.tokens)
                wrong.append(f"{prompt[-30:]!r}: {in_words(found, self.judge.tolerance)}; {whose}")
        numbers = {
            "prompts": len(probes.prompts),
            "prompts from": probes.source,
            "wrong prompts": len(wrong),
            "tokens": sum(one.tokens for one in judged),
            "wrong tokens": sum(one.wrong for one in judged),
            "largest difference of log-probabilities": largest(one.largest for one in judged),
            "prompts that the adapter changes": telling,
        }
        if wrong:
            yield Line("answers", name, FAILED, wrong[0], numbers)
        elif not telling:
            what = "the adapter changes none of these prompts' answers, so that it acts cannot be seen: give --prompts"
            yield Line("answers", name, UNTOLD, what, numbers)
        else:
            yield Line("answers", name, PASSED, "", numbers)
        yield self._one("stream", name, self.asker.stream, probes.prompts[0], self.reference.ids(probes.prompts[0]))
        chat = self.reference.chat_ids(probes.prompts[0])
        if chat is None:
            yield Line("chat", name, UNTESTED, "the tokenizer has no chat template")
        else:
            yield self._one("chat", name, self.asker.chat, probes.prompts[0], chat)

    def _one(self, check: str, name: str, ask: Callable[..., Answered], prompt: str, ids: list[int]) -> Line:
        answer = attempt(ask, name, prompt)
        if isinstance(answer, str):
            return Line(check, name, FAILED, answer)
        found = self.judge.judge(name, ids, answer, self.asker.tokens)
        numbers = {"tokens": found.tokens, "wrong tokens": found.wrong}
        if found.is_right(self.judge.tolerance):
            return Line(check, name, PASSED, "", numbers)
        whose = self.judge.whose(name, ids, answer, self.asker.tokens)
        return Line(check, name, FAILED, f"{in_words(found, self.judge.tolerance)}; {whose}", numbers)

    def _dropped(self, name: str) -> Iterator[Line]:
        """What makes a server compute the prompt anew must be refused, or answered with the prefix all the same."""
        prompt = next(
            (p for p in self.probes[name].prompts if not self.judge.are_equal(name, None, self.reference.ids(p))), None
        )
        for what, options in (("echo with logprobs", {"echo": True}), ("prompt_logprobs", {"prompt_logprobs": 1})):
            if prompt is None:
                yield Line("dropped prefix", f"{name}, {what}", UNTOLD, "the adapter changes none of these answers")
                continue
            ids = self.reference.ids(prompt)
            try:
                answer = self.asker.complete(name, prompt, **options)
            except ServingError as error:
                is_refused = error.status is not None and 400 <= error.status < 500
                yield Line(
                    "dropped prefix",
                    f"{name}, {what}",
                    PASSED if is_refused else FAILED,
                    "refused" if is_refused else str(error),
                )
                continue
            if "echo" in options:  # the prompt stands before the answer, and its tokens may among the answer's
                answer = Answered(answer.text.removeprefix(prompt), finish=answer.finish)
            found = self.judge.judge(name, ids, answer, self.asker.tokens)
            if found.is_right(self.judge.tolerance):
                yield Line("dropped prefix", f"{name}, {what}", PASSED, "answered with the prefix")
            else:
                whose = self.judge.whose(name, ids, answer, self.asker.tokens)
                yield Line("dropped prefix", f"{name}, {what}", FAILED, f"answered without being right: {whose}")

    def _bare(self) -> Iterator[Line]:
        if self.base is None:
            yield Line("bare model", "-", UNTESTED, "the server lists no bare model; name it with --base")
            return
        prompts = list(dict.fromkeys(probes.prompts[0] for probes in self.probes.values()))[:5]
        for prompt in prompts:
            answer = attempt(self.asker.complete, self.base, prompt)
            ids = self.reference.ids(prompt)
            if isinstance(answer, str):
                yield Line("bare model", self.base, FAILED, answer)
                return
            found = self.judge.judge(None, ids, answer, self.asker.tokens)
            if not found.is_right(self.judge.tolerance):
                whose = self.judge.whose(None, ids, answer, self.asker.tokens)
                yield Line("bare model", self.base, FAILED, f"{in_words(found, self.judge.tolerance)}; {whose}")
                return
        yield Line("bare model", self.base, PASSED, "", {"prompts": len(prompts)})
