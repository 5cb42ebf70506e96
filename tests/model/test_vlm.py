"""The whole model: images in the embeddings, the loss and its gradients, saving and loading."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm.data.collate import collate
from nanovlm.data.sequences import TokenSequence
from nanovlm.errors import NanoVLMError
from nanovlm.generate import Prompt, decode, generate
from nanovlm.hub.models import join_parts, load_model, parse_model_config, save_model
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IGNORED, Message
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model import attention, vlm
from nanovlm.model.attention import SEGMENT, attend
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling
from nanovlm.tokenizer import load_tokenizer
from tests.reference.models import byte_pair, dinov2, qwen, sentence_piece, tiny_vlm
from tests.reference.scratch import scratch_vlm


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> VisionLanguageModel:
    return tiny_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(params=["tied", "untied"])
def either(request: pytest.FixtureRequest, tmp_path) -> VisionLanguageModel:
    return tiny_vlm(tmp_path, tie_word_embeddings=request.param == "tied")


def make_batch(model: VisionLanguageModel) -> tuple[Batch, Tensor]:
    """Three rows with one, two and no images, padding and random positions with a label; and the
    labels as (B, T)."""
    generator = torch.Generator().manual_seed(0)
    placeholder, length = model.chat.image_token_id, model.image_length
    ids = torch.randint(300, (3, 16), generator=generator)
    ids[0, 3 : 3 + length] = placeholder
    ids[1, 0:length] = ids[1, 7 : 7 + length] = placeholder
    mask = torch.ones_like(ids)
    mask[0, 13:] = mask[2, 9:] = 0
    labelled = torch.rand(ids.shape, generator=generator) < 0.5
    labelled &= (mask > 0) & (ids != placeholder)
    labelled[:, 0] = False
    labels = torch.where(labelled, ids, IGNORED)
    image_positions = (ids == placeholder).flatten().nonzero()[:, 0]
    positions = labelled.flatten().nonzero()[:, 0]
    targets = labels.flatten()[positions]
    pixels = torch.randn(3, 3, 28, 28, generator=generator)
    return Batch(ids, mask, image_positions, positions - 1, targets, pixels), labels


@pytest.mark.parametrize("text", ["qwen", "scratch"])
def test_rows_padded_on_the_right_need_no_mask(text, model, scratch, monkeypatch):
    chosen = model if text == "qwen" else scratch
    batch, _ = make_batch(chosen)
    losses, gradients, masks = [], [], []

    def seen(*inputs):
        masks.append(inputs[3])
        return attend(*inputs)

    monkeypatch.setattr(attention, "attend", seen)
    parameters = list(chosen.parameters())
    for right_padded in (False, True):
        loss = chosen(dataclasses.replace(batch, right_padded=right_padded))
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    in_language_model = masks[len(chosen.vision_encoder.blocks) :]
    count = chosen.config.language_model.num_hidden_layers
    if text == "qwen":  # from scratch, images need the mask for attention in both directions
        assert in_language_model[-count:] == [None] * count
    assert in_language_model[0] is in_language_model[count - 1] is not None  # made once a pass
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for masked, plain in zip(*gradients):
        torch.testing.assert_close(plain, masked, rtol=1e-4, atol=1e-5)


def naive_loss(model: VisionLanguageModel, batch: Batch, labels: Tensor) -> Tensor:
    """The loss by a loop over tokens, from all logits at once and the labels shifted by one."""
    visual_tokens = iter(model.projector(model.vision_encoder(batch.pixels)[:, 1:]).flatten(0, 1))
    placeholder, table = model.chat.image_token_id, model.language_model.embed_tokens.weight
    embeddings = torch.stack(
        [
            next(visual_tokens) if token == placeholder else table[token]
            for token in batch.input_ids.flatten()
        ]
    )
    hidden_states = model.language_model.hidden_states(
        embeddings.view(*batch.input_ids.shape, -1), batch.attention_mask
    )
    logits = model.language_model.logits(hidden_states)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def test_loss_and_gradients_equal_those_of_a_loop(either):
    batch, labels = make_batch(either)
    gradients = []
    for loss in (either(batch), naive_loss(either, batch, labels)):
        either.zero_grad()
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in either.named_parameters()})
        gradients[-1]["loss"] = loss.detach()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], rtol=1e-5, atol=2e-5, msg=(name + ": {}").format
        )
        assert name == "loss" or gradient.any(), f"{name} has no gradient"


def test_only_positions_with_a_label_go_through_the_head(model, monkeypatch):
    shapes = []

    def recorded(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        shapes.append(hidden_states.shape)
        return hidden_states.sum()

    monkeypatch.setattr(vlm, "chunked_cross_entropy", recorded)
    monkeypatch.setattr(
        model.language_model, "logits", lambda _: pytest.fail("all positions went through the head")
    )
    batch, labels = make_batch(model)
    model(batch)
    assert shapes == [(int((labels != IGNORED).sum()), 32)]


@torch.inference_mode()
def test_changing_an_image_changes_the_logits_from_its_first_token_on_and_no_others(model):
    batch, _ = make_batch(model)
    other = dataclasses.replace(batch, pixels=batch.pixels.clone())
    # The second image of row 1.
    other.pixels[2] += torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(1))
    before, after = (
        model.language_model.hidden_states(model.embed(one), one.attention_mask)
        for one in (batch, other)
    )
    change = model.language_model.logits(before - after).abs().amax(dim=-1)
    assert not change[[0, 2]].any() and not change[1, :7].any()
    assert (change[1, 7:] > 1e-2).all()


@torch.inference_mode()
def test_precomputed_patches_replace_pixels(model):
    batch, _ = make_batch(model)
    patches = model.vision_features(batch.pixels)
    precomputed = dataclasses.replace(batch, pixels=None, patches=patches)
    assert model(precomputed) == model(batch)


@torch.inference_mode()
def test_the_placeholder_may_be_a_token_without_a_row_in_the_embedding_table(model, tmp_path):
    save_model(model, tmp_path)
    change_config(tmp_path, lambda config: config["chat"].update(image_token="<image>"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.add_special_token("<image>") == model.config.language_model.vocab_size
    tokenizer.save(tmp_path)
    other = load_model(tmp_path)
    batch, _ = make_batch(model)
    ids = batch.input_ids.clone()
    ids.view(-1)[batch.image_positions] = other.chat.image_token_id
    moved = dataclasses.replace(batch, input_ids=ids)
    assert other(moved) == model(batch)
    for penalty in (1.0, 1.3):
        sampling = Sampling(repetition_penalty=penalty)
        assert generate(other, moved, 5, sampling) == generate(model, batch, 5, sampling)
    unmasked = dataclasses.replace(moved, attention_mask=None)
    assert generate(other, unmasked, 5, Sampling(repetition_penalty=1.3))
    tokenizer.add_special_token("<another>")
    tokenizer.save(tmp_path)
    message = "the tokenizer has 328 tokens and the language model 326"
    with pytest.raises(NanoVLMError, match=message):
        load_model(tmp_path)


@torch.inference_mode()
def test_vision_layer_selects_the_layer_of_the_patch_features(tmp_path):
    model, pixels = tiny_vlm(tmp_path), torch.randn(1, 3, 28, 28)
    for layer in (-1, -2):
        other = join_parts(
            tmp_path / "vision_encoder",
            tmp_path / "language_model",
            ProjectorConfig("linear"),
            ImageConfig(28, 28),
            vision_layer=layer,
            vision_norm=False,
        )
        expected = model.vision_encoder.patches(pixels, layer, norm=False)
        assert torch.equal(other.vision_features(pixels), expected)
        assert not torch.equal(other.vision_features(pixels), model.vision_features(pixels))
        assert other.image_length == 16


@pytest.mark.parametrize(("layer", "norm"), [(None, True), (-1, True), (-2, False), (3, False)])
@torch.inference_mode()
def test_a_folder_without_vision_norm_keeps_its_meaning(tmp_path, layer, norm):
    """Folders were written so before the setting existed; 3 blocks make 3 the last layer."""
    model, pixels = tiny_vlm(tmp_path), torch.randn(1, 3, 28, 28)
    save_model(model, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["vision_norm"], config["vision_layer"]
    config |= {} if layer is None else {"vision_layer": layer}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    expected = model.vision_encoder.patches(pixels, -1 if layer is None else layer, norm)
    assert torch.equal(load_model(tmp_path / "old").vision_features(pixels), expected)


@pytest.mark.parametrize(
    "images, message",
    [
        (2, "the text has 12 image placeholders, and 2 tiles of 4 visual tokens fill 8"),
        (4, "the text has 12 image placeholders, and 4 tiles of 4 visual tokens fill 16"),
        (0, "the text has 12 image placeholders, and 0 tiles of 4 visual tokens fill 0"),
    ],
)
def test_placeholders_have_to_match_the_visual_tokens(model, images, message):
    batch, _ = make_batch(model)
    pixels = torch.randn(images, 3, 28, 28) if images else None
    with pytest.raises(NanoVLMError, match=message):
        model(dataclasses.replace(batch, pixels=pixels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_folder_is_the_same_model(either, tmp_path, dtype):
    either.to(dtype)
    folder = tmp_path / "saved"
    save_model(either, folder)
    loaded = load_model(folder)
    assert loaded.config == either.config and not loaded.training
    assert loaded.state_dict().keys() == either.state_dict().keys()
    for name, tensor in either.state_dict().items():
        stored = loaded.state_dict()[name]
        assert stored.dtype == dtype and torch.equal(stored, tensor), name
    assert loaded.tokenizer.encode("一个 red circle") == either.tokenizer.encode("一个 red circle")
    batch, _ = make_batch(either)
    with torch.inference_mode():
        assert torch.equal(loaded(batch), either(batch))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_loading_casts_to_the_given_dtype(model, tmp_path):
    save_model(model, tmp_path)
    half = load_model(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    batch, _labels = make_batch(model)
    with torch.inference_mode():  # the model casts the pixels to the dtype of the vision encoder
        exact, rounded = float(model(batch)), float(half(batch))
    assert rounded == pytest.approx(exact, rel=0.01) and rounded != exact


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda config: config.update(vision_layers=-2),
            "unknown key 'vision_layers'; did you mean 'vision_layer'?",
        ),
        (
            lambda config: config["language_model"].update(rope_tetha=1.0),
            "unknown key 'rope_tetha'; did you mean 'rope_theta'?",
        ),
        (lambda config: config["projector"].update(kind="mpl"), "projector 'mpl' is not known"),
        (
            lambda config: config["chat"].update(template="alpaca"),
            "chat template 'alpaca' is not known",
        ),
        (
            lambda config: config["projector"].update(scale=0),
            "ProjectorConfig: scale is 0; it has to be above 0",
        ),
        (
            lambda config: config.update(vision_layer="last"),
            "vision_layer is 'last', expected a whole number",
        ),
        (lambda config: config.pop("image"), "key 'image' is missing"),
        (
            lambda config: config.update(model_type="bert"),
            "model_type is 'bert', expected 'nanovlm'",
        ),
        (
            lambda config: config.update(bidirectional_images=1),
            "bidirectional_images is 1, expected true or false",
        ),
        (
            lambda config: config["vision_encoder"].update(hidden_size=48),
            "do not fit VisionLanguageModel",
        ),
        (
            lambda config: config["language_model"].update(vocab_size=100),
            "the tokenizer has 326 tokens and the language model 100",
        ),
    ],
)
def test_an_invalid_config_is_refused(model, tmp_path, change, message):
    save_model(model, tmp_path)
    change_config(tmp_path, change)
    with pytest.raises(NanoVLMError, match=message):
        load_model(tmp_path)


def test_the_error_of_an_invalid_config_names_its_folder(model, tmp_path):
    save_model(model, tmp_path)
    change_config(tmp_path, lambda config: config.update(visoin={}))
    with pytest.raises(NanoVLMError, match=str(tmp_path)):
        load_model(tmp_path)


def test_joined_parts_keep_their_weights_and_only_the_projector_is_new(tmp_path):
    reference = dinov2(tmp_path / "vision_encoder", registers=2)
    vocab_size = len(byte_pair(tmp_path / "language_model"))
    qwen(tmp_path / "language_model", "qwen3", vocab_size=vocab_size, head_dim=16)
    model = join_parts(
        tmp_path / "vision_encoder",
        tmp_path / "language_model",
        ProjectorConfig("bilinear", grid=2),
        ImageConfig(42, 42),
    )
    pixels = torch.randn(1, 3, 42, 42)
    with torch.inference_mode():
        expected = reference(pixels).last_hidden_state[:, 3:]  # after the class token and registers
        torch.testing.assert_close(model.vision_features(pixels), expected, atol=1e-5, rtol=0)
    assert model.image_length == 4
    assert not any(parameter.is_meta for parameter in model.parameters())
    config = {"model_type": "nanovlm", **dataclasses.asdict(model.config)}
    assert parse_model_config(config) == model.config


def test_a_llama_language_model_is_joined_saved_and_loaded(tmp_path):
    """It has a SentencePiece tokenizer, Vicuna's chat template, and an added token as
    placeholder."""
    dinov2(tmp_path / "vision_encoder")
    vocab_size = len(sentence_piece(tmp_path / "language_model"))
    qwen(tmp_path / "language_model", "llama", vocab_size=vocab_size)
    model = join_parts(
        tmp_path / "vision_encoder",
        tmp_path / "language_model",
        ProjectorConfig("mlp"),
        ImageConfig(28, 28),
    )
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config and loaded.chat.config.template == "vicuna"
    messages = [Message.parse("user", "<image>Hi"), Message.parse("assistant", "A dog")]
    encoded = loaded.chat.encode(messages, [loaded.image_tokens(28, 28)])
    batch = collate([TokenSequence.of(encoded)], loaded.chat.image_token_id)
    batch.pixels = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        assert torch.equal(model.eval()(batch), loaded(batch))


# ---- a language model trained from scratch, and bidirectional attention within images


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> VisionLanguageModel:
    return scratch_vlm(tmp_path_factory.mktemp("scratch"))


def hidden_states(model: VisionLanguageModel, batch: Batch) -> Tensor:
    return model.language_model.hidden_states(
        model.embed(batch), batch.attention_mask, groups=model.image_groups(batch)
    )


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
@torch.inference_mode()
def test_earlier_tokens_of_an_image_attend_to_later_ones_only_if_bidirectional(
    scratch, bidirectional, monkeypatch
):
    config = dataclasses.replace(scratch.config, bidirectional_images=bidirectional)
    monkeypatch.setattr(scratch, "config", config)
    batch, _ = make_batch(scratch)
    embeddings = scratch.embed(batch)
    other = embeddings.clone()
    # The last token of the second image of row 1, whose tokens are 7 to 10.
    other[1, 10] += torch.randn(40, generator=torch.Generator().manual_seed(1))
    groups = scratch.image_groups(batch)
    before, after = (
        scratch.language_model.hidden_states(one, batch.attention_mask, groups=groups)
        for one in (embeddings, other)
    )
    changed = (before - after).abs().amax(dim=-1) > 1e-3
    assert not changed[[0, 2]].any()
    first = 7 if bidirectional else 10
    assert changed[1].tolist() == [False] * first + [True] * (16 - first)


def test_image_groups_number_the_images_of_a_batch_and_are_zero_for_text(scratch, model):
    batch, _ = make_batch(scratch)
    groups = scratch.image_groups(batch)
    assert groups[0].tolist() == [0] * 3 + [1] * 4 + [0] * 9
    assert groups[1].tolist() == [2] * 4 + [0] * 3 + [3] * 4 + [0] * 5 and not groups[2].any()
    assert model.image_groups(make_batch(model)[0]) is None


@torch.inference_mode()
def test_left_padding_packing_and_branches_do_not_change_a_sample_with_an_image(scratch):
    """The sample alone, packed behind another, and as two equal branches after left padding."""
    placeholder, pixels = scratch.chat.image_token_id, torch.randn(2, 3, 28, 28)
    ids = torch.tensor([7, 8, *[placeholder] * 4, 9, 10, 11])
    other = torch.tensor([*[placeholder] * 4, 12, 13])

    def run(ids: Tensor, mask: list[int], pixels: Tensor) -> Tensor:
        image_positions = (ids == placeholder).nonzero()[:, 0]
        empty = torch.zeros(0, dtype=torch.long)
        batch = Batch(ids[None], torch.tensor([mask]), image_positions, empty, empty, pixels)
        return hidden_states(scratch, batch)[0]

    expected = run(ids, [1] * 9, pixels[:1])
    packed = run(torch.cat((other, ids)), [1] * 6 + [SEGMENT + 1] * 9, pixels.flip(0))
    torch.testing.assert_close(packed[6:], expected, atol=2e-5, rtol=0)
    branched = torch.cat((torch.zeros(2, dtype=torch.long), ids, ids[7:]))
    branches = run(branched, [0] * 2 + [1] * 7 + [2] * 2 + [3] * 2, pixels[:1])
    torch.testing.assert_close(branches[2:], torch.cat((expected, expected[7:])), atol=2e-5, rtol=0)


def test_in_training_the_loss_includes_the_balance_loss_times_the_number_of_targets(scratch):
    batch, _ = make_batch(scratch)
    plain = scratch(batch)
    scratch.train()
    try:
        scratch.language_model.hidden_states(
            scratch.embed(batch),
            batch.attention_mask,
            positions=batch.target_positions,
            groups=scratch.image_groups(batch),
        )
        balance = [block.mlp.balance_loss for block in scratch.language_model.blocks]
        loss = scratch(batch)
    finally:
        scratch.eval()
    assert len(balance) == 3
    expected = plain + 0.01 * len(batch.targets) * sum(balance)
    torch.testing.assert_close(loss, expected)
    assert float((loss - plain).detach()) > 0.01 * len(batch.targets) * 2
    scratch.zero_grad()
    loss.backward()
    assert all(block.mlp.router.weight.grad.any() for block in scratch.language_model.blocks)


@torch.inference_mode()
def test_a_model_with_a_language_model_trained_from_scratch_is_saved_and_loaded(scratch, tmp_path):
    save_model(scratch, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == scratch.config and loaded.config.bidirectional_images
    assert loaded.state_dict().keys() == scratch.state_dict().keys()
    batch, _ = make_batch(scratch)
    assert torch.equal(loaded(batch), scratch(batch))


@pytest.mark.parametrize("pad_left", [False, True], ids=["right", "left"])
def test_from_scratch_cached_and_uncached_answers_agree(scratch, pad_left):
    batch, _ = make_batch(scratch)
    if pad_left:
        shift = batch.attention_mask.eq(0).sum(dim=1)
        index = (torch.arange(16) - shift[:, None]) % 16
        ids, mask = batch.input_ids.gather(1, index), batch.attention_mask.gather(1, index)
        is_image = (ids == scratch.chat.image_token_id) & (mask > 0)
        image_positions = is_image.flatten().nonzero()[:, 0]
        batch = dataclasses.replace(
            batch, input_ids=ids, attention_mask=mask, image_positions=image_positions
        )
    groups = scratch.image_groups(batch)
    with torch.inference_mode():
        embeddings = scratch.embed(batch)
    prompt = Prompt(embeddings, batch.input_ids, batch.attention_mask, groups)
    cached, uncached = (
        list(decode(scratch.language_model, prompt, 8, {-2}, use_cache=use_cache))
        for use_cache in (True, False)
    )
    assert cached == uncached
    assert [list(row) for row in zip(*cached)] == generate(scratch, batch, 8)
    message = "a prompt of 16 tokens and 60 new ones exceed the language model's 64 positions"
    with pytest.raises(NanoVLMError, match=message):
        generate(scratch, batch, 60)
