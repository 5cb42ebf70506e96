"""The weights that ship: they load strictly, agree with the reference, and can be made again."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch

from data_tools import pretrain_tiny
from data_tools.pretrain_language_model import DOWN, EMPTY, RIGHT, Corpus, Text, exact_answers
from data_tools.pretrain_vision_encoder import (
    BINS,
    CENTRE,
    GRID,
    HEADS,
    crowded_scene,
    mirror,
    normalise,
    patch_labels,
)
from data_tools.scenes_world import (
    ALL_PAIRS,
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    TRAIN_PAIRS,
    draw,
    random_scene,
)
from nanovlm.hub.chat_configs import read_chat_config
from nanovlm.hub.image_configs import parse_image_config
from nanovlm.hub.models import load_language_model, load_model, load_vision_encoder
from nanovlm.inputs.chat import IMAGE, Chat, ChatConfig
from nanovlm.inputs.image import preprocess
from nanovlm.tokenizer import load_tokenizer

SCRIPT = Path(pretrain_tiny.__file__)
ASSETS = SCRIPT.parents[1] / "nanovlm" / "assets"
VISION_ENCODER, LANGUAGE_MODEL = ASSETS / "tiny-vision-encoder", ASSETS / "tiny-language-model"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(LANGUAGE_MODEL)


def test_vision_encoder_agrees_with_the_reference():
    transformers = pytest.importorskip("transformers")
    reference = transformers.Dinov2Model.from_pretrained(VISION_ENCODER, dtype=torch.float32)
    reference.eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(pixels).last_hidden_state
        outputs = load_vision_encoder(VISION_ENCODER, torch.float32)(pixels)
    assert torch.allclose(outputs, expected, atol=1e-4)


def test_the_shipped_model_looks_before_the_final_norm():
    """So a LLaVA of `transformers`, with vision_feature_layer -1, would see what it sees."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.Dinov2Model.from_pretrained(VISION_ENCODER, dtype=torch.float32)
    model, pixels = load_model(ASSETS / "tiny-vlm", torch.float32), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference.eval()(pixels, output_hidden_states=True).hidden_states[-1]
        features = model.vision_features(pixels)
    assert (model.config.vision_layer, model.config.vision_norm) == (-1, False)
    torch.testing.assert_close(features, expected[:, 1:], atol=1e-4, rtol=0)


def test_vision_encoder_gets_the_pixels_it_was_trained_on():
    processor = json.loads((VISION_ENCODER / "preprocessor_config.json").read_text())
    config = parse_image_config(processor)
    image = draw(random_scene(Random(3)))
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 64, 3)
    assert torch.allclose(preprocess(image, config), normalise(values.permute(2, 0, 1)), atol=1e-6)


def test_language_model_agrees_with_the_reference(tokenizer):
    transformers = pytest.importorskip("transformers")
    reference = transformers.Qwen3ForCausalLM.from_pretrained(LANGUAGE_MODEL, dtype=torch.float32)
    reference.eval()
    ids = torch.randint(0, tokenizer.vocab_size, (2, 40))
    with torch.no_grad():
        expected = reference(ids).logits
        outputs = load_language_model(LANGUAGE_MODEL, torch.float32)(ids)
    assert torch.allclose(outputs, expected, atol=1e-4)


def test_language_model_answers_from_notes(tokenizer):
    """More answers are exactly right than any guesser could reach, so the weights are trained."""
    chat = Chat(ChatConfig(template="plain", image_token="<image>"), tokenizer)
    corpus = Corpus([Text.random(Random(f"test/{index}")) for index in range(30)], chat)
    assert exact_answers(load_language_model(LANGUAGE_MODEL, torch.float32), corpus) > 0.93


def test_words_of_a_note_are_single_pieces(tokenizer):
    """A note is a bag of words: with 紫色 as two pieces, it would not say which belong together."""
    words = [*COLOURS.values(), *SHAPES.values(), *SIZES.values(), EMPTY, RIGHT, DOWN]
    assert [word for word in words if len(tokenizer.encode(word)) > 1] == []


@pytest.mark.parametrize(
    "text",
    [
        "图里有红色的圆形吗？",
        "  two  spaces ",
        "line\nbreak\ttab",
        "龘 😀 é",
        "<image></s><user>",
        "",
    ],
)
def test_tokenizer_gives_back_any_text_and_never_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_tokens.values())


def test_tokenizer_has_what_the_plain_template_needs(tokenizer):
    chat = Chat(read_chat_config(LANGUAGE_MODEL, tokenizer), tokenizer)
    assert chat.config.template == "plain"
    assert tokenizer.vocab_size <= load_language_model(LANGUAGE_MODEL).config.vocab_size


def test_no_piece_holds_both_a_colour_and_a_shape(tokenizer):
    pieces = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    colours, shapes = (
        {word for pair in table.items() for word in pair} for table in (COLOURS, SHAPES)
    )
    for piece in pieces:
        assert not any(a in piece and b in piece for a, b in product(colours, shapes))
    encode = tokenizer.encode
    for colour, shape in ALL_PAIRS:
        for a, b in ((COLOURS[colour], SHAPES[shape]), (f" {colour}", f" {shape}")):
            assert encode(a + b) == encode(a) + encode(b)


def test_no_held_out_pair_is_in_the_pretraining_data():
    for index in range(300):
        text = Text.random(Random(f"check/{index}"))
        scene = crowded_scene(Random(f"check/{index}"), TRAIN_PAIRS)
        assert not {(thing.colour, thing.shape) for thing in scene.objects} & set(HELD_OUT_PAIRS)
        messages = [message for conversation in text.conversations for message in conversation]
        spoken = [part for message in messages for part in message.content if part is not IMAGE]
        for colour, shape in HELD_OUT_PAIRS:
            assert not any(COLOURS[colour] in note and SHAPES[shape] in note for note in text.notes)
            names = f"{COLOURS[colour]}{SHAPES[shape]}", f"{colour} {shape}"
            assert not any(name in part for name in names for part in spoken)


def test_patch_labels_say_where_each_object_is_and_what():
    names = list(HEADS)
    for index in range(50):
        scene = random_scene(Random(f"labels/{index}"))
        grids = torch.tensor(patch_labels(scene)).unflatten(1, (GRID, GRID))
        labels = dict(zip(names, grids, strict=True))
        assert (labels["place"] == CENTRE).sum() == len(scene.objects)
        for thing in scene.objects:
            at = int(thing.y // 8), int(thing.x // 8)
            assert labels["place"][at] == CENTRE
            assert list(SHAPES)[labels["shape"][at]] == thing.shape
            assert list(COLOURS)[labels["colour"][at]] == thing.colour
            assert labels["x"][at] == int(thing.x / 4) and labels["y"][at] == int(thing.y / 4)


def test_mirrored_labels_belong_to_the_mirrored_image():
    scene = random_scene(Random(1))
    labels = torch.tensor(patch_labels(scene))[None]
    pixels = torch.arange(64).expand(1, 3, 64, 64)
    flipped, mirrored = mirror(pixels, labels)
    assert flipped[0, 0, 0, 0] == 63
    x = list(HEADS).index("x")
    belongs = labels[0, 0].view(GRID, GRID).flip(1).flatten() > 0
    assert torch.equal(mirrored[0, 0] > 0, belongs)
    expected = BINS - 1 - labels[0, x].view(GRID, GRID).flip(1).flatten()
    assert torch.equal(mirrored[0, x][belongs], expected[belongs])


def _digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _make(out: Path, *flags: str) -> subprocess.Popen:
    kinds = ("vision-encoder", "language-model", "drill", "mixed")
    steps = [f"--{kind}-steps=2" for kind in kinds]
    return subprocess.Popen(
        [sys.executable, SCRIPT, "--out", out, *steps, "--scenes=64", "--texts=600", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_script_makes_both_parts_again_to_the_same_bytes_and_replaces_nothing(tmp_path):
    for started in [_make(tmp_path / name) for name in ("one", "other")]:  # side by side
        assert started.communicate() and started.returncode == 0
    assert _digests(tmp_path / "one") == _digests(tmp_path / "other")
    load_vision_encoder(tmp_path / "one" / "tiny-vision-encoder")
    load_language_model(tmp_path / "one" / "tiny-language-model")
    again = _make(tmp_path / "one", "--part", "vision_encoder", "--seed", "1")
    message = again.communicate()[1]
    assert again.returncode == 2
    assert message.startswith("error: ") and "--replace" in message
    assert _digests(tmp_path / "one") == _digests(tmp_path / "other")


def test_an_old_name_of_a_part_is_refused_with_the_new_one(call):
    ended = call(pretrain_tiny.main, "--part", "text")
    assert ended.returncode == 2
    assert ended.stderr == "error: --part text is now --part language_model\n"
