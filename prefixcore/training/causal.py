"""Which models examples are for: those that go on with a text."""

from __future__ import annotations

from typing import Any

TO_LEARN, TO_ANSWER = "as it has to in order to learn an example", "so it has no answers"


def check_causal(model: Any, why: str) -> None:
    """Raises NotImplementedError for a model of transformers' that does not go on with the text that it reads.

    The model of an example reads prompt and completion as one text, and learns each token from those before it. An
    encoder, or the encoder of an encoder-decoder, sees in it the token that it is to learn: its loss falls, and it has
    learned nothing. Anything that is no model of transformers' is taken to be what it has to be.
    """
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or (can_generate() and not model.config.is_encoder_decoder):
        return
    raise NotImplementedError(
        f"{type(model).__name__} does not go on with a text, {why}: expected a causal language model; train others by "
        "transformers' Trainer or a loop of your own"
    )
