"""The shipped model, loaded once, and a server of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanovlm.hub.models import load_model
from nanovlm.model.vlm import VisionLanguageModel

TINY = Path(__file__).parents[2] / "nanovlm/assets/tiny-vlm"


@pytest.fixture(scope="session")
def model() -> VisionLanguageModel:
    return load_model(TINY, torch.float32)


@pytest.fixture(scope="module")
def server(model) -> Iterator:
    from tests.serve.serving import served  # which needs the extra packages

    with served(model) as running:
        yield running
        running.wait_for_places(0)
