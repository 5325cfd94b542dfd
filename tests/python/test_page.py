"""The server's page, in a browser: Debian's Chromium, driven by playwright."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from python.tiny_model import write_tiny_model

from sbd_engine import Engine

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("fastapi")
from python.serving import Served, serve, until  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.xdist_group("page"),  # one browser
]
HELLO = "Hello the world"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serve(engine) as served:
        yield served


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; in the end nothing of it may have failed or asked another host."""
    contexts, faults = [], []

    def open_page(served: Served, refusals: int = 0, **settings: Any) -> Any:
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        refused = []

        def hear(message: Any) -> None:
            if message.type in ("error", "warning"):
                kept = refused if "Failed to load resource" in message.text else faults
                kept.append(message.text)
                if len(refused) > refusals:
                    faults.append(message.text)

        page.on("console", hear)
        page.on("pageerror", lambda error: faults.append(str(error)))
        home = f"http://127.0.0.1:{served.port}/"
        page.on("request", lambda r: r.url.startswith((home, "data:")) or faults.append(r.url))
        page.set_default_timeout(20_000)
        page.goto(home)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def set_options(page: Any, **options: object) -> None:
    page.get_by_role("button", name="Options").click()
    for name, value in options.items():
        field = page.locator(f"#options [name={name}]")
        if field.evaluate("e => e.tagName") == "SELECT":
            field.select_option(str(value))
        else:
            field.fill(str(value))
    page.get_by_role("button", name="Close").click()


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def wait_for_answer(page: Any, count: int = 1) -> Any:
    """The last answer, of so many, once it has ended."""
    answer = page.locator(".answer[aria-busy=false]").nth(count - 1)
    answer.wait_for(state="attached")
    return answer


def expected(engine: Engine, *messages: dict[str, str], **options: Any) -> Any:
    return engine.generate(engine.tokenizer.encode_chat(messages), **options)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def letters(text: str) -> str:
    """Random weights write all kinds of Markdown and control characters besides."""
    return "".join(c for c in text if c.isascii() and c.isalpha())


def test_turns_as_the_engine_answers_them(
    engine: Engine, served: Served, open_page: Callable[..., Any]
) -> None:
    page = open_page(served)
    set_options(page, max_tokens=24, system="Be brief")
    said = [{"role": "system", "content": "Be brief"}]
    for number, text in enumerate((HELLO, "and again?"), 1):
        ask(page, text)
        said.append(user(text))
        done = expected(engine, *said, max_tokens=24)
        answer = wait_for_answer(page, number)
        assert letters(answer.inner_text()) == letters(done.text)
        figures = page.locator(".turn .figures").nth(number - 1).inner_text()
        assert f"{len(done.tokens)} tokens" in figures
        assert f"{done.stats.nfe} forwards" in figures
        assert f"{done.stats.tokens_per_forward:.2f} tokens per forward" in figures
        assert ("prompt tokens cached" in figures) or number == 1
        said.append({"role": "assistant", "content": done.text})
    assert "of 512 tokens of context" in page.locator("#room").inner_text()
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0


def test_a_block_fills_in(engine: Engine, served: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(served)
    set_options(page, max_tokens=32, decoder="sbd", pause=150)
    done = expected(engine, user(HELLO), max_tokens=32, decoder="sbd")
    ask(page, HELLO)
    page.locator(".cell.fresh").first.wait_for()
    cells, masks = page.locator(".cell").count(), page.locator(".cell.mask").count()
    assert cells == 16
    assert 0 < masks < 16
    assert "of 16 decided" in page.locator(".block .title").inner_text()
    assert page.locator(".block").get_attribute("aria-hidden") == "true"
    shares = page.locator(".cell:not(.mask)").evaluate_all(
        "all => all.map(e => +e.style.getPropertyValue('--p'))"
    )
    assert all(0 <= share <= 1 for share in shares)
    wait_for_answer(page)
    assert not page.locator(".block").is_visible()
    page.get_by_role("button", name="Tokens").click()
    tokens = page.locator(".tokens span").evaluate_all("all => all.map(e => e.textContent)")
    assert len(tokens) == len(done.tokens)
    told = page.locator(".tokens span").first.get_attribute("title")
    assert re.fullmatch(r"forward \d+, probability [01]\.\d+, entropy \d\.\d+ nats", told)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Its texts take minutes, at the pace of a model that people use: thousands of tokens a second
    leave a browser on a busy machine no time for a click. One thread, as several wait for each
    other in every layer while a busy machine runs none."""
    model = write_tiny_model(tmp_path_factory.mktemp("endless"), n_ctx=100_000, layers=60)
    with Engine(model, n_threads=1) as engine, serve(engine) as served:
        yield served


@pytest.mark.parametrize("way", ["Escape", "Stop the answer"])
def test_stopping(way: str, endless: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(endless)
    set_options(page, decoder="ntp", seed=3)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(
            post_data=json.dumps(json.loads(route.request.post_data) | {"ignore_eos": True})
        ),
    )
    ask(page, HELLO)
    page.locator(".answer").filter(has_text=re.compile(r"\S")).wait_for()
    if way == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name=way).click()
    answer = wait_for_answer(page)
    until(lambda: endless.metric("sbd_requests_running") == 0)
    text = answer.inner_text()
    assert text
    assert "stopped" in page.locator(".turn .figures").inner_text()
    assert page.get_by_role("status").inner_text() == "Stopped"
    page.wait_for_timeout(100)
    assert answer.inner_text() == text


def test_another_answer(engine: Engine, served: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(served)
    set_options(page, max_tokens=24, temperature=0.9, seed=3)
    ask(page, HELLO)
    options = {"max_tokens": 24, "temperature": 0.9}
    first = wait_for_answer(page).inner_text()
    assert letters(first) == letters(expected(engine, user(HELLO), seed=3, **options).text)
    assert "seed 3" in page.locator(".turn .figures").inner_text()
    set_options(page, seed=4)
    page.get_by_role("button", name="Regenerate").click()
    page.locator(".figures", has_text="seed 4").wait_for()
    second = wait_for_answer(page).inner_text()
    assert letters(second) == letters(expected(engine, user(HELLO), seed=4, **options).text)
    assert page.locator(".turn").count() == 1


def test_before_the_models_are_known(served: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(served)
    asked = []

    def hold(route: Any) -> None:
        asked.append(route)

    page.route("**/v1/models", hold)
    page.reload()
    page.get_by_role("button", name="Options").click()
    page.locator("#options [name=max_tokens]").fill("4")
    ask(page, HELLO)
    asked.pop().continue_()
    wait_for_answer(page)
    assert "4 tokens" in page.locator(".turn .figures").inner_text()
    assert page.locator("#options").is_visible()


def test_errors(served: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(served, refusals=2)
    set_options(page, top_p=7)
    ask(page, HELLO)
    problem = page.get_by_role("alert")
    problem.get_by_text("expected top_p above 0 and at most 1, got 7").wait_for()
    field = page.get_by_label("Top p")
    assert field.get_attribute("aria-invalid") == "true"
    assert field.is_visible()
    assert page.get_by_label("Message").input_value() == HELLO  # to be sent again
    assert page.locator(".turn").count() == 0
    field.fill("")
    assert field.get_attribute("aria-invalid") == "false"
    ask(page, "x" * 600)
    problem.get_by_text("512").wait_for()
    page.get_by_label("Most tokens").fill("some")
    ask(page, HELLO)
    problem.get_by_text("expected a whole number as max_tokens, got some").wait_for()
    page.get_by_label("Most tokens").fill("4")
    ask(page, HELLO)
    wait_for_answer(page)
    assert not problem.is_visible()


HOSTILE = """<script>fault()</script><img src=x onerror="fault()"> **<b>bold</b>** *it _is_*

[one](javascript:fault()) [two](https://example.org/?a="><script>) [three](data:text/html,x)
![four](http://example.org/x.png) https://example.org/five.

# <i>heading</i>
- item `<code>`
  - inner
1. first

> quoted

***both*** and **strong *within***

| a | b |
|---|---|
| <u>c</u> | d |

```html
<script>fault()</script>
```
*** __ ~~ ** [ ]( ` unclosed"""
ALLOWED = {
    *("P", "BR", "STRONG", "EM", "A", "H1", "UL", "OL", "LI", "CODE", "BLOCKQUOTE", "TABLE"),
    *("THEAD", "TBODY", "TR", "TH", "TD", "DIV", "PRE", "BUTTON"),
}


def streamed(*texts: str) -> str:
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)


def test_no_text_becomes_markup(served: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(served)
    body = streamed(*(HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7))) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=body),
    )
    ask(page, "<b>me</b>")
    answer = wait_for_answer(page)
    assert page.locator(".user").inner_text().endswith("<b>me</b>")
    nodes = answer.locator("*").evaluate_all(
        "all => all.map(n => [n.tagName, [...n.attributes].map(a => a.name)])"
    )
    assert {tag for tag, _ in nodes} == ALLOWED
    names = {name for _, attributes in nodes for name in attributes}
    assert names <= {"class", "href", "rel", "target", "title", "type", "tabindex", "role",
                     "aria-label", "start"}  # fmt: skip
    links = answer.locator("a").evaluate_all("all => all.map(e => [e.href, e.rel, e.textContent])")
    assert [link[0] for link in links] == [
        "https://example.org/?a=%22%3E%3Cscript%3E",
        "http://example.org/x.png",
        "https://example.org/five",
    ]
    assert all("noopener" in rel for _, rel, _ in links)
    assert answer.locator("em > strong").inner_text() == "both"
    assert answer.locator("strong > em").inner_text() == "within"
    text = answer.inner_text()
    for literal in ("<script>fault()</script>", "<b>bold</b>", "[one](javascript:fault())"):
        assert literal in text
    assert "*** __ ~~ ** [ ]( ` unclosed" in text


def test_a_stream_that_breaks_off(served: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(served)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=streamed("half")),
    )
    ask(page, HELLO)
    assert wait_for_answer(page).inner_text() == "half"
    page.get_by_role("alert").get_by_text("the connection ended before the answer did").wait_for()


def test_a_model_without_a_template_completes(
    plain_model: Path, open_page: Callable[..., Any]
) -> None:
    with Engine(plain_model) as engine, serve(engine) as served:
        page = open_page(served)
        page.get_by_text("This model completes texts.").wait_for()
        assert not page.get_by_label("System prompt").is_visible()
        set_options(page, max_tokens=16)
        page.get_by_label("A text to complete").fill(f" {HELLO}")
        page.keyboard.press("Enter")
        done = engine.generate(f" {HELLO}", max_tokens=16)
        assert letters(wait_for_answer(page).inner_text()) == letters(done.text)


def test_a_key_is_asked_for(engine: Engine, open_page: Callable[..., Any]) -> None:
    with serve(engine, keys=["secret"]) as served:
        page = open_page(served, refusals=2)
        for key in ("wrong", "secret"):
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Go on").click()
        page.get_by_text("Say something.").wait_for()
        set_options(page, max_tokens=4)
        ask(page, HELLO)
        wait_for_answer(page)


@pytest.mark.parametrize(("scheme", "other"), [("light", "Dark"), ("dark", "Light")])
def test_light_and_dark(
    scheme: str, other: str, served: Served, open_page: Callable[..., Any]
) -> None:
    page = open_page(served, color_scheme=scheme)

    def brightness() -> float:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(float, colour[4:-1].split(",")))

    before = brightness()
    assert (before > 384) == (scheme == "light")
    page.get_by_role("button", name=f"{other} colours").click()
    assert (brightness() > 384) == (scheme == "dark")
    page.reload()
    assert (brightness() > 384) == (scheme == "dark")  # kept


@pytest.mark.parametrize("width", [320, 375, 1200])
def test_it_fits(width: int, served: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(served, viewport={"width": width, "height": 640})
    set_options(page, max_tokens=32, decoder="sbd")
    ask(page, "a long word: " + "x" * 200)
    wait_for_answer(page)
    page.get_by_role("button", name="Tokens").click()
    for _ in range(2):  # the options closed and open
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="Options").click()
    names = page.locator("input, select, textarea, button").evaluate_all(
        "all => all.filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).length"
    )
    assert names == 0


def test_keys(served: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(served)
    set_options(page, max_tokens=4)
    box = page.get_by_label("Message")
    box.focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert box.input_value() == "one\ntwo"
    page.keyboard.press("Enter")
    wait_for_answer(page)
    assert page.locator(".user").inner_text().endswith("one\ntwo")
    page.get_by_role("button", name="Options").press("Enter")
    page.keyboard.press("Escape")
    assert not page.get_by_label("Decoder").is_visible()
