"""The whole model: images reach the logits, the loss is what it says it is, and a folder holds all
of it."""

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
from nanovlm.generate import Prompt, Sampling, decode, generate
from nanovlm.hub.models import join_parts, load_model, parse_model_config, save_model
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IGNORED, Message
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model import vlm
from nanovlm.model.attention import SEGMENT
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vlm import VisionLanguageModel
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
    """Three rows with one, two and no images, some padding, and labels here and there; and the
    labels as (B, T)."""
    generator = torch.Generator().manual_seed(0)
    placeholder, length = model.chat.image_token_id, model.image_length
    ids = torch.randint(300, (3, 16), generator=generator)
    ids[0, 3 : 3 + length] = placeholder
    ids[1, 0:length] = ids[1, 7 : 7 + length] = placeholder
    mask = torch.ones_like(ids)
    mask[0, 13:] = mask[2, 9:] = 0
    learned = (torch.rand(ids.shape, generator=generator) < 0.5) & (mask > 0) & (ids != placeholder)
    learned[:, 0] = False
    labels = torch.where(learned, ids, IGNORED)
    places, positions = (of.flatten().nonzero()[:, 0] for of in (ids == placeholder, learned))
    pixels = torch.randn(3, 3, 28, 28, generator=generator)
    return Batch(ids, mask, places, positions - 1, labels.flatten()[positions], pixels), labels


def naive_loss(model: VisionLanguageModel, batch: Batch, labels: Tensor) -> Tensor:
    """Splice with a loop, all logits at once, labels shifted by one."""
    visual_tokens = iter(model.projector(model.vision_encoder(batch.pixels)[:, 1:]).flatten(0, 1))
    rows = []
    for ids in batch.input_ids:
        rows.append(
            torch.stack(
                [
                    next(visual_tokens)
                    if token == model.chat.image_token_id
                    else model.language_model.embed_tokens.weight[token]
                    for token in ids
                ]
            )
        )
    logits = model.language_model.logits(
        model.language_model.hidden_states(torch.stack(rows), batch.attention_mask)
    )
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def test_loss_and_gradients_equal_the_naive_ones(either):
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


def test_only_positions_with_a_label_pass_the_head(model, monkeypatch):
    seen = []

    def recorded(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        seen.append(hidden_states.shape)
        return hidden_states.sum()

    monkeypatch.setattr(vlm, "chunked_cross_entropy", recorded)
    monkeypatch.setattr(
        model.language_model, "logits", lambda _: pytest.fail("all positions went through the head")
    )
    batch, labels = make_batch(model)
    model(batch)
    assert seen == [(int((labels != IGNORED).sum()), 32)]


@torch.inference_mode()
def test_changing_an_image_changes_what_follows_it_and_nothing_else(model):
    batch, _ = make_batch(model)
    other = dataclasses.replace(batch, pixels=batch.pixels.clone())
    other.pixels[2] += torch.randn(
        3, 28, 28, generator=torch.Generator().manual_seed(1)
    )  # the second one of row 1
    before, after = (
        model.language_model.hidden_states(model.embed(one), one.attention_mask)
        for one in (batch, other)
    )
    change = model.language_model.logits(before - after).abs().amax(dim=-1)
    assert not change[[0, 2]].any() and not change[1, :7].any()
    assert (change[1, 7:] > 1e-2).all()


@torch.inference_mode()
def test_kept_features_stand_in_for_pixels(model):
    batch, _ = make_batch(model)
    kept = dataclasses.replace(batch, pixels=None, patches=model.vision_features(batch.pixels))
    assert model(kept) == model(batch)


@torch.inference_mode()
def test_the_placeholder_may_lie_behind_the_decoders_last_row(model, tmp_path):
    save_model(model, tmp_path)
    change_config(tmp_path, lambda config: config["chat"].update(image_token="<image>"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.add_special_token("<image>") == model.config.language_model.vocab_size
    tokenizer.save(tmp_path)
    other = load_model(tmp_path)
    batch, _ = make_batch(model)
    moved = (
        batch.input_ids.flatten()
        .index_fill(0, batch.image_positions, other.chat.image_token_id)
        .view_as(batch.input_ids)
    )
    moved = dataclasses.replace(batch, input_ids=moved)
    assert other(moved) == model(batch)
    for penalty in (1.0, 1.3):
        sampling = Sampling(repetition_penalty=penalty)
        assert generate(other, moved, 5, sampling) == generate(model, batch, 5, sampling)
    masked = dataclasses.replace(moved, attention_mask=None)
    assert generate(other, masked, 5, Sampling(repetition_penalty=1.3))
    tokenizer.add_special_token("<another>")
    tokenizer.save(tmp_path)
    with pytest.raises(
        NanoVLMError, match="the tokenizer has 328 tokens and the language model 326"
    ):
        load_model(tmp_path)


@torch.inference_mode()
def test_vision_layer_is_the_one_looked_at(tmp_path):
    model = tiny_vlm(tmp_path)
    deeper = join_parts(
        tmp_path / "vision_encoder",
        tmp_path / "language_model",
        ProjectorConfig("linear"),
        ImageConfig(28, 28),
        vision_layer=-2,
    )
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(deeper.vision_features(pixels), model.vision_encoder.patches(pixels, -2))
    assert not torch.equal(deeper.vision_features(pixels), model.vision_features(pixels))
    assert deeper.image_length == 16


@pytest.mark.parametrize(
    "images, message",
    [
        (2, "the text has 12 image placeholders, and 2 tiles of 4 visual tokens fill 8"),
        (4, "the text has 12 image placeholders, and 4 tiles of 4 visual tokens fill 16"),
        (0, "the text has 12 image placeholders, and 0 tiles of 4 visual tokens fill 0"),
    ],
)
def test_placeholders_and_pictures_have_to_match(model, images, message):
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
        assert loaded.state_dict()[name].dtype == dtype and torch.equal(
            loaded.state_dict()[name], tensor
        ), name
    assert loaded.tokenizer.encode("一个 red circle") == either.tokenizer.encode("一个 red circle")
    batch, _ = make_batch(either)
    with torch.inference_mode():
        assert torch.equal(loaded(batch), either(batch))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_loading_casts_when_asked(model, tmp_path):
    save_model(model, tmp_path)
    half = load_model(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    batch, _labels = make_batch(model)
    with torch.inference_mode():
        exact, rounded = (
            float(model(batch)),
            float(half(batch)),
        )  # pixels are cast to what the eyes compute in
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
            lambda config: config.update(model_type="llava"),
            "model_type is 'llava', expected 'nanovlm'",
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
def test_a_changed_config_is_refused(model, tmp_path, change, message):
    save_model(model, tmp_path)
    change_config(tmp_path, change)
    with pytest.raises(NanoVLMError, match=message):
        load_model(tmp_path)


def test_a_config_names_its_folder(model, tmp_path):
    save_model(model, tmp_path)
    change_config(tmp_path, lambda config: config.update(visoin={}))
    with pytest.raises(NanoVLMError, match=str(tmp_path)):
        load_model(tmp_path)


def test_parts_keep_their_weights_and_only_the_projector_is_new(tmp_path):
    reference = dinov2(tmp_path / "vision_encoder", registers=2)
    qwen(
        tmp_path / "language_model",
        "qwen3",
        vocab_size=len(byte_pair(tmp_path / "language_model")),
        head_dim=16,
    )
    model = join_parts(
        tmp_path / "vision_encoder",
        tmp_path / "language_model",
        ProjectorConfig("bilinear", grid=2),
        ImageConfig(42, 42),
    )
    pixels = torch.randn(1, 3, 42, 42)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.vision_features(pixels),
            reference(pixels).last_hidden_state[:, 3:],
            atol=1e-5,
            rtol=0,
        )
    assert model.image_length == 4
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert (
        parse_model_config({"model_type": "nanovlm", **dataclasses.asdict(model.config)})
        == model.config
    )


def test_a_llama_voice_joins_eyes_and_survives_saving(tmp_path):
    """With a SentencePiece vocabulary, Vicuna's template and the placeholder among its added
    tokens."""
    dinov2(tmp_path / "vision_encoder")
    qwen(
        tmp_path / "language_model",
        "llama",
        vocab_size=len(sentence_piece(tmp_path / "language_model")),
    )
    model = join_parts(
        tmp_path / "vision_encoder",
        tmp_path / "language_model",
        ProjectorConfig("mlp"),
        ImageConfig(28, 28),
    )
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.config == model.config and again.chat.config.template == "vicuna"
    messages = [Message.parse("user", "<image>Hi"), Message.parse("assistant", "A dog")]
    encoded = again.chat.encode(messages, [again.image_tokens(28, 28)])
    batch = collate([TokenSequence.of(encoded)], again.chat.image_token_id)
    batch.pixels = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        assert torch.equal(model.eval()(batch), again(batch))


# ---- a decoder made from scratch, and images that see each other both ways


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> VisionLanguageModel:
    return scratch_vlm(tmp_path_factory.mktemp("scratch"))


def hidden_states(model: VisionLanguageModel, batch: Batch) -> Tensor:
    return model.language_model.hidden_states(
        model.embed(batch), batch.attention_mask, groups=model.image_groups(batch)
    )


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both ways"])
@torch.inference_mode()
def test_the_end_of_an_image_reaches_its_first_token_only_if_asked_for(
    scratch, bidirectional, monkeypatch
):
    monkeypatch.setattr(
        scratch, "config", dataclasses.replace(scratch.config, bidirectional_images=bidirectional)
    )
    batch, _ = make_batch(scratch)
    embeddings = scratch.embed(batch)
    other = embeddings.clone()
    other[1, 10] += torch.randn(
        40, generator=torch.Generator().manual_seed(1)
    )  # the last of the second image of row 1
    before, after = (
        scratch.language_model.hidden_states(
            one, batch.attention_mask, groups=scratch.image_groups(batch)
        )
        for one in (embeddings, other)
    )
    changed = (before - after).abs().amax(dim=-1) > 1e-3
    assert not changed[[0, 2]].any()
    assert changed[1].tolist() == [False] * (7 if bidirectional else 10) + [True] * (
        9 if bidirectional else 6
    )


def test_images_are_numbered_through_the_batch_and_words_are_not(scratch, model):
    batch, _ = make_batch(scratch)
    groups = scratch.image_groups(batch)
    assert groups[0].tolist() == [0] * 3 + [1] * 4 + [0] * 9
    assert groups[1].tolist() == [2] * 4 + [0] * 3 + [3] * 4 + [0] * 5 and not groups[2].any()
    assert model.image_groups(make_batch(model)[0]) is None


@torch.inference_mode()
def test_left_padding_packing_and_a_shared_beginning_leave_images_as_they_are(scratch):
    """One sample alone; behind another in its row; and as the beginning of two branches, in a row
    that starts with padding."""
    placeholder, pixels = scratch.chat.image_token_id, torch.randn(2, 3, 28, 28)
    ids = torch.tensor([7, 8, *[placeholder] * 4, 9, 10, 11])
    other = torch.tensor([*[placeholder] * 4, 12, 13])

    def run(ids: Tensor, mask: list[int], pixels: Tensor) -> Tensor:
        places = (ids == placeholder).nonzero()[:, 0]
        none = torch.zeros(0, dtype=torch.long)
        return hidden_states(
            scratch, Batch(ids[None], torch.tensor([mask]), places, none, none, pixels)
        )[0]

    expected = run(ids, [1] * 9, pixels[:1])
    packed = run(torch.cat((other, ids)), [1] * 6 + [SEGMENT + 1] * 9, pixels.flip(0))
    torch.testing.assert_close(packed[6:], expected, atol=2e-5, rtol=0)
    shared = run(
        torch.cat((torch.zeros(2, dtype=torch.long), ids, ids[7:])),
        [0] * 2 + [1] * 7 + [2] * 2 + [3] * 2,
        pixels[:1],
    )
    torch.testing.assert_close(shared[2:], torch.cat((expected, expected[7:])), atol=2e-5, rtol=0)


def test_in_training_the_balance_joins_the_loss_by_the_token(scratch):
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
def test_a_saved_decoder_of_our_own_is_the_same_model(scratch, tmp_path):
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
        places = ((ids == scratch.chat.image_token_id) & (mask > 0)).flatten().nonzero()[:, 0]
        batch = dataclasses.replace(
            batch, input_ids=ids, attention_mask=mask, image_positions=places
        )
    groups, answers = scratch.image_groups(batch), []
    with torch.inference_mode():
        embeddings = scratch.embed(batch)
    for use_cache in (True, False):
        answers.append(
            list(
                decode(
                    scratch.language_model,
                    Prompt(embeddings, batch.input_ids, batch.attention_mask, groups),
                    8,
                    {-2},
                    use_cache=use_cache,
                )
            )
        )
    assert answers[0] == answers[1]
    assert [list(row) for row in zip(*answers[0])] == generate(scratch, batch, 8)
    with pytest.raises(
        NanoVLMError,
        match="a prompt of 16 tokens and 60 new ones exceed the language model's 64 positions",
    ):
        generate(scratch, batch, 60)
