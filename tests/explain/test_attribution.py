"""Each patch's part in a word, against autograd and finite differences, for every projector."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm.data.collate import prepare
from nanovlm.errors import NanoVLMError
from nanovlm.explain.attribution import explain
from nanovlm.inputs.chat import IMAGE, Message
from nanovlm.inputs.image import image_pixels
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.projector import PROJECTORS, ProjectorConfig
from nanovlm.model.vlm import VisionLanguageModel
from tests.reference.models import tiny_vlm
from tests.reference.scratch import scratch_vlm

SETTINGS: dict[str, dict[str, Any]] = {
    "bilinear": {"grid": 2},
    "resampler": {"num_queries": 3, "num_heads": 2},
}
TILES = ImageConfig(28, 28, fit="tiles", max_tiles=2)


def images_of(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


def ask(model: VisionLanguageModel, images: list[Image.Image]):
    """A prompt about the images, and an answer to it."""
    question = Message("user", (*[IMAGE] * len(images), "What is it?"))
    batch = prepare(model, [[question]], [images], add_generation_prompt=True)
    return batch, model.tokenizer.encode("a red ring")


def reference(model: VisionLanguageModel, images, tokens: list[int], answer: list[int]):
    """|gradient · change| of each patch of each tile, (N, P), not normalised."""
    encoder = model.vision_encoder
    pixels = torch.cat([image_pixels(image, model.config.image) for image in images])
    with torch.no_grad():
        own, blank = encoder._embed(pixels), encoder._embed(torch.zeros_like(pixels))
    vectors = own.clone().requires_grad_()
    hidden = vectors
    for block in encoder.blocks:
        hidden = block(hidden)
    prompt, _ = ask(model, images)
    ids = torch.cat((prompt.input_ids, torch.tensor([answer])), dim=1)
    patches = encoder.norm(hidden)[:, 1:]  # without the class token
    batch = dataclasses.replace(prompt, input_ids=ids, pixels=None, patches=patches)
    hidden = model.language_model.hidden_states(
        model.embed(batch), torch.ones_like(ids), groups=model.image_groups(batch)
    )
    log_probs = model.language_model.logits(hidden)[0].log_softmax(dim=-1)
    start = prompt.input_ids.shape[1] - 1
    word = torch.stack([log_probs[start + i, answer[i]] for i in tokens]).sum()
    (gradient,) = torch.autograd.grad(word, vectors)
    return (gradient * (own - blank)).abs().sum(dim=-1)[:, 1:]


@pytest.mark.parametrize("kind", PROJECTORS)
def test_parts_are_gradient_times_change_with_every_projector(kind, tmp_path):
    config = ProjectorConfig(kind, **SETTINGS.get(kind, {}))
    model, images = tiny_vlm(tmp_path, config), images_of((28, 28), (40, 20))
    prompt, answer = ask(model, images)
    words = explain(model, prompt, images, answer)
    assert [word.text for word in words] == ["a", "red", "ring"]
    for word in words:
        assert [places.shape for places in word.maps] == [(4, 4), (4, 4)]
        expected = reference(model, images, list(word.tokens), answer)
        expected = expected / expected.sum()
        torch.testing.assert_close(torch.stack(word.maps).flatten(1), expected)


def test_finite_differences_give_the_same(tmp_path):
    model, images = tiny_vlm(tmp_path).double(), images_of((28, 28))
    prompt, answer = ask(model, images)
    word = explain(model, prompt, images, answer)[1]
    assert prompt.pixels is not None
    encoder, pixels = model.vision_encoder, prompt.pixels.double()
    ids = torch.cat((prompt.input_ids, torch.tensor([answer])), dim=1)
    batch = dataclasses.replace(prompt, input_ids=ids)
    with torch.no_grad():
        change = encoder._embed(pixels) - encoder._embed(torch.zeros_like(pixels))

    @torch.no_grad()
    def log_prob(patch: int, channel: int, step: float) -> float:
        def move(module, inputs):
            moved = inputs[0].clone()
            moved[0, patch, channel] += step
            return (moved,)

        handle = encoder.blocks[0].register_forward_pre_hook(move)
        hidden = model.language_model.hidden_states(model.embed(batch))
        handle.remove()
        chances = model.language_model.logits(hidden)[0].log_softmax(dim=-1)
        start = prompt.input_ids.shape[1] - 1
        return sum(float(chances[start + i, answer[i]]) for i in word.tokens)

    parts, step = [], 1e-2
    for patch in (1, 8):  # after the class token: the first and the eighth patch
        slopes = [
            (log_prob(patch, channel, step) - log_prob(patch, channel, -step)) / (2 * step)
            for channel in range(change.shape[-1])
        ]
        parts.append(float((torch.tensor(slopes).double() * change[0, patch]).abs().sum()))
    found = word.maps[0].flatten()
    assert float(found[0] / found[7]) == pytest.approx(parts[0] / parts[1], rel=1e-2)


def test_patches_of_tiles_go_to_their_places(tmp_path):
    model, images = tiny_vlm(tmp_path, image=TILES), images_of((56, 28), (20, 20))
    prompt, answer = ask(model, images)
    word = explain(model, prompt, images, answer)[2]
    wide, square = word.maps
    assert wide.shape == (4, 8) and square.shape == (8, 8)
    parts = reference(model, images, list(word.tokens), answer)
    parts = (parts / parts.sum()).view(-1, 4, 4)  # left, right, whole; then four and the whole
    both = torch.cat((parts[0], parts[1]), dim=1) + parts[2].repeat_interleave(2, dim=1) / 2
    torch.testing.assert_close(wide, both)
    torch.testing.assert_close(square.sum(), parts[3:].sum())


def test_images_that_attend_both_ways_and_learned_queries(tmp_path):
    model, images = scratch_vlm(tmp_path), images_of((28, 28))
    prompt, answer = ask(model, images)
    (word, *_) = explain(model, prompt, images, answer)
    expected = reference(model, images, list(word.tokens), answer)
    torch.testing.assert_close(word.maps[0].flatten(), expected[0] / expected.sum())


@pytest.mark.parametrize(
    ("encoder", "whole"),
    [
        ({"class_token": False, "num_queries": 4, "output_size": 16}, {}),  # as Qwen-VL's
        ({"num_register_tokens": 2}, {"vision_layer": -2, "vision_norm": False}),
        ({"embedding_norm": True}, {"vision_layer": 0, "vision_norm": False}),
    ],
)
def test_every_vision_encoder_has_its_patches_in_their_places(encoder, whole, tmp_path):
    plain, images = tiny_vlm(tmp_path, ProjectorConfig("linear")), images_of((28, 28))
    changed = dataclasses.replace(plain.config.vision_encoder, **encoder)
    config = dataclasses.replace(plain.config, vision_encoder=changed, **whole)
    model = VisionLanguageModel(config, plain.tokenizer).eval()
    prompt, answer = ask(model, images)
    for word in explain(model, prompt, images, answer):
        assert word.maps[0].shape == (4, 4) and (word.maps[0] > 0).all()
        assert word.maps[0].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_weight_gets_a_gradient_and_all_stay_as_they_were(mode, tmp_path):
    model, images = tiny_vlm(tmp_path), images_of((28, 28))
    frozen = next(model.parameters()).requires_grad_(False)
    prompt, answer = ask(model, images)
    with mode():
        words = explain(model, prompt, images, answer)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert not model.vision_encoder.embedding_norm._forward_hooks
    assert words[0].maps[0].sum().item() == pytest.approx(1)


def test_bfloat16_is_close(tmp_path):
    model, images = tiny_vlm(tmp_path), images_of((28, 28))
    prompt, answer = ask(model, images)
    exact = explain(model, prompt, images, answer)
    close = explain(model.bfloat16(), prompt, images, answer)
    for one, other in zip(exact, close):
        assert one.probability == pytest.approx(other.probability, rel=0.1)
        torch.testing.assert_close(one.maps[0], other.maps[0], rtol=0.2, atol=0.02)


def test_probabilities_are_those_of_the_answer_with_and_without_images(tmp_path):
    model, images = tiny_vlm(tmp_path), images_of((28, 28))
    prompt, answer = ask(model, images)
    assert prompt.pixels is not None
    for word in explain(model, prompt, images, answer):
        assert 0 <= word.from_images <= 1
        for pixels, found in (
            (prompt.pixels, word.probability),
            (torch.zeros_like(prompt.pixels), word.blank),
        ):
            batch = dataclasses.replace(prompt, pixels=pixels)
            batch.input_ids = torch.cat((prompt.input_ids, torch.tensor([answer])), dim=1)
            with torch.no_grad():
                logits = model.language_model.logits(
                    model.language_model.hidden_states(model.embed(batch))
                )[0, prompt.input_ids.shape[1] - 1 :]
            chances = logits.softmax(dim=-1)
            expected = np.prod([float(chances[i, answer[i]]) for i in word.tokens])
            assert found == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_explained_is_refused(tmp_path):
    model, images = tiny_vlm(tmp_path), images_of((28, 28))
    prompt, _ = ask(model, images)
    for answer in ([], model.tokenizer.encode("!?")):
        with pytest.raises(NanoVLMError, match="has no word"):
            explain(model, prompt, images, answer)
    without, answer = ask(model, [])
    with pytest.raises(NanoVLMError, match="without an image"):
        explain(model, without, [], answer)
