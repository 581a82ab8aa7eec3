"""What virtual tokens start from where nobody says: some of the examples to train on, the best of a few draws."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .limits import is_too_long, learned_positions, stated_positions
from .output import say

if TYPE_CHECKING:
    from ..training import Example, TokenizedExample

SAID = (
    "starting from some of the examples to train on; the adapter holds them as init_text (--init vocab: none). "
    "A sentence that says what is asked for, and two examples, start better if you can write them: --init-text"
)
FEWEST_PROBES = 8
"""With fewer examples outside the texts, all of them are what the texts are tried on."""

TEMPLATE = 256
"""Bytes that a tokenizer may put around an example. No token is less than one of them."""

CHAT_TEMPLATE = 4096
"""Bytes that a chat template may put around a conversation, such as what it says of tools."""


def most_start_tokens(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, examples: Sequence[Example]
) -> int | None:
    """How many tokens a text of examples may fill, so that the model has positions for all of them behind it.

    None: as many as usual, or as many as the arguments say. Where examples that are too long are left out
    (`--skip-too-long`), the text is not cut for them.

    Raises:
        DataError: an example that the tokenizer cannot encode.
    """
    from ..training.starting import NUM_VIRTUAL_TOKENS, most_tokens

    if not _is_to_be_made(arguments) or arguments.num_virtual_tokens is not None:
        return None
    learned = learned_positions(model)
    positions = stated_positions(model) if learned is None and arguments.max_length is None else learned
    if positions is None:
        return None
    lengths, around = [], CHAT_TEMPLATE if arguments.chat else TEMPLATE
    for each in () if arguments.skip_too_long else examples:
        text = each.prompt + each.completion
        size = len(text.encode("utf-8", "surrogatepass"))
        if size + around > positions - NUM_VIRTUAL_TOKENS and not is_too_long(text, positions):
            lengths.append(each.to_ids(tokenizer, arguments.end).length)
    return most_tokens(positions, lengths)


class Start:
    """The configuration to train from: the one that was given, or one of several with a text of training examples.

    Args:
        arguments: of `train` or `tune`.
        config: what they make; None: an adapter is there to go on with.
        training: the examples to train on.
        tokenizer: the model's.
        tokens: P; None: that of the arguments, or what the examples need.
        most: how many tokens the examples may fill where P is not said; None: as many as usual.

    Raises:
        DataError: an example that the tokenizer cannot encode.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        config: Any,
        training: Sequence[Example],
        tokenizer: Any,
        tokens: int | None = None,
        most: int | None = None,
    ):
        from ..training.starting import DRAWS, NUM_VIRTUAL_TOKENS, starting_text

        self.tokenizer = tokenizer
        self.configs = [config]
        self.is_made = False
        if config is None or not _is_to_be_made(arguments):
            return
        most = most or NUM_VIRTUAL_TOKENS
        tokens = tokens or arguments.num_virtual_tokens
        end, seed = arguments.end, arguments.seed
        drawn = (
            starting_text(training, tokenizer, tokens, end=end, seed=seed + draw, most=most) for draw in range(DRAWS)
        )
        if texts := [text for text in dict.fromkeys(drawn) if text]:
            self.is_made = True
            self.configs = [
                dataclasses.replace(config, init="text", init_text=text, num_virtual_tokens=tokens) for text in texts
            ]

    @property
    def longest(self) -> Any:
        """The configuration with the most virtual tokens, for which there must be room."""
        return max(self.configs, key=self._length) if self.is_made else self.configs[0]

    def _length(self, config: Any) -> int:
        return len(self.tokenizer(config.init_text)["input_ids"])

    def best(self, model: Any, training: Sequence[Example], ids: Sequence[TokenizedExample]) -> Any:
        """The configuration that does best untrained, on examples outside the texts as far as there are some.

        Args:
            model: the model.
            training: the examples to train on, in the order of the data.
            ids: the same, tokenized.
        """
        from ..training import best_start
        from ..training.starting import beginning, in_turns

        if not self.is_made:
            return self.configs[0]
        known = dict(zip(map(id, training), ids, strict=True))
        order = list(in_turns(training, 0))
        begins = {id(each): beginning(each, known[id(each)], self.tokenizer) for each in order}
        outside = [each for each in order if not any(begins[id(each)] in config.init_text for config in self.configs)]
        probes = outside if len(outside) >= FEWEST_PROBES else order
        return best_start(model, self.tokenizer, self.configs, [known[id(each)] for each in probes])


def say_what_a_prefix_leaves_out(model: Any, config: Any) -> None:
    """Says that a prefix which starts from a text is not all that the text is to this model."""
    from ..hf.attention.discover import remembering_layers
    from ..hf.families import text_config

    if config is None or config.method != "prefix" or config.init not in ("text", "vocab"):
        return
    if kinds := remembering_layers(text_config(model)):
        say(
            f"the model has layers of {', '.join(kinds)}, which no prefix reaches: what they remember of the text that "
            "it starts from is not in it. A soft prompt (--method prompt) passes all layers and starts as its text acts"
        )


def _is_to_be_made(arguments: argparse.Namespace) -> bool:
    """Whether nobody says what to start from."""
    return arguments.init is None and arguments.init_text is None
