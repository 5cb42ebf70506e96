"""Weights for both tests of the bench."""

from pathlib import Path

import pytest
from transformers import Dinov2Config, Dinov2Model

from nanovlm.bench.models import LANGUAGE_MODEL, VISION_ENCODER
from tests.reference.models import byte_pair, qwen, save


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders in the hub's format with random weights; as published, patches have 14 pixels, so
    that 224 × 224 pixels are 256 visual tokens."""
    folder = tmp_path_factory.mktemp("weights")
    save(
        Dinov2Model(
            Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=70)
        ),
        folder / VISION_ENCODER,
        seed=0,
    )
    tokenizer = byte_pair(folder / LANGUAGE_MODEL)
    qwen(
        folder / LANGUAGE_MODEL,
        vocab_size=len(tokenizer) + 1,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    return folder
