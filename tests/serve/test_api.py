"""The API as OpenAI's own client and curl use it."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="python -m pip install -r requirements-web.txt")
pytest.importorskip("openai", reason="python -m pip install -r requirements-dev.txt")

import openai

from nanovlm.serve.limits import Limits
from tests.pages import REPOSITORY, TEXTS, code_blocks
from tests.serve.serving import (
    DESCRIPTION,
    NAME,
    Gate,
    data_uri,
    error_of,
    image_part,
    question,
    served,
)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_answer(client):
    completion = client.chat.completions.create(**question())
    (choice,) = completion.choices
    assert choice.message.content == DESCRIPTION
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "stop", 0)
    assert (completion.object, completion.model) == ("chat.completion", NAME)
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (69, 21, 90)


def test_a_stream_says_the_same(client):
    options = {"include_usage": True}
    chunks = [*client.chat.completions.create(**question(), stream=True, stream_options=options)]
    first, *_, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == DESCRIPTION and len([text for text in texts if text]) > 5
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == [] and usage.usage.total_tokens == 90
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_without_include_usage_no_chunk_has_any(server):
    lines = server.post(question(stream=True)).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert not [line for line in lines if "usage" in line]


@pytest.mark.parametrize("first", ["text", "image"])
def test_an_image_may_stand_before_or_after_the_text(server, first):
    asked = question()
    if first == "image":
        asked["messages"][0]["content"].reverse()
    assert server.post(asked).json()["choices"][0]["message"]["content"] == DESCRIPTION


def test_a_conversation_goes_on_and_each_answer_is_its_own(client):
    turns = question()["messages"]
    answer = client.chat.completions.create(model=NAME, messages=turns).choices[0].message.content
    turns += [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "图中有几个物体？"},
    ]
    second = client.chat.completions.create(model=NAME, messages=turns)
    assert second.choices[0].message.content == "三个。"
    english = question("How many objects are there?", image_part(data_uri("scene3.png")))
    assert client.chat.completions.create(**english).choices[0].message.content == "Four."


def test_a_later_turn_reads_only_what_is_new(server):
    turns = question("图中有什么？")["messages"]
    server.post({"model": NAME, "messages": turns})
    conversation = server.server.queue._conversations[-1]
    read = []
    forward = conversation.model.embed

    def counting(batch):
        read.append(batch.input_ids.shape[1])
        return forward(batch)

    conversation.model.embed = counting
    try:
        turns += [{"role": "assistant", "content": "三个物体。"}, {"role": "user", "content": "？"}]
        assert server.post({"model": NAME, "messages": turns}).status_code == 200
    finally:
        del conversation.model.embed
    assert server.server.queue._conversations[-1] is conversation
    assert read[0] < 30  # of about 90


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens_ends_an_answer(client, limit):
    completion = client.chat.completions.create(**question(), **{limit: 4})
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 4
    assert DESCRIPTION.startswith(completion.choices[0].message.content)


@pytest.mark.parametrize("stop", ["大的蓝色", ["没有", "大的蓝色"]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_an_answer_and_is_left_out(server, stop, stream):
    asked = question(stop=stop, stream=stream)
    if stream:
        events = [line[6:] for line in server.post(asked).text.split("\n\n") if line[:6]]
        choices = [json.loads(event)["choices"][0] for event in events[:-1]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        reason = choices[-1]["finish_reason"]
    else:
        choice = server.post(asked).json()["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == (DESCRIPTION.partition("大的蓝色")[0], "stop")


def test_a_seed_repeats_a_sampled_answer(client, monkeypatch):
    def text(seed: int | None) -> str:
        asked = question(temperature=2.0, top_p=0.999, max_tokens=24, seed=seed)
        return client.chat.completions.create(**asked).choices[0].message.content

    answers = [text(seed) for seed in range(12)]
    assert answers[7] == text(7)
    assert len(set(answers)) > 2
    drawn = iter(range(12))  # the seeds of requests that have none
    monkeypatch.setattr("nanovlm.serve.protocol.secrets.randbits", lambda bits: next(drawn))
    assert [text(None) for _ in range(12)] == answers


def test_what_waits_together_is_answered_together(model, monkeypatch):
    """Each gets its own answer, as if it were alone, though they differ in every setting."""
    asked = [
        question(),
        question("How many objects are there?", image_part(data_uri("scene3.png"))),
        question(max_tokens=3),
        question(stop="大的蓝色"),
        question(temperature=1.5, seed=3, max_tokens=20),
        {"model": NAME, "messages": [{"role": "user", "content": "你好"}], "max_tokens": 5},
    ]
    with served(model, Limits(together=4)) as server:
        alone = [server.post(each).json() for each in asked]
        gate = Gate(server.server, monkeypatch)
        with ThreadPoolExecutor(len(asked)) as pool:
            first = pool.submit(server.post, asked[0])
            server.wait_for_places(1)
            together = [pool.submit(server.post, each) for each in asked[1:]]
            server.wait_for_places(len(asked))
            gate.open()
            answers = [each.result().json() for each in [first, *together]]
    assert max(gate.batches) >= 4 and sum(gate.batches) == len(asked)
    for one, other in zip(alone, answers):
        assert one["choices"] == other["choices"] and one["usage"] == other["usage"]


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "nanovlm"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'"):
        client.models.retrieve("gpt-5")


def test_health(server):
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ok"}


def test_the_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="ask for 'tiny-vlm'") as caught:
        client.chat.completions.create(**{**question(), "model": "gpt-5"})
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="n 2 is not supported"):
        client.chat.completions.create(**question(), n=2)


def test_parameters_that_change_nothing_are_ignored(server):
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "n": 1,
        "logprobs": False,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": None,
        "audio": None,
    }
    answer = server.post(question(**harmless)).json()
    assert answer["choices"][0]["message"]["content"] == DESCRIPTION


@pytest.mark.parametrize(
    "change, param",
    [
        ({"n": 2}, "n"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "system", "content": [image_part()]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0].text"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_what_would_change_the_answer_is_refused(server, change, param):
    response = server.post({**question(), **change})
    error = error_of(response)
    assert response.status_code == 400, error
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error


@pytest.mark.parametrize("token", ["<image>", "<|im_start|>", "</s>", "<user>"])
def test_a_control_token_in_a_message_is_refused(server, token):
    error = error_of(server.post(question(f"a {token} b")))
    assert error["code"] == "control_token" and token in error["message"]


def test_a_prompt_that_is_too_long_is_refused(server):
    for text in ("红色" * 3000, "长" * 10**6):
        response = server.post(question(text))
        assert response.status_code == 400
        assert error_of(response)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["/v1/models"], "200"),
        (["/v1/nothing"], "404"),
        (["-X", "PUT", "/v1/models"], "405"),
        (["/v1/chat/completions"], "405"),
        (["-d", "{}", "/v1/chat/completions"], "415"),  # curl's type is that of a form
        (["--json", "{}", "/v1/chat/completions"], "400"),
        (["--json", "nonsense", "/v1/chat/completions"], "400"),
    ],
)
def test_curl(server, arguments, status):
    *flags, path = arguments
    command = ["curl", "-s", "-w", "\n%{http_code}", *flags, server.url + path]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    body, _, got = done.stdout.rpartition("\n")
    assert got == status
    assert ("error" in json.loads(body)) == (status != "200")


@pytest.mark.parametrize("language", ["sh", "python"])
def test_the_examples_of_the_documentation(server, language):
    blocks = code_blocks(TEXTS["docs/en/serve.md"])
    (example,) = (block for kind, block in blocks if kind == language)
    assert "http://127.0.0.1:8000/v1" in example
    example = example.replace("http://127.0.0.1:8000", server.url)
    command = {"sh": ["sh", "-c"], "python": [sys.executable, "-c"]}[language]
    done = subprocess.run([*command, example], capture_output=True, check=True, cwd=REPOSITORY)
    if language == "sh":
        assert json.loads(done.stdout)["choices"][0]["message"]["content"] == DESCRIPTION
    else:
        assert done.stdout == b"Three."
