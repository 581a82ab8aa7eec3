"""Which words virtual tokens are nearest to, and how little that may mean.

A soft prompt's virtual tokens are embeddings, so they are compared with the vocabulary's embeddings. A prefix's are
keys and values, which no vocabulary has. In the first attention layer, though, a token's key and value follow from the
token and its position alone: there, and nowhere else, the prefix is compared with what each token of the vocabulary
would have put in its place. In later layers they follow from a whole text, so there is no list to look them up in.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..hf.initialize import initial_ids
from ..hf.positions.rotary import turn, why_fixed
from .errors import NotMeasuredError
from .nearest import Nearest, chunks, median_best, percentiles, random_directions, sample_ids
from .progress import Progress
from .running import FrozenRun, WatchedCall
from .virtual import VirtualTokens


def vocabulary_of(model: Any, tokenizer: Any) -> int:
    """How many ids have both an embedding and a text."""
    return min(int(model.get_input_embeddings().weight.shape[0]), len(tokenizer))


def token_text(tokenizer: Any, token: int) -> str:
    """What a token is written as."""
    text: str = tokenizer.decode([token])
    return text


def nearest_to_prompt(
    model: Any, tokenizer: Any, virtual: VirtualTokens, start: list[int] | None, progress: Progress
) -> dict[str, Any]:
    """The nearest embeddings of a soft prompt's virtual tokens, by cosine."""
    assert virtual.prompt is not None
    embed: Any = model.get_input_embeddings()
    device = embed.weight.device
    size = vocabulary_of(model, tokenizer)

    def vectors(ids: Tensor) -> Tensor:
        with torch.no_grad():  # the module is called, since some families scale in it
            return embed(ids.to(device)).float()

    prompt = virtual.prompt.to(device).float()
    sample = sample_ids(size)
    found = Nearest.of(prompt)
    real = Nearest.of(vectors(sample), sample)
    noise = Nearest.of(random_directions(prompt.shape[1], device))
    norms = []
    for part in progress(chunks(size), "nearest tokens"):
        ids = torch.arange(part.start, part.stop, device=device)
        rows = vectors(ids)
        for each in (found, real, noise):
            each.see(ids, rows)
        norms.append(rows.norm(dim=1).cpu())
    at_start = None if start is None else _cosines(prompt, vectors(torch.tensor(start)))
    return {
        "compared_with": "the model's embeddings of its vocabulary",
        "vocabulary": size,
        "kinds": {"embedding": _describe(found, real, noise, tokenizer, at_start, start)},
        "start": None if start is None else [_token(tokenizer, token) for token in start],
        "norms": {
            "virtual": [float(x) for x in prompt.norm(dim=1)],
            "vocabulary": percentiles(torch.cat(norms)),
            "histogram": histogram(torch.cat(norms)),
        },
    }


def nearest_to_prefix(
    run: FrozenRun, tokenizer: Any, virtual: VirtualTokens, start: list[int] | None, progress: Progress
) -> dict[str, Any]:
    """The tokens whose key and value in the first attention layer are nearest to the prefix's, by cosine.

    Raises:
        NotMeasuredError: the prefix leaves out the first attention layer, or there a key follows from more than a
            token and its position.
    """
    if 0 not in virtual.pairs:
        raise NotMeasuredError(
            "the prefix leaves out the first attention layer, the only one in which keys and values follow from a "
            "token alone"
        )
    device = run.model.device
    size = vocabulary_of(run.model, tokenizer)
    layer = FirstLayer(run)
    layer.check_alone(size)
    first_layer = virtual.pairs[0]
    if not virtual.position_offset and why_fixed(run.model) is None:
        # The text begins at 0 and keys stand before it, where no token of the vocabulary can.
        (first_layer,) = turn(run.model, [first_layer], virtual.count, [0])
    pair = [x.permute(1, 0, 2).flatten(1).to(device).float() for x in first_layer]  # key, value: [P, Hkv * D]
    sample = sample_ids(size).to(device)
    found = [[Nearest.of(x[place : place + 1]) for place in range(virtual.count)] for x in pair]
    real = [Nearest.of(x, sample) for x in layer(sample, 0)]
    noise = [Nearest.of(random_directions(x.shape[1], device)) for x in pair]
    norms: list[list[Tensor]] = [[], []]
    for place, part in progress([(p, c) for p in range(virtual.count) for c in chunks(size)], "nearest tokens"):
        ids = torch.arange(part.start, part.stop, device=device)
        for kind, rows in enumerate(layer(ids, place)):
            found[kind][place].see(ids, rows)
            if place == 0:
                real[kind].see(ids, rows)
                noise[kind].see(ids, rows)
                norms[kind].append(rows.norm(dim=1).cpu())
    at_start: list[list[float] | None] = [None, None]
    if start is not None:
        begun = [layer(torch.tensor([token], device=device), place) for place, token in enumerate(start)]
        at_start = [_cosines(x, torch.cat([each[kind] for each in begun])) for kind, x in enumerate(pair)]
    kinds = {}
    for kind, name in enumerate(("key", "value")):
        together = Nearest(
            torch.cat([each.targets for each in found[kind]]),
            torch.cat([each.apart_from for each in found[kind]]),
            torch.cat([each.cosines for each in found[kind]]),
            torch.cat([each.ids for each in found[kind]]),
        )
        kinds[name] = _describe(together, real[kind], noise[kind], tokenizer, at_start[kind], start)
    return {
        "compared_with": "the keys and values of the vocabulary in the first attention layer, at the same position",
        "vocabulary": size,
        "kinds": kinds,
        "start": None if start is None else [_token(tokenizer, token) for token in start],
        "norms": {
            "first_layer": {
                name: {"virtual": [float(x) for x in pair[kind].norm(dim=1)], "vocabulary": percentiles(torch.cat(n))}
                for kind, (name, n) in enumerate(zip(("key", "value"), norms, strict=True))
            }
        },
    }


class FirstLayer:
    """Keys and values of single tokens in the first attention layer."""

    def __init__(self, run: FrozenRun) -> None:
        self.run = run

    def __call__(self, ids: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Key and value, [N, Hkv * D] and [N, Hkv * Dv], fp32, of each token [N] by itself at a position."""
        key, value = self._read(ids[:, None], place)
        return key[:, 0], value[:, 0]

    def check_alone(self, size: int) -> None:
        """Raises NotMeasuredError if a token's key or value there also follows from the tokens before it."""
        ids = sample_ids(size, seed=2)[:8].to(self.run.model.device)
        together = self._read(ids[None], 0)
        for place, token in enumerate(ids):
            for both, alone in zip(together, self(token[None], place), strict=True):
                if not torch.allclose(both[0, place], alone[0], rtol=1e-2, atol=1e-2 * float(alone.abs().max())):
                    raise NotMeasuredError(
                        f"in {type(self.run.model).__name__} keys and values follow from the text before a token even "
                        "in the first attention layer, so no list of the vocabulary's exists"
                    )

    def _read(self, ids: Tensor, place: int) -> tuple[Tensor, Tensor]:
        seen: list[tuple[Tensor, Tensor]] = []

        def watch(call: WatchedCall) -> None:
            seen.append((call.key, call.value))
            raise _Enough

        with suppress(_Enough):
            self.run(ids, virtual=VirtualTokens(place, (), {}), watch=watch)
        key, value = (x.transpose(1, 2).flatten(2).float() for x in seen[0])
        return key, value


class _Enough(Exception):
    """The first layer has been seen; what comes after it is not computed."""


def start_ids(model: Any, config: Any, tokenizer: Any, count: int) -> list[int] | None:
    """The ids that the virtual tokens started from, where they did and it is known."""
    if config.init not in ("text", "vocab"):
        return None
    try:
        ids = initial_ids(model, config, tokenizer)
    except (ValueError, OSError):
        return None
    return ids if ids is not None and len(ids) == count else None


def histogram(values: Tensor, bins: int = 40) -> dict[str, Any]:
    """How many values are in each of equal bins from the least to the greatest."""
    low, high = float(values.min()), float(values.max())
    high = high if high > low else low + 1.0
    counts = torch.histc(values.float(), bins, low, high)
    return {"from": low, "to": high, "counts": [int(x) for x in counts]}


def _describe(
    found: Nearest, real: Nearest, noise: Nearest, tokenizer: Any, at_start: list[float] | None, start: list[int] | None
) -> dict[str, Any]:
    tokens = [
        [
            {**_token(tokenizer, int(token)), "cosine": round(float(cosine), 4)}
            for token, cosine in zip(ids, cosines, strict=True)
        ]
        for ids, cosines in zip(found.ids, found.cosines, strict=True)
    ]
    still = None
    if start is not None:
        still = sum(row[0]["id"] == token for row, token in zip(tokens, start, strict=True))
    return {
        "tokens": tokens,
        "median_cosine": median_best(found),
        "median_between_real_tokens": median_best(real),
        "median_of_random_directions": median_best(noise),
        "cosine_with_start": at_start,
        "still_nearest_to_start": still,
    }


def _token(tokenizer: Any, token: int) -> dict[str, Any]:
    return {"id": token, "text": token_text(tokenizer, token)}


def _cosines(one: Tensor, other: Tensor) -> list[float]:
    return [round(float(x), 4) for x in torch.cosine_similarity(one.float(), other.to(one.device).float(), dim=1)]
