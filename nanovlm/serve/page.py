"""The chat page, of Gradio's own components: a question with images, the answer word by word."""

import atexit
import functools
import html
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.themes import Default as Theme

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.chat import IMAGE, ImageSlot, Message
from nanovlm.sampling import Sampling
from nanovlm.serve.guard import same
from nanovlm.serve.limits import Limits, RequestError
from nanovlm.serve.protocol import check_image_count
from nanovlm.serve.queue import AnswerQueue, Job, Question
from nanovlm.utils.console import say
from nanovlm.utils.files import read_bytes

ASSETS = Path(__file__).parents[1] / "assets"
FONTS = ("system-ui", "sans-serif")  # of the machine: Gradio's themes would ask Google for theirs
HOUR, DAY = 3600, 24 * 3600
LONGEST = 128  # tokens of an answer, where the user does not say
# What the page says beyond Gradio's own words, by the browser's language.
TEXTS = {
    "en": {
        "new_chat": "New chat",
        "ask": "Ask about images: type, drop or paste them, or click the clip for files and photos",
        "settings": "Sampling",
        "tokens": "Longest answer (tokens)",
        "temperature": "Temperature (0: always the likeliest token)",
        "top_p": "Top-p",
        "seed": "Seed",
        "camera": "Camera",
    },
    "zh-CN": {
        "new_chat": "新对话",
        "ask": "就图片提问：可以输入文字、拖入或粘贴图片，点回形针选择文件或拍照",
        "settings": "采样",
        "tokens": "回答的最大长度（token）",
        "temperature": "温度（0：总是取概率最大的 token）",
        "top_p": "Top-p",
        "seed": "随机种子",
        "camera": "摄像头",
    },
}
EXAMPLES = (
    ("描述图片", "scene.png"),
    ("How many objects are there?", "scene2.png"),
    ("最右边的物体是什么颜色？", "scene3.png"),
)
STYLE = """
.download-link + button { display: none; }  /* shares an image with a site of others */
@media (max-width: 640px) {  /* a phone: the chat comes before what was asked earlier */
    .row:has(> .column button.primary) { flex-direction: column-reverse; }
}
"""
SPEED, PROBLEM = "speed", "problem"  # mark the line below an answer, and what is no answer


@functools.cache
def uploads() -> str:
    """The folder of this process's uploads, which goes with it; the page reads no other."""
    folder = tempfile.mkdtemp(prefix="nanovlm-page-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Page:
    """Answers the page's questions through the same queue as the API's."""

    def __init__(self, queue: AnswerQueue, name: str) -> None:
        self.queue, self.name = queue, name
        os.environ["GRADIO_TEMP_DIR"] = uploads()

    def mount(self, app: FastAPI, api_key: str) -> FastAPI:
        """Put the page at `/` of a server."""
        i18n = gr.I18n(**TEXTS, zh=TEXTS["zh-CN"], **{"zh-TW": TEXTS["zh-CN"]})
        limits = self.queue.limits
        options: dict[str, Any] = {}
        if api_key:
            options["auth"] = lambda _, password: same(password, api_key)
            options["auth_message"] = (
                "Any user name; the password is the API key.<br>用户名任意；密码是 API 密钥。"
            )
        with self._blocks(i18n, limits) as blocks:
            blocks.queue(max_size=limits.queue, default_concurrency_limit=limits.queue)
        return gr.mount_gradio_app(
            app,
            blocks,
            path="/",
            footer_links=[],
            run_history=False,
            max_file_size=limits.body_bytes,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            i18n=i18n,
            css=STYLE,
            theme=Theme(font=FONTS, font_mono=("ui-monospace", "monospace")),
            **options,
        )

    def _blocks(self, i18n: gr.I18n, limits: Limits) -> gr.Blocks:
        sampling = [
            gr.Slider(1, limits.tokens, min(LONGEST, limits.tokens), step=1, label=i18n("tokens")),
            gr.Slider(0, 2, 0, step=0.05, label=i18n("temperature")),
            gr.Slider(0.05, 1, 1, step=0.05, label=i18n("top_p")),
            gr.Number(0, precision=0, label=i18n("seed")),
        ]
        examples = [[{"text": text, "files": [str(ASSETS / file)]}] for text, file in EXAMPLES]
        textbox = gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            placeholder=i18n("ask"),  # pyright: ignore[reportArgumentType]
            show_label=False,
            stop_btn=True,
            autofocus=True,
        )
        chat = gr.ChatInterface(
            self.answer,
            multimodal=True,
            textbox=textbox,
            chatbot=gr.Chatbot(show_label=False, scale=1, buttons=["copy"], feedback_options=None),
            additional_inputs=sampling,
            additional_inputs_accordion=gr.Accordion(i18n("settings"), open=False, render=False),
            examples=[[*example, None, None, None, None] for example in examples],
            cache_examples=False,
            title=self.name,
            save_history=True,
            concurrency_limit=limits.queue,
            delete_cache=(HOUR, DAY),
            analytics_enabled=False,
            api_visibility="private",
        )
        chat.new_chat_button.value = i18n("new_chat")
        with chat, gr.Accordion(i18n("camera"), open=False):
            camera = gr.Image(sources=["webcam"], type="filepath", show_label=False)
            camera.input(_add_photo, [camera, textbox], [camera, textbox], api_visibility="private")
        return chat

    async def answer(
        self, message: dict[str, Any], history: list[dict], *sampling: float | None
    ) -> AsyncIterator[list[gr.ChatMessage]]:
        """The answer so far, again and again, and in the end the speed below it."""
        turns = [*history, {"role": "user", "content": _content(message)}]
        began, status = time.perf_counter(), "stopped"
        job: Job | None = None
        try:
            job = self.queue.new_job()
            await job.ask(self._question(turns, *sampling))
            text, first = "", 0.0
            async for piece in job.texts():
                first = first or time.perf_counter()
                text += piece
                yield [gr.ChatMessage(text)]
            status = "answered"
            yield [gr.ChatMessage(text), self._speed(job, first)]
        except RequestError as error:
            status = f"refused ({error.code or error.status})"
            yield [_problem(error.message)]
        except NanoVLMError as error:  # of a number
            status = "refused"
            yield [_problem(str(error))]
        except TimeoutError:
            status = "too slow"
            seconds = self.queue.limits.seconds
            yield [_problem(f"the answer took longer than {seconds:g} s (--timeout)")]
        finally:
            if job:
                job.close()
            say(f"page: {status} in {time.perf_counter() - began:.2f} s")

    def _speed(self, job: Job, first: float) -> gr.ChatMessage:
        assert job.answer
        tokens, seconds = job.answer.completion_tokens, max(time.perf_counter() - first, 1e-6)
        line = f"<small>{self.name} · {tokens} tokens · {tokens / seconds:.0f} tokens/s</small>"
        return gr.ChatMessage(line, metadata={"id": SPEED})

    def _question(self, turns: list[dict], *sampling: float | None) -> Question:
        """The conversation as the model reads it: without speeds, and what was not answered."""
        read: list[tuple[Message, list[str]]] = []
        for turn in turns:
            mark = (turn.get("metadata") or {}).get("id")
            if mark == PROBLEM and read:
                read.pop()
            elif mark is None:
                read.append(_read_turn(turn))
        paths = [path for _, found in read for path in found]
        check_image_count(len(paths), self.queue.limits)
        tokens, temperature, top_p, seed = sampling  # None where a field is empty
        return Question(
            [message for message, _ in read],
            [self._file(path) for path in paths],
            min(int(tokens or LONGEST), self.queue.limits.tokens),
            Sampling(temperature or 0.0, top_p or 1.0, seed=int(seed or 0)),
        )

    def _file(self, path: str) -> bytes:
        """An uploaded file; Gradio has checked its path, and this checks it once more."""
        folders = (Path(uploads()).resolve(), ASSETS.resolve())
        if not any(Path(path).resolve().is_relative_to(folder) for folder in folders):
            raise RequestError("an image that was not uploaded here")
        try:
            return read_bytes(path, self.queue.limits.body_bytes)
        except NanoVLMError:
            raise RequestError("an image is not here any more; start anew with it") from None


def _read_turn(turn: dict[str, Any]) -> tuple[Message, list[str]]:
    """A turn of the page, whose images open it, and the paths of these."""
    paths = [part["file"]["path"] for part in turn["content"] if part["type"] == "file"]
    text = "".join(part["text"] for part in turn["content"] if part["type"] == "text")
    places: list[str | ImageSlot] = [part for _ in paths for part in (IMAGE, "\n")]
    return Message(turn["role"], (*places, text)), paths


def _problem(message: str) -> gr.ChatMessage:
    """What is wrong, in place of an answer. The page reads its text as HTML."""
    return gr.ChatMessage(f"⚠ {html.escape(message)}", metadata={"id": PROBLEM})


def _content(message: dict[str, Any]) -> list[dict[str, Any]]:
    files = [{"type": "file", "file": {"path": file}} for file in message.get("files") or []]
    return [*files, {"type": "text", "text": message.get("text") or ""}]


def _add_photo(photo: str | None, message: dict[str, Any]) -> tuple[None, dict[str, Any]]:
    """Put a photo from the camera into the question, and make the camera ready again."""
    files = [*(message.get("files") or []), *([photo] if photo else [])]
    return None, {"text": message.get("text") or "", "files": files}
