"""What a manifest says of examples: a digest by which they are known again, and how many there are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from .data import Example


def describe_data(examples: Sequence[Example], *, name: str | None = None, **facts: Any) -> dict[str, Any]:
    """The digest and the number of some examples, for `Handle.save(data=...)` or `split=...`.

    The SHA-256 of one line of JSON for each example, `{"completion": "...", "prompt": "..."}` and a line break, keys in
    this order, without white space, everything beyond ASCII escaped, the lines sorted: the same examples in another
    order, or with other fields beside them, have the same digest.

    Args:
        examples: those that were used, after a split and whatever else was left out.
        name: of the file or data set that they are from.
        facts: more that is said of them: texts, numbers, truth values.

    Examples:
        >>> from prefixcore.training import Example, describe_data
        >>> one, other = Example("Peru ->", " Lima"), Example("Norway ->", " Oslo")
        >>> describe_data([one, other], name="capitals.jsonl")["examples"]
        2
        >>> describe_data([one, other]) == describe_data([other, one])
        True
    """
    lines = sorted(
        json.dumps({"completion": example.completion, "prompt": example.prompt}, separators=(",", ":"))
        for example in examples
    )
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode("ascii"))
    named = {} if name is None else {"name": name}
    return {**named, **facts, "examples": len(examples), "sha256": digest.hexdigest()}
