"""One tiny Llama and one tiny GPT-2 for all tests; nobody changes them."""

from __future__ import annotations

import pytest

from .models import MODELS, SHAPES, make_model


@pytest.fixture(scope="session")
def models():
    return {name: make_model(name) for name in MODELS}


@pytest.fixture(params=MODELS)
def model_and_shapes(request, models):
    return models[request.param], SHAPES[request.param]


@pytest.fixture
def llama(models):
    return models["llama"]
