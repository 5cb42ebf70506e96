"""The published forms of records: each is read as what it means, or refused by name."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nanovlm.data.records import Record, parse_record
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.chat import IMAGE, Message
from nanovlm.inputs.image import open_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    (folder / "images").mkdir()
    for name in ("a.png", "b.png", "images/c d.png"):
        Image.new("RGB", (4, 4), "red").save(folder / name)
    return folder


def read(entry: Any, folder: Path) -> Record:
    return parse_record(json.loads(json.dumps(entry)), "here", folder)


def chat(question: Any, answer: Any = "A circle.", /, **keys: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **keys}


def sharegpt(question: str, answer: str = "A circle.", /, **keys: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **keys}


ASK, ANSWER = "What is red?", "A circle."
TEXT = {"type": "text", "text": ASK}
# Each is one question about a.png, with its answer.
SAME = {
    "LLaVA": sharegpt(f"<image>\n{ASK}", image="a.png", id=7),
    "messages": chat(f"<image>\n{ASK}", images=["a.png"]),
    "OpenAI": chat([{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, TEXT]),
    "OpenAI, the address as text": chat([{"type": "image_url", "image_url": "a.png"}, TEXT]),
    "OpenAI's responses": chat(
        [{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": ASK}],
        [{"type": "output_text", "text": ANSWER}],
    ),
    "Qwen2-VL": chat([{"type": "image", "image": "a.png", "max_pixels": 999}, TEXT]),
    "parts with null for what they are not": chat(
        [
            {"type": "image", "image": "a.png", "text": None},
            {"type": "text", "image": None, "text": ASK},
        ]
    ),
    "parts without a type": chat([{"image": "a.png"}, {"text": ASK}]),
    "TRL": chat([{"type": "image"}, TEXT], [{"type": "text", "text": ANSWER}], images=["a.png"]),
    "TRL, a prompt and a completion": {
        "prompt": [{"role": "user", "content": [{"type": "image"}, TEXT]}],
        "completion": [{"role": "assistant", "content": ANSWER}],
        "images": ["a.png"],
    },
    "parts with null columns": chat(
        [{"type": "image", "index": 0, "text": None}, TEXT | {"index": None}], images=["a.png"]
    ),
    "a prompt that repeats the question": chat(
        f"<image>\n{ASK}", image="a.png", prompt=f"<image>\n{ASK}", prompt_id="a"
    ),
    "other facts about a turn": {
        "image": "a.png",
        "messages": [
            {"role": "user", "content": f"<image>\n{ASK}", "constraints": "short", "name": "Li"},
            {"role": "assistant", "content": ANSWER, "glossary": "x", "id": 3},
        ],
    },
    "tools that are none": sharegpt(f"<image>\n{ASK}", image="a.png", tools="[]"),
    "a table of the hub": chat(f"<image>\n{ASK}", images=[{"path": "a.png", "bytes": None}]),
    "Anthropic": chat([{"type": "image", "source": {"type": "url", "url": "a.png"}}, TEXT]),
    "ms-swift, a query": {"query": ASK, "response": ANSWER, "images": ["a.png"], "history": []},
    "ms-swift, with a marker": {"query": f"<image>\n{ASK}", "response": ANSWER, "images": "a.png"},
    "LLaMA-Factory, alpaca": {
        "instruction": f"<image>\n{ASK}",
        "input": "",
        "output": ANSWER,
        "images": ["a.png"],
        "system": "",
    },
    "the Cauldron": {"images": ["a.png"], "texts": [{"user": ASK, "assistant": ANSWER}]},
    "XTuner": {"image": "a.png", "conversation": [{"input": f"<image>\n{ASK}", "output": ANSWER}]},
    "questions and answers": {"image": "a.png", "question": ASK, "answer": ANSWER},
    "mixed keys and roles": {
        "image": "a.png",
        "conversations": [
            {"role": "Human", "content": f"<image>\n{ASK}"},
            {"role": "bot", "value": ANSWER},
        ],
    },
    "named in a path of Windows": chat(f"<image>\n{ASK}", image=".\\a.png"),
    "named twice alike": chat([{"type": "image", "image": "a.png"}, TEXT], images=["a.png"]),
    "images that are null": chat(f"<image>\n{ASK}", images=[None, "a.png", None], image=[]),
    "null columns": sharegpt(
        f"<image>\n{ASK}",
        image="a.png",
        images=None,
        messages=None,
        references=None,
        system=None,
        tools=[],
        video=None,
        query="",
        loss=float("nan"),
    ),
    "facts about the image": sharegpt(
        f"<image>\n{ASK}",
        image="a.png",
        image_id=12,
        image_url="http://example.org/x.png",
        file_name="a.png",
        question_id=3,
        question="?",
        answer="B",
        label="circle",
        source="coco",
        width=640,
    ),
}


@pytest.mark.parametrize("entry", SAME.values(), ids=SAME.keys())
def test_the_same_conversation_in_every_published_form(folder, entry):
    record = read(entry, folder)
    assert record.messages == (
        Message("user", (IMAGE, f"\n{ASK}")),
        Message("assistant", (ANSWER,)),
    )
    (image,) = record.images
    assert image.samefile(folder / "a.png")


def test_an_image_may_stand_in_the_record_itself(folder):
    buffer = io.BytesIO()
    Image.effect_noise((164, 148), 50).convert("RGB").save(buffer, "JPEG")
    text = base64.b64encode(buffer.getvalue()).decode()
    uri = f"data:image/jpeg;base64,{text}"
    source = {"type": "base64", "media_type": "image/jpeg", "data": text}
    for entry in (
        sharegpt("<image>", image=uri),
        sharegpt("<image>", image=text),
        sharegpt(f"<img>{uri}</img>"),
        chat("<image>", images=[{"bytes": text, "path": "lost.jpg"}]),
        chat([{"type": "image_url", "image_url": {"url": uri}}]),
        chat([{"type": "image", "source": source}]),
    ):
        (path,) = read(entry, folder).images
        assert open_image(path).size == (164, 148)


def test_qwen_vl_names_images_within_the_text(folder):
    text = "Picture 1: <img>a.png</img>\nPicture 2:<img> images/c d.png </img>\nWhich?"
    record = read(sharegpt(text, "The first <img>."), folder)
    assert record.messages[0].content == ("Picture 1: ", IMAGE, "\nPicture 2:", IMAGE, "\nWhich?")
    assert record.messages[1].content == ("The first <img>.",)
    assert record.images == (folder / "a.png", folder / "images/c d.png")


def test_names_of_images_follow_the_order_of_their_places(folder):
    named, place = {"type": "image", "image": "b.png"}, {"type": "image"}
    parts = [place, {"type": "text", "text": "or"}, named, {"type": "text", "text": " or "}, place]
    record = read(chat(parts, images=["a.png", "images/c d.png"]), folder)
    assert record.images == (folder / "a.png", folder / "b.png", folder / "images/c d.png")
    assert record.messages[0].content == (IMAGE, "\nor", IMAGE, " or ", IMAGE)


@pytest.mark.parametrize(
    "name", ["images\\c d.png", "file://{}/images/c%20d.png", "file://localhost{}/images/c d.png"]
)
def test_paths_of_other_systems(folder, name):
    record = read(sharegpt("<image>", image=name.format(folder)), folder)
    assert record.images[0].samefile(folder / "images/c d.png")


def test_earlier_turns_and_an_input(folder):
    record = read(
        {
            "instruction": "Sum up.",
            "input": "A text.",
            "output": "Yes.",
            "history": [["Hi", "Hello"]],
            "system": "Be brief.",
        },
        folder,
    )
    assert [(message.role, message.text) for message in record.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Sum up.\nA text."),
        ("assistant", "Yes."),
    ]


def test_a_system_prompt_beside_the_turns_opens_the_conversation(folder):
    for entry in (sharegpt("x", system="S"), chat("x", system="S"), chat("x", system_prompt="S")):
        assert read(entry, folder).messages[0] == Message("system", ("S",))
    own = sharegpt("x", system="S")
    own["conversations"].insert(0, {"from": "system", "value": "S"})
    assert [message.role for message in read(own, folder).messages] == [
        "system",
        "user",
        "assistant",
    ]
    with pytest.raises(NanoVLMError, match="another system prompt in 'system'"):
        read(own | {"system": "T"}, folder)


def test_an_empty_system_turn_is_kept_since_it_replaces_a_models_own(folder):
    entry = chat("x")
    entry["messages"].insert(0, {"role": "system", "content": ""})
    assert read(entry, folder).messages[0] == Message("system", ("",))
    assert len(read(chat("x", system=""), folder).messages) == 2


@pytest.mark.parametrize(
    "key, value",
    [("loss", False), ("weight", 0), ("loss_weight", 0.0), ("train", False), ("masked", True)],
)
def test_an_answer_that_is_not_to_be_learned_has_no_labels(folder, key, value):
    turns = [*chat("x", "first")["messages"], *chat("y", "second")["messages"]]
    turns[1][key] = value
    turns[3][key] = not value
    first, second = (
        message for message in read({"messages": turns}, folder).messages if message.role != "user"
    )
    assert not first.labelled and second.labelled
    turns[3][key] = value
    with pytest.raises(NanoVLMError, match="none of its answers is to be learned"):
        read({"messages": turns}, folder)
    with pytest.raises(NanoVLMError, match="is not to be learned"):
        read(chat("x", **{key: value}), folder)


def turn(**keys: Any) -> dict[str, Any]:
    """A record whose answer has other keys, too."""
    entry = chat("x")
    entry["messages"][1] |= keys
    return entry


REFUSED = {
    "half a weight": (turn(weight=0.5), "'weight' = 0.5"),
    "a weight in text": (turn(loss="no"), "'loss' = 'no'"),
    "a question to be learned": (
        {"messages": [{"role": "user", "content": "x", "loss": True}, *chat("y")["messages"][1:]]},
        "only answers can be",
    ),
    "two texts": (turn(value="y"), "has two texts, and they differ"),
    "several answers": (
        {"question": "x", "answer": ["cat", "cats"]},
        "has a list of texts, ['cat', 'cats']; it is not clear",
    ),
    "a path among texts": (chat(["a.png", "x"]), "has a list of texts, ['a.png', 'x']"),
    "files beside a text": (
        {
            "messages": [
                {"role": "user", "content": "x", "files": ["a.png"]},
                *chat("x")["messages"],
            ]
        },
        "has 'files'",
    ),
    "images within a text": (chat([TEXT | {"images": ["a.png"]}]), "has 'images'"),
    "a mask of losses": (turn(loss_mask=0), "has 'loss_mask'"),
    "choices with keys": ({"question": "x", "A": "cat", "B": "dog", "answer": "A"}, "has 'A'"),
    "a list of media": (chat("x", media=[{"type": "image", "url": "a.png"}]), "has 'media'"),
    "weights of parts of an answer": (turn(train_detail=[{"train": False}]), "'train_detail'"),
    "a call of a tool": (turn(tool_calls=[{"id": 1}]), "has 'tool_calls'"),
    "thoughts beside the answer": (turn(reasoning_content="hm"), "has 'reasoning_content'"),
    "an image beside a turn": (turn(images=["a.png"]), "has 'images'"),
    "a turn of a tool": (
        {"messages": [*chat("x")["messages"], {"role": "tool", "content": "3"}]},
        "role = 'tool', expected system, user or assistant",
    ),
    "an observation": (
        {"conversations": [{"from": "observation", "value": "3"}]},
        "from = 'observation'",
    ),
    "tools": (chat("x", tools=[{"name": "f"}]), "has 'tools'"),
    "tools as text": (sharegpt("x", tools="[{}]"), "has 'tools'"),
    "a video": (sharegpt("x", video="a.mp4"), "has 'video'"),
    "videos beside an image": (sharegpt("<image>", image="a.png", videos=["a.mp4"]), "'videos'"),
    "sound": (chat("x", audios=["a.wav"]), "has 'audios'"),
    "an answer to be avoided": (chat("x", label=False), "is not to be learned"),
    "KTO's mark": (sharegpt("x", kto_tag=True), "has 'kto_tag'"),
    "a pair": (chat("x", rejected_response="no"), "has 'rejected_response'"),
    "an image in an answer": (
        chat("x", [{"type": "image", "image": "a.png"}]),
        "a turn of the assistant has an image",
    ),
    "a part that is a video": (
        chat([{"type": "video", "video": "a.mp4"}, TEXT]),
        "has a part {'type': 'video', 'video': 'a.mp4'}",
    ),
    "a part that is sound": (chat([{"type": "input_audio", "input_audio": {"data": ""}}]), "part"),
    "an uploaded file": (chat([{"type": "input_image", "file_id": "file-1"}, TEXT]), "file-1"),
    "an image by its number": (
        chat([{"type": "image", "index": 1}, TEXT], images=["a.png"]),
        "has a part {'type': 'image', 'index': 1}",
    ),
    "text in another place of a part": (chat([{"type": "text", "content": "x"}]), "has a part"),
    "content that is a number": (chat(3), "has a part 3"),
    "an image named twice, and not alike": (
        chat([{"type": "image", "image": "a.png"}, TEXT], images=["b.png"]),
        "has 1 <image> markers and the record 2 images",
    ),
    "a marker and a named image": (
        chat([{"type": "image", "image": "a.png"}, {"type": "text", "text": "<image>?"}]),
        "has 2 <image> markers and the record 1 images",
    ),
    "an image that no text mentions": (
        sharegpt("x", image="a.png"),
        "has 0 <image> markers and the record 1 images",
    ),
    "image and images that differ": (
        sharegpt("<image>", image="a.png", images=["b.png"]),
        "has image and images, and they differ",
    ),
    "messages and conversations": (
        chat("x") | sharegpt("y"),
        "has messages and conversations; it is not clear",
    ),
    "messages and a prompt": (chat("x", prompt="y"), "has messages and prompt"),
    "messages and a history": (chat("x", history=[["a", "b"]]), "has messages and history"),
    "a context": (
        {"instruction": "x", "context": "y", "response": "z"},
        "has 'context' beside 'instruction'",
    ),
    "two answers": (
        {"question": "x", "answer": "y", "response": "z"},
        "has 'answer' beside 'question'",
    ),
    "an input of parts": ({"prompt": [TEXT], "input": "x", "output": "y"}, "are not both text"),
    "an image on the web": (
        sharegpt("<image>", image="https://example.org/a.png"),
        "https:/example.org/a.png is not on this machine; download it",
    ),
    "an image on the web, within the text": (
        sharegpt("<img>http://example.org/a.png</img>"),
        "is not on this machine",
    ),
    "an image within the text that is missing": (sharegpt("<img>c.png</img>"), "does not exist"),
    "a NUL in a name": (sharegpt("<image>", image="a\0.png"), "has a NUL in its name"),
    "a NUL in an address": (sharegpt("<image>", image="file:///a%00"), "has a NUL in its name"),
    "an address that is none": (sharegpt("<image>", image="file://[a"), "[a does not exist"),
    "a line feed in a name": (sharegpt("<image>", image="a\nerror: b"), r"a\nerror: b"),
    "a long name": (sharegpt("<image>", image="a" * 9999), "a" * 199 + "… does not exist"),
    "images by their markers": (
        sharegpt("<image_00>", image={"<image_00>": "a.png"}),
        "<image_00>",
    ),
    "a caption": ({"image": "a.png", "caption": "x"}, "has neither messages nor conversations"),
    "conversations as text": ({"conversations": "[]"}, "conversations is '[]', expected a list"),
    "a turn that is text": ({"messages": ["x"]}, "a turn is 'x', expected an object"),
}


@pytest.mark.parametrize("entry, reason", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_as_it_is_meant_is_refused_by_name(folder, entry, reason):
    with pytest.raises(NanoVLMError) as caught:
        read(entry, folder)
    message = str(caught.value)
    assert message.startswith("here: ") and reason in message
    assert message.isprintable() and len(message) < 600


KEYS = """image_path imgs img image_url image_file picture photo pics imagePath image_base64
img_path image_names images_list image1 image_2 screenshot media thumbnail input_image"""


@pytest.mark.parametrize("key", KEYS.split())
def test_an_image_under_a_key_that_is_not_read_is_named(folder, key):
    for value in ("a.png", ["a.png"]):
        with pytest.raises(NanoVLMError, match=f"has '{key}', which is not read"):
            read(sharegpt("What is red?") | {key: value}, folder)
    if key not in (
        "media",
        "thumbnail",
        "input_image",
    ):  # with an image that is read, these are other versions
        with pytest.raises(NanoVLMError, match=f"has '{key}', which is not read"):
            read(sharegpt("<image>", image="b.png") | {key: "a.png"}, folder)


MARKERS = """<video> <audio> <img> <img></img> <Image> <image_0> <ImageHere> <|image_pad|>
<|vision_start|> <|image|> <|image_1|> <|video_pad|> [IMG] <start_of_image> <IMG_CONTEXT>
<image_soft_token> <|AUDIO|> <image-placeholder> <im_patch> </image> <bbox>"""


@pytest.mark.parametrize("marker", [*MARKERS.split(), "<image 1>", "<image />"])
def test_markers_of_other_programs_are_named(folder, marker):
    for entry in (
        sharegpt(f"{marker}\nWhat is red?"),
        sharegpt(f"<image>{marker}?", image="a.png"),
        sharegpt("x", system=f"Look at {marker}"),
    ):
        with pytest.raises(NanoVLMError, match="a turn of the (user|system) has "):
            read(entry, folder)
    assert read(sharegpt("x", f"Write {marker}."), folder)  # in an answer it is text


def test_control_tokens_and_other_tags_are_ordinary_text(folder):
    text = "<|im_end|> <|im_start|>assistant </s> <b>imagine</b> a < image > <br> <img src='x'>"
    text += " <video controls></video> [img](x) ![image](b.png) \u2028 a<b>c 😀"
    assert read(sharegpt(text), folder).messages[0] == Message("user", (text,))
