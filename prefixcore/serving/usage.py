"""Which adapter was used how much: requests, tokens and seconds, from one step of vLLM's to its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class AdapterUsage:
    """What one adapter was used for.

    Attributes:
        requests: how many have ended.
        failed: those of them that ended with an error.
        prompt_tokens: of the prompts of these requests, without virtual tokens.
        generation_tokens: of their answers.
        seconds: of each of them, from its arrival to its end.
    """

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, other: AdapterUsage) -> None:
        """Counts another's as well."""
        self.requests += other.requests
        self.failed += other.failed
        self.prompt_tokens += other.prompt_tokens
        self.generation_tokens += other.generation_tokens
        self.seconds += other.seconds


@dataclass
class Usage:
    """What was used since it was last asked for.

    Attributes:
        adapters: by name.
        refused: requests that named an adapter which they could not have.

    Examples:
        >>> from prefixcore.serving.usage import AdapterUsage, Usage
        >>> usage = Usage()
        >>> usage.add("capitals", AdapterUsage(1, prompt_tokens=4, generation_tokens=2, seconds=[0.5]))
        >>> usage.add("capitals", AdapterUsage(1, prompt_tokens=5, generation_tokens=2, seconds=[0.25]))
        >>> Usage.from_dict(usage.to_dict()).adapters["capitals"]
        AdapterUsage(requests=2, failed=0, prompt_tokens=9, generation_tokens=4, seconds=[0.5, 0.25])
        >>> usage.summary()
        {'adapters': 1, 'requests': 2, 'prompt tokens': 9, 'generation tokens': 4, 'refused': 0}
    """

    adapters: dict[str, AdapterUsage] = field(default_factory=dict)
    refused: int = 0

    def add(self, name: str, used: AdapterUsage) -> None:
        """Counts what an adapter was used for."""
        self.adapters.setdefault(name, AdapterUsage()).add(used)

    def merge(self, other: Usage) -> None:
        """Counts another interval's."""
        for name, used in other.adapters.items():
            self.add(name, used)
        self.refused += other.refused

    def __bool__(self) -> bool:
        return bool(self.adapters or self.refused)

    def __iter__(self) -> Iterator[tuple[str, AdapterUsage]]:
        return iter(self.adapters.items())

    def summary(self) -> dict[str, int]:
        """One line of a log."""
        used = list(self.adapters.values())
        return {
            "adapters": len(used),
            "requests": sum(each.requests for each in used),
            "prompt tokens": sum(each.prompt_tokens for each in used),
            "generation tokens": sum(each.generation_tokens for each in used),
            "refused": self.refused,
        }

    def to_dict(self) -> dict[str, Any]:
        """As it goes from process to process."""
        return {"adapters": {name: vars(used) for name, used in self}, "refused": self.refused}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Usage:
        """From what `to_dict` made, which vLLM hands to several readers: what is counted here does not change it."""
        usage = cls(refused=data.get("refused", 0))
        for name, used in data.get("adapters", {}).items():
            usage.add(name, AdapterUsage(**used))
        return usage
