"""The chat page: in a real browser where there is one, and what its part of the server refuses."""

import asyncio
import shutil
import time

import pytest

pytest.importorskip("gradio", reason="python -m pip install -r requirements-web.txt")

from nanovlm.engine.answering import Writer
from nanovlm.sampling import Sampling
from nanovlm.serve.limits import Limits
from nanovlm.serve.page import Page, uploads
from nanovlm.serve.server import Site
from tests.serve.serving import ASSETS, DESCRIPTION, NAME, served

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WITH_PAGE = Site(NAME)


@pytest.fixture(scope="module")
def server(model):
    with served(model, Limits(images=2), WITH_PAGE) as running:
        yield running


def call(client, name: str, *data) -> str:
    """Call one of the page's functions as its code does; the events that come back."""
    config = client.get("/config").json()
    number = next(
        each["id"] for each in config["dependencies"] if each["api_name"].startswith(name)
    )
    body = {"data": data, "fn_index": number, "session_hash": "test"}
    joined = client.post("/gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        return joined.text
    with client.stream("GET", "/gradio_api/queue/data?session_hash=test") as events:
        said = ""
        for line in events.iter_lines():
            said += line
            if "process_completed" in line or "close_stream" in line:
                return said
    return said


def file_data(path: str) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def test_the_page_sends_browsers_to_no_other_host(server):
    with server.client() as client:
        page = client.get("/")
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'self' ") and "http" not in policy
        config = client.get("/config").json()
        assert not config["analytics_enabled"]
        for linked in ("<script src=", '<link rel="stylesheet" href=', "preconnect"):
            assert f'{linked}"http' not in page.text
        assert "fonts.google" not in page.text + client.get("/theme.css").text


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "nanovlm/serve/page.py", "../etc/passwd", "https://example.com/a.png"]
)
def test_no_path_on_disk_can_be_named(server, path):
    with server.client() as client:
        for address in (f"/gradio_api/file={path}", f"/file={path}", f"/gradio_api/proxy={path}"):
            response = client.get(address)
            assert response.status_code >= 300, address
            assert "root:" not in response.text and "gradio as gr" not in response.text
        message = {"text": "?", "files": [file_data(path)]}
        history = [{"role": "user", "content": [{"type": "file", "file": file_data(path)}]}]
        for name, data in (("_clear_and_save", [message]), ("_append", [message, history])):
            said = call(client, name, *data)
            assert '"success":false' in said.replace(" ", "") or "error" in said, said


def test_an_empty_field_and_an_image_that_is_gone_are_no_tracebacks(server):
    page = Page(server.server.queue, NAME)
    asked = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    question = page._question([asked], None, None, None, None)
    assert (question.max_new_tokens, question.sampling) == (128, Sampling())
    assert page._question([asked], 10**6, 0, 1, 0).max_new_tokens == 512

    async def answer(message: dict, seed: float) -> str:
        (said,) = [each async for each in page.answer(message, [], 10, 0, 1, seed)]
        return said[0].content

    gone = {"text": "?", "files": [f"{uploads()}/gone.png"]}
    assert "not here any more" in asyncio.run(answer(gone, 0))
    assert "not uploaded here" in asyncio.run(answer({"files": ["/etc/passwd"]}, 0))
    assert "seed" in asyncio.run(answer({"text": "?"}, 1e30))


def test_the_page_asks_for_the_key(model):
    site = Site(NAME, api_key="秘密", local_only=False)
    with served(model, Limits(), site) as server, server.client() as client:
        assert client.get("/config").status_code == 401
        assert client.get("/gradio_api/info").status_code == 401
        assert client.post("/gradio_api/upload").status_code == 401
        assert client.post("/gradio_api/queue/join", json={}).status_code == 401
        assert "API" in client.get("/").text
        for password, status in (("wrong", 400), ("秘密", 200)):
            login = client.post("/login", data={"username": "me", "password": password})
            assert login.status_code == status
        assert client.get("/config").status_code == 200
        evil = client.get("/config", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in evil.headers


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="python -m pip install playwright")
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--use-fake-device-for-media-stream"]
        arguments += ["--use-fake-ui-for-media-stream"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The page in Chinese, which asks no other host."""
    context = browser.new_context(locale="zh-CN")
    context.set_default_timeout(20_000)
    page, others = context.new_page(), []
    page.on("request", lambda request: others.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("textarea")
    page.wait_for_timeout(300)  # its code is still being loaded
    yield page
    context.close()
    assert not [url for url in others if not url.startswith((server.url, "data:", "blob:"))]


def ask(page, text: str, *images: str) -> None:
    page.wait_for_selector("[aria-label=Submit]")
    page.wait_for_selector("textarea:enabled")
    if images:
        page.set_input_files("input[type=file]", [str(ASSETS / image) for image in images])
        page.wait_for_selector(f".thumbnails > *:nth-child({len(images)})")
    page.fill("textarea", text)
    page.keyboard.press("Enter")


def answers(page) -> list[str]:
    return [each.inner_text() for each in page.query_selector_all("[data-testid=bot]")]


def wait_for_answer(page, number: int) -> None:
    """Until the speed stands under answer `number`."""
    for _ in range(2000):
        if sum("tokens/s" in answer for answer in answers(page)) >= number:
            return
        page.wait_for_timeout(10)
    raise AssertionError(answers(page))


def test_a_conversation_about_an_image(page):
    assert page.locator("textarea").get_attribute("placeholder").startswith("就图片提问")
    assert page.get_by_text("采样").is_visible() and page.get_by_text("新对话").is_visible()
    ask(page, "描述图片", "scene.png")
    wait_for_answer(page, 1)
    first, speed = answers(page)
    assert first == DESCRIPTION
    assert speed.startswith(f"{NAME} · 21 tokens · ")
    ask(page, "图中有几个物体？")
    wait_for_answer(page, 2)
    assert answers(page)[2] == "三个。"
    page.get_by_label("重试").click()
    page.wait_for_timeout(200)
    wait_for_answer(page, 2)
    assert answers(page)[2] == "三个。" and len(answers(page)) == 4


def test_an_example_is_answered(page):
    page.get_by_text("How many objects are there?").click()
    wait_for_answer(page, 1)
    assert answers(page)[0] == "Three."


def test_words_stream_in_and_the_answer_can_be_stopped(page, server, model, monkeypatch):
    put, written = Writer.put, []

    def slowly(writer, token):
        written.append(token)
        time.sleep(0.03)
        return put(writer, token)

    monkeypatch.setattr(Writer, "put", slowly)
    monkeypatch.setattr(model.chat, "stop_ids", set())
    ask(page, "描述图片", "scene.png")
    page.wait_for_function("document.querySelector('[data-testid=bot]')?.innerText.length > 3")
    early = answers(page)[0]
    page.wait_for_function(
        "length => document.querySelector('[data-testid=bot]').innerText.length > length",
        arg=len(early),
    )
    page.get_by_label("Stop").or_(page.get_by_label("停止")).first.click()
    server.wait_for_places(0)
    assert len(written) < 120
    page.wait_for_selector("[aria-label=Submit]")


def test_an_error_is_shown_and_the_next_question_answered(page):
    ask(page, "a <image> b")
    page.get_by_text("a message contains '<image>'").wait_for()
    ask(page, "描述图片", "scene.png", "scene2.png", "scene3.png")
    page.get_by_text("3 images, and this server reads at most 2").wait_for()
    ask(page, "描述图片", "scene.png")
    wait_for_answer(page, 1)
    assert answers(page)[2] == DESCRIPTION


def test_a_photo_is_taken(page):
    page.get_by_text("摄像头").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('video')?.videoWidth > 0")
    page.get_by_label("capture photo").click()
    page.wait_for_selector(".thumbnails > *:nth-child(1)")
    ask(page, "有几个物体？")
    wait_for_answer(page, 1)


def test_the_page_fits_a_phone(server, browser):
    with browser.new_context(viewport={"width": 390, "height": 780}, is_mobile=True) as context:
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("textarea")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        box = page.locator("textarea").bounding_box()
        assert box["y"] + box["height"] <= 780


def test_the_server_ends_while_a_page_is_open(model, browser):
    with served(model, Limits(), WITH_PAGE) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("textarea")
        began = time.monotonic()
    assert time.monotonic() - began < 10
    page.close()
