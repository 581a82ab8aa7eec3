"""What the table of decoders says of a prefix besides that it works: packing, caches, backend, positions, PEFT's.

Each cell is what real calls do; AssertionError: two of them disagree, which nothing may.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import torch
from torch import Tensor

import prefixcore
from prefixcore import PrefixTuningConfig
from prefixcore.hf.families import text_config
from prefixcore.hf.model.signature import argument_names
from prefixcore.hf.positions.rotary import turn, why_fixed

COLUMNS = "packs", "caches", "backend", "keys turn", "text at 0", "beside PEFT's prefix"

P, NEW = 3, 4
TOLERANCE = 2e-3
ROWS = [11, 58, 33, 70, 22], [44, 9, 66]

CANNOT = "PEFT cannot"
SHARED = "refused: layers that share keys share PEFT's, too"

_FIXED = {
    "has learned positions": "learned positions",
    "has positions in its embeddings": "learned positions",
    "turn with their position by none of its": "not by a table of its own",
    "does not heed the positions": "heeds no positions",
}
"""What the page says of keys that cannot be moved, by what the refusal says."""


def attached(model: Any, init: Any = "random", **options: Any) -> Any:
    count = P if init == "random" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return prefixcore.attach(model, PrefixTuningConfig(count, init=init, seed=0, **options))


def columns(model: Any, bare: Any) -> list[str]:
    """The cells of a class, given two copies of one model to which a prefix can be attached."""
    beside = beside_peft(copy.deepcopy(bare), copy.deepcopy(bare))
    handle = attached(model)
    backend = "concatenated" if handle.backend().name == "concatenated" else "fused"
    return [packs(model), caches(model, bare), backend, keys_turn(bare), text_at_0(model, bare, handle), beside]


def _same(expected: Tensor, got: Tensor) -> bool:
    return bool((expected - got).float().norm() <= TOLERANCE * expected.float().norm())


def packed() -> dict[str, Any]:
    """Two sequences in one row, as `DataCollatorWithFlattening` gives them."""
    ids = torch.tensor([[*ROWS[0], *ROWS[1]]])
    positions = torch.tensor([[*range(len(ROWS[0])), *range(len(ROWS[1]))]])
    ends = torch.tensor([0, len(ROWS[0]), ids.shape[1]], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5}
    return {"input_ids": ids, "position_ids": positions, **lengths}


def packs(model: Any) -> str:
    """Whether packed sequences see the prefix and themselves alone; else the call says to pad them into rows."""
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])
        try:
            got = model(**packed()).logits[0]
        except (NotImplementedError, ValueError, TypeError):
            return "padded rows"
    assert _same(alone, got), "packed sequences see each other, and nothing says so"
    if "logits_to_keep" not in argument_names(model):
        return "padded rows"
    with torch.no_grad():
        loss = model(**prefixcore.PackedCollator()([{"input_ids": row, "labels": row} for row in ROWS])).loss
        ids = torch.tensor([ROWS[0], [*ROWS[1], 0, 0]])
        labels = torch.tensor([ROWS[0], [*ROWS[1], -100, -100]])
        padded = model(input_ids=ids, attention_mask=(labels >= 0).long(), labels=labels).loss
    assert _same(padded, loss), "packed sequences have another loss than padded ones"
    return "yes"


def _generate(model: Any, **options: Any) -> Tensor:
    """The logits [new, 1, V] of a greedy generate."""
    ids = torch.tensor([ROWS[0]])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    output = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    return torch.stack(output.logits)


def caches(model: Any, bare: Any) -> str:
    """The caches with which generate has the logits that it has without one, of those with which the bare model has."""
    found = []
    expected, bare_expected = _generate(model, use_cache=False), _generate(bare, use_cache=False)
    for name, options in (("dynamic", {}), ("static", {"cache_implementation": "static", "disable_compile": True})):
        try:
            if not _same(bare_expected, _generate(bare, **options)):
                continue
        except Exception:  # the class does not take it
            continue
        try:
            got = _generate(model, **options)
        except NotImplementedError:  # ours, and says what to do
            continue
        assert _same(expected, got), f"generates something else with a {name} cache"
        found.append(name)
    return ", ".join(found)


def keys_turn(bare: Any) -> str:
    """ "yes", or why keys cannot be moved to other positions."""
    why = why_fixed(bare)
    if why is None:
        return "yes"
    for part, words in _FIXED.items():
        if part in why:
            return words
    raise AssertionError(f"no words for: {why}")


def text_at_0(model: Any, bare: Any, handle: Any) -> str:
    """Whether a text can begin at position 0 behind a prefix, where keys that turn have to leave all as it was."""
    ids = torch.tensor([ROWS[0]])
    pairs, turns = handle.bake(), why_fixed(bare) is None
    try:
        at_0 = attached(bare, turn(bare, pairs, -P) if turns else pairs, position_offset=False)
    except NotImplementedError:  # ours, and says what to do
        return "no"
    with torch.no_grad():
        expected, got = model(input_ids=ids).logits, bare(input_ids=ids).logits
    at_0.detach()
    assert not turns or _same(expected, got), "keys that were turned act otherwise before position 0"
    return "yes"


def beside_peft(model: Any, bare: Any) -> str:
    """ "equal", or that PEFT cannot: it raises, or its prefix changes nothing."""
    ids = torch.tensor([ROWS[0]])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            without = bare(input_ids=ids).logits
            config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
            theirs = peft.get_peft_model(bare, config).eval()
            expected = theirs(input_ids=ids).logits
        except Exception:
            return CANNOT
        if _same(without, expected):
            return CANNOT
        try:
            attached(model, theirs.get_prompt_embedding_to_save("default"))
        except ValueError as error:
            if "a flat prefix for these" not in str(error):
                raise
            return "refused: PEFT's has another width"
        got = model(input_ids=ids).logits
    effect, missing = (expected - without).norm(), (expected - got).norm()
    if getattr(text_config(model), "num_kv_shared_layers", 0) and missing > TOLERANCE * effect:
        return SHARED
    assert missing <= TOLERANCE * effect, f"PEFT's prefix is {float(missing):.3g} of {float(effect):.3g} off"
    return "equal"
