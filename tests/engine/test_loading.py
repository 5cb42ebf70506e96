"""Models ready to answer: in few bits they are made of the mapped file, without a copy of it."""

import argparse

import pytest
import torch

from nanovlm.engine.loading import add_model_flags, load_for_answers
from nanovlm.engine.weight_only import WeightOnlyEmbedding, WeightOnlyLinear
from nanovlm.hub import loading
from nanovlm.hub.models import load_model, save_model
from nanovlm.hub.safetensors import save_file
from tests.reference.models import tiny_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tensors lie at odd places of its file, as in many files of the hub."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_vlm(tmp_path_factory.mktemp("parts"), tie_word_embeddings=False)
    save_model(model, folder)
    names = {f"{name}": tensor for name, tensor in model.state_dict().items()}
    (folder / "model.safetensors").unlink()
    save_file(names, folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    shifted = (header + 4).to_bytes(8, "little") + raw[8 : 8 + header] + b"    "
    (folder / "model.safetensors").write_bytes(shifted + raw[8 + header :])
    return folder


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    return parser.parse_args([*words, "--device", "cpu"])


def unaligned(model: torch.nn.Module) -> list[str]:
    named = model.named_parameters()
    return [name for name, tensor in named if tensor.data_ptr() % loading.ALIGNMENT]


def test_what_is_quantised_is_read_where_it_lies(folder, monkeypatch):
    monkeypatch.setattr(loading, "LARGE", 1)
    assert not unaligned(load_model(folder))  # copied, because products with them are faster
    assert len(unaligned(load_model(folder, aligned=False))) > 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model_is_in_the_dtype_of_its_inputs(folder, kind, dtype):
    model = load_for_answers(folder, flags("--quantize", kind, "--dtype", dtype))
    expected = getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    layers = [layer for layer in model.modules() if isinstance(layer, WeightOnlyLinear)]
    assert layers and {layer.dtype for layer in layers} == {expected}
    language_model = model.language_model
    assert isinstance(language_model.embed_tokens, WeightOnlyEmbedding)
    hidden = torch.randn(3, language_model.config.hidden_size, dtype=expected)
    head = torch.nn.functional.linear(hidden, language_model.head_weight)
    torch.testing.assert_close(language_model.logits(hidden), head, rtol=0.02, atol=0.02)
