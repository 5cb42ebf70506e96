"""The shipped model, loaded once, and a server of it."""

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="python -m pip install -r requirements-web.txt")

import torch

from nanovlm.hub.models import load_model
from nanovlm.model.vlm import VisionLanguageModel
from tests.serve.serving import ASSETS, Served, served


@pytest.fixture(scope="session")
def model() -> VisionLanguageModel:
    return load_model(ASSETS / "tiny-vlm", torch.float32)


@pytest.fixture(scope="module")
def server(model) -> Iterator[Served]:
    with served(model) as running:
        yield running
        running.wait_for_places(0)
