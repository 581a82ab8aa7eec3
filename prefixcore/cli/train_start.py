"""What virtual tokens start from where nobody says: some of the examples to train on, the best of a few draws."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..training import Example, TokenizedExample

SAID = (
    "starting from some of the examples to train on; the adapter holds them as init_text (--init vocab: none). "
    "A sentence that says what is asked for, and two examples, start better if you can write them: --init-text"
)
FEWEST_PROBES = 8
"""With fewer examples outside the texts, all of them are what the texts are tried on."""


class Start:
    """The configuration to train from: the one that was given, or one of several with a text of training examples.

    Args:
        arguments: of `train` or `tune`.
        config: what they make; None: an adapter is there to go on with.
        training: the examples to train on.
        tokenizer: the model's.
        tokens: P; None: that of the arguments, or what the examples need.

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
    ):
        from ..training.starting import DRAWS, starting_text

        self.tokenizer = tokenizer
        self.configs = [config]
        self.is_made = False
        if config is None or arguments.init is not None or arguments.init_text is not None:
            return
        tokens = tokens or arguments.num_virtual_tokens
        end, seed = arguments.end, arguments.seed
        drawn = (starting_text(training, tokenizer, tokens, end=end, seed=seed + draw) for draw in range(DRAWS))
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
        from ..training.starting import in_turns

        if not self.is_made:
            return self.configs[0]
        known = dict(zip(map(id, training), ids, strict=True))
        order = list(in_turns(training, 0))
        outside = [each for each in order if not any(each.prompt in config.init_text for config in self.configs)]
        probes = outside if len(outside) >= FEWEST_PROBES else order
        return best_start(model, self.tokenizer, self.configs, [known[id(each)] for each in probes])
