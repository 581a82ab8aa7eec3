"""Which requests may have which prefix: the scheduler's side, which sees a request before anything is computed of it.

A request that names an adapter is *admitted*, with P, or *refused*, with a reason. In both cases tokens in front of it
are declared to come from outside: P of them, or one. vLLM then sets the request aside until a worker reports that they
are there, or that they cannot be had, in which case it ends that request with an error and nothing is computed of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..adapters import AdapterError
from .catalog import Catalog, Served
from .engine_prompt import IMAGES
from .salt import SCHEME, parse_salt
from .usage import AdapterUsage, Usage

logger = logging.getLogger("vllm.prefixcore")


@dataclass(frozen=True)
class Load:
    """A prefix that a worker writes into a request's blocks.

    Attributes:
        request_id: the request's.
        adapter: whose it is.
        start, stop: which of its virtual tokens; those before are in blocks that were cached.
        blocks: the blocks of the request, from its first token on, in each group of layers.
    """

    request_id: str
    adapter: Served
    start: int
    stop: int
    blocks: list[list[int]]


@dataclass
class Step:
    """What the workers are told with one step.

    Attributes:
        loads: prefixes to write.
        refused: requests that end with an error.
        leaked: blocks of requests that were scheduled without their prefix, against all that was declared.
    """

    loads: list[Load] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    leaked: list[int] = field(default_factory=list)


@dataclass
class _Verdict:
    """What was decided of a request; `reason` is why it is refused, and `served` is what it gets if not."""

    served: Served | None = None
    reason: str = ""
    first_block: int | None = None


class Admission:
    """Decides of each request once, when it arrives.

    Args:
        catalog: the adapters that there are.
        placeholder: the token that stands for a virtual one.
    """

    def __init__(self, catalog: Catalog, placeholder: int) -> None:
        self.catalog, self.placeholder = catalog, placeholder
        self._verdicts: dict[str, _Verdict] = {}
        self._step = Step()
        self._leaking: set[str] = set()
        self._usage = Usage()

    def arrived(self, request: Any) -> None:
        """A new request: vLLM's `Request`."""
        verdict = self._verdict(request)
        if verdict is not None and verdict.reason:
            # vLLM asks no connector about a request that must not read caches, and would compute its placeholders.
            request.skip_reading_prefix_cache = False

    def external_tokens(self, request: Any, computed: int) -> int:
        """How many tokens come from outside, after `computed` that are in cached blocks."""
        verdict = self._verdict(request)
        if verdict is None:
            return 0
        return 1 if verdict.served is None else max(0, verdict.served.num_virtual_tokens - computed)

    def allocated(self, request: Any, blocks: Sequence[Sequence[int]], external: int) -> None:
        """A request has its blocks, in each group of layers, and `external` of its tokens are expected in them."""
        verdict = self._verdict(request)
        if verdict is None:
            return
        verdict.first_block = blocks[0][0] if blocks[0] else None
        if external == 0:
            return
        served = verdict.served
        if served is None:
            self._step.refused.append(request.request_id)
            return
        stop = served.num_virtual_tokens
        of_each_group = [list(each) for each in blocks]
        self._step.loads.append(Load(request.request_id, served, stop - external, stop, of_each_group))

    def scheduled(self, request_id: str, computed: int) -> None:
        """A request computes its next tokens after `computed` that it has: a second look at what was declared."""
        verdict = self._verdicts.get(request_id)
        if verdict is None:
            return
        served = verdict.served
        if served is not None and computed >= served.num_virtual_tokens:
            return
        if request_id not in self._leaking:
            logger.error(
                "prefixcore: request %s for %s was scheduled without its prefix (%d tokens of it); it is "
                "ended. Please report this: vLLM has a way to schedule requests that this connector does not know",
                request_id,
                "an adapter that it cannot have" if served is None else f"the adapter {served.name!r}",
                computed,
            )
        self._leaking.add(request_id)

    def take_step(self) -> Step:
        """What has gathered since the last step."""
        step, self._step = self._step, Step()
        for request_id in self._leaking:
            block = self._verdicts[request_id].first_block
            if block is not None:
                step.leaked.append(block)
        return step

    def finished(self, request: Any) -> None:
        """A request has ended, in whatever way."""
        verdict = self._verdicts.pop(request.request_id, None)
        self._leaking.discard(request.request_id)
        if verdict is None:
            return
        if verdict.served is None:
            self._usage.refused += 1
            return
        used = AdapterUsage(
            requests=1,
            failed=int(str(request.get_finished_reason()) == "error"),
            prompt_tokens=request.num_prompt_tokens - verdict.served.num_virtual_tokens,
            generation_tokens=request.num_output_tokens,
            seconds=[max(0.0, time.time() - request.arrival_time)],
        )
        self._usage.add(verdict.served.name, used)

    def take_usage(self) -> Usage:
        """What adapters were used for since this was last asked."""
        usage, self._usage = self._usage, Usage()
        return usage

    def _verdict(self, request: Any) -> _Verdict | None:
        """What is decided of a request; None: it names no adapter."""
        salt = request.cache_salt
        if not salt or not salt.startswith(SCHEME):
            return None
        known = self._verdicts.get(request.request_id)
        if known is None:
            known = self._verdicts[request.request_id] = self._decide(request)
            if known.reason:
                logger.error("prefixcore: request %s is refused: %s", request.request_id, known.reason)
        return known

    def _decide(self, request: Any) -> _Verdict:
        try:
            salt = parse_salt(request.cache_salt)
            assert salt is not None
            served = self.catalog.look_up(salt.name, salt.digest)
        except (AdapterError, ValueError) as error:
            return _Verdict(reason=str(error))
        except Exception as error:  # whatever it is, it is this request's alone: raised here it would end the server
            logger.exception("prefixcore: request %s", request.request_id)
            return _Verdict(reason=f"{type(error).__name__}: {error}")
        reason = refusal(request, served.num_virtual_tokens, self.placeholder, self.catalog.no_images)
        return _Verdict(reason=f"adapter {salt.name!r}: {reason}") if reason else _Verdict(served)


def refusal(request: Any, num_virtual_tokens: int, placeholder: int, no_images: str | None = None) -> str:
    """Why a request cannot have a prefix of P virtual tokens; empty: it can.

    Args:
        request: vLLM's `Request`.
        num_virtual_tokens: P.
        placeholder: the token that has to stand in front, P times.
        no_images: why the prompt may hold no images; None: it may.
    """
    sampling = request.sampling_params
    if request.pooling_params is not None or sampling is None:
        return "a prefix is for generation, and this request is for a pooling task"
    if sampling.prompt_logprobs is not None or getattr(sampling, "prompt_logprob_token_ids", None) is not None:
        return (
            "log-probabilities of the prompt (`prompt_logprobs`, or `echo` with `logprobs`) make vLLM compute the "
            "placeholders as real tokens, without the prefix: leave them out"
        )
    if request.skip_reading_prefix_cache:
        return "`skip_reading_prefix_cache` would leave the prefix out: leave it out"
    ids = request.prompt_token_ids
    if ids is None or request.prompt_embeds is not None or getattr(request, "prompt_is_token_ids", None) is not None:
        return "the prompt has to be token ids, and this one holds embeddings"
    media = request.mm_features or ()
    if media and no_images is not None:
        return f"the prompt holds images: {no_images}"
    if any(each.modality != IMAGES for each in media):
        return "the prompt holds audio or video, which was not compared with transformers behind a prefix"
    if any(each.mm_position.offset < num_virtual_tokens for each in media):
        return "images have to stand behind the placeholders: their places are counted without them"
    if request.lora_request is not None:
        return "the adapter was trained for the bare model, and this request also asks for a LoRA"
    if getattr(request, "resumable", False):
        return "a request whose prompt arrives in pieces cannot have a prefix"
    if len(ids) < num_virtual_tokens + 1:
        return (
            f"the prompt has {len(ids)} tokens: expected {num_virtual_tokens} placeholders and at least one real token"
        )
    found = next((i for i, token in enumerate(ids) if token != placeholder), len(ids))
    if found < num_virtual_tokens:
        return (
            f"the prompt has to begin with the placeholder {placeholder}, {num_virtual_tokens} times: expected it at "
            f"position {found}, got {ids[found]}"
        )
    if found > num_virtual_tokens:
        return (
            f"the prompt begins with the placeholder {placeholder} more than {num_virtual_tokens} times, and those "
            "behind the prefix would be read as text; where real prompts begin with it, choose another `placeholder`"
        )
    return ""
