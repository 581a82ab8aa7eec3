"""A tiny model whose answers depend on what stands before them, and a few prompts."""

from __future__ import annotations

import pytest
import torch

from prefixcore.distill import Prompt
from tests import tiny

TEXT = "France -> Paris\nJapan -> Tokyo\nPeru -> Lima\n"

OWN_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}[system]Be nice.<end>{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""A chat template that writes a system message of its own where none is given."""


@pytest.fixture
def model():
    """Weights of five times their usual size, so that every token has a say."""
    result = tiny.model()
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if "norm" not in name:
                parameter.mul_(5)
    return result


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def prompts():
    """Forty of two letters, one in two with a right answer."""
    texts = [f"{a}{b} ->" for a in "abcde" for b in "stuvwxyz"]
    return [Prompt(text, " x" if i % 2 else None, f"prompt {i}") for i, text in enumerate(texts)]
