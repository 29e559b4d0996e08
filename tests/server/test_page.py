"""The page in headless Chromium, from upload to citation; and its pure functions in Node."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from longverse.inference.engine import Engine, Session
from longverse.inference.sampling import Sampling
from longverse.server.service import Settings
from tests.server.common import Running, serving, wait_for

STATIC = Path(__file__).parents[2] / "longverse" / "server" / "static"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
REPORT = f"""# The mill of Ost

The mill stands in Ost. It was built by Ada Rell in 1871. 它由石头建成。

{EVIL} stands in a paragraph.

## Later years

A storm took the roof in 1902. The mill of Ost was sold to Bo Finn for 900 crowns.
"""
# The document given in this tab: the shelf shows those of earlier tests too, read long ago and not chosen here.
READ = "#shelf li.chosen >> text=fits · read"
ANSWERS = {
    "Who built the mill?": "It was built by Ada Rell in 1871.",
    "What happened to the roof in 1902?": "A storm took the roof in 1902.",
    "Say markup.": EVIL,
    "Go on and on.": "on " * 2000,
    "Who is Zed Quorl?": "Zed Quorl is a baker.",
}


class Parrot(Session):
    """Reads the prompt as the engine does, and then says what stands in ANSWERS: a random model would babble."""

    def stream(self, prompt_ids: list[int], sampling: Any = None, **more: Any) -> Iterator[str]:
        ids = more.pop("ids", None)
        list(super().stream(prompt_ids, Sampling(max_new_tokens=1), **more))
        if self.stats.finish_reason == "cancelled":
            return
        prompt = self.engine.tokenizer.decode(prompt_ids)
        answer = next(answer for question, answer in ANSWERS.items() if question in prompt[prompt.rindex("user") :])
        for word in answer.split(" "):
            time.sleep(0.003)
            if more["cancelled"]():
                self.stats.finish_reason = "cancelled"
                return
            self.stats.new_tokens += 1
            if ids is not None:
                ids.extend(self.engine.tokenizer.encode(word))
            yield word + " "
        self.stats.finish_reason = "stop"


@pytest.fixture(scope="module")
def site(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("library")
    with serving(engine, folder, Settings(), open_session=lambda tokens: Parrot(engine, tokens)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium runs these tests")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Any, site: Running) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1360, "height": 850}, locale="en-GB")
    made = context.new_page()
    made.set_default_timeout(30_000)
    problems: list[str] = []
    outside: list[str] = []
    made.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    # What the server refuses the browser reports too, and the page shows it.
    refused = "Failed to load resource: the server responded with a status of 4"
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("request", lambda request: None if request.url.startswith(site.url) else outside.append(request.url))
    made.goto(site.url)
    made.wait_for_selector("body[data-ready]")
    yield made
    assert made.title() == "longverse"
    assert [text for text in problems if refused not in text] == []  # also what the content security policy refused
    assert outside == []
    context.close()


def give(page: Any, name: str = "mill.md", text: str = REPORT) -> None:
    page.set_input_files("#file", [{"name": name, "mimeType": "text/plain", "buffer": text.encode()}])


def ask(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def test_upload_question_citation_stop_reload(page: Any, site: Running) -> None:
    give(page)
    page.wait_for_selector("#shelf li.chosen >> text=mill.md")
    page.wait_for_selector(READ)
    assert page.inner_text("#scope") == "About mill.md"
    ask(page, "Who built the mill?")
    page.wait_for_selector(".turn.answer .sources")
    answer = page.locator(".turn.answer").last
    assert "It was built by Ada Rell in 1871." in answer.inner_text()
    assert "verified" in answer.inner_text()
    assert "kept from before" in answer.inner_text()
    answer.locator(".cite").first.click()
    page.wait_for_selector("#passages mark")
    assert page.inner_text("#passages mark") == "It was built by Ada Rell in 1871."
    assert page.evaluate("document.activeElement.tagName") == "MARK"  # where a screen reader goes on
    assert page.inner_text("#source-title") == "mill.md"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.className") == "cite"

    page.uncheck("#shelf input")
    ask(page, "Go on and on.")
    page.wait_for_selector(".turn.answer:last-child .text:has-text('on on on')")
    page.click("#stop")
    page.wait_for_selector(".turn.answer:last-child >> text=Stopped.")
    wait_for(lambda: not site.worker.active)

    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator(".turn").count() == 4
    assert page.locator("#shelf li").count() == 1
    page.locator(".turn .cite").first.click()  # a kept citation still opens its source
    page.wait_for_selector("#passages mark")
    page.click("text=New chat")
    assert page.locator(".turn").count() == 0
    page.click('[aria-label="Delete mill.md"]')
    page.wait_for_selector("#shelf li", state="detached")
    assert not site.library.about


def test_what_the_document_does_not_say_is_said(page: Any) -> None:
    give(page)
    page.wait_for_selector(READ)
    ask(page, "Who is Zed Quorl?")
    page.wait_for_selector(".turn.answer .notice")
    assert "Not found in the document." in page.inner_text(".turn.answer")
    page.click("summary")
    assert "Zed Quorl is a baker." in page.inner_text("details")
    assert page.locator(".cite").count() == 0


def test_markup_in_documents_answers_names_and_questions_stays_text(page: Any) -> None:
    give(page, "<b onclick=alert(1)>.md")
    page.wait_for_selector(READ)
    page.click('#shelf button:has-text("Open")')
    page.wait_for_selector("#passages p")
    assert EVIL in page.inner_text("#passages")
    page.uncheck("#shelf input >> nth=0")
    for box in page.locator("#shelf input:checked").all():
        box.uncheck()
    ask(page, "Say markup.")
    page.wait_for_selector(".turn.answer .text:has-text('onerror')")
    page.wait_for_selector("#stop", state="hidden")
    assert page.locator("main img, main script, main b").count() == 0


def test_what_cannot_be_read_says_why(page: Any) -> None:
    give(page, "broken.pdf", "%PDF-1.7 and nothing more")
    page.wait_for_selector('#shelf [role="alert"]')
    assert "broken.pdf" in page.inner_text('#shelf [role="alert"]')
    page.click('[aria-label="Delete broken.pdf"]')
    assert page.locator('#shelf [role="alert"]').count() == 0
    give(page, "long.txt", "word " * 3000)
    page.wait_for_selector("#shelf >> text=too long: this model reads 2,048 tokens")
    assert page.locator('#shelf li:has-text("long.txt") input').is_disabled()
    page.wait_for_timeout(50)


def test_chinese_dark_and_a_phone(page: Any) -> None:
    page.click("#language")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert page.inner_text("#send") == "提问"
    assert page.get_attribute("#question", "placeholder") == "提问…"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.locator("#question").is_visible()
    assert not page.locator("#drop").is_visible()
    page.click(".tabs [data-tab=documents]")
    assert page.locator("#drop").is_visible()
    assert not page.locator("#question").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.inner_text("#send") == "提问"


def test_the_keyboard_alone_reaches_everything(page: Any) -> None:
    give(page)
    page.wait_for_selector(READ)
    page.evaluate("document.activeElement.blur()")
    page.evaluate("window.scrollTo(0, 0)")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.getAttribute('aria-label') ||"
                " document.activeElement.type || document.activeElement.className"
            )
        )
    for wanted in (
        "skip",
        "clear",
        "language",
        "theme",
        "file",
        "checkbox",
        "Open mill.md",
        "Delete mill.md",
        "question",
    ):
        assert wanted in reached, (wanted, reached)
    names = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter((e) => e.checkVisibility()).map((e) =>"
        " e.getAttribute('aria-label') || e.textContent || e.labels?.[0]?.textContent || '')"
    )
    assert all(name.strip() for name in names)


def test_a_key_is_asked_for(browser: Any, engine: Engine, tmp_path: Path) -> None:
    with serving(engine, tmp_path, Settings(api_key="sesame")) as locked:
        page = browser.new_page()
        page.goto(locked.url)
        page.fill("#key-value", "wrong")
        page.press("#key-value", "Enter")
        page.wait_for_selector("#key[open]")
        page.fill("#key-value", "sesame")
        page.press("#key-value", "Enter")
        page.wait_for_selector("body[data-ready]")
        assert "tiny" in page.inner_text("#model")
        page.close()


def test_contrast_is_enough_in_both_themes(page: Any) -> None:
    """WCAG AA: 4.5 to 1 for text, by the definition of relative luminance."""
    script = """() => ['paper', 'ink', 'quiet', 'tint', 'link', 'main', 'main-ink', 'mark', 'good', 'warn', 'bad'].map(
      (name) => [name, getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()])"""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
        parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for _ in range(2):
        page.click("#theme")
        colours = dict(page.evaluate(script))
        pairs = [
            (text, ground) for text in ("ink", "quiet", "link", "good", "warn", "bad") for ground in ("paper", "tint")
        ]
        for text, ground in [*pairs, ("main-ink", "main"), ("ink", "mark")]:
            a, b = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (text, ground, colours)


# ---- without a browser ----------------------------------------------------------------------------------


def node(script: str) -> Any:
    if shutil.which("node") is None:
        pytest.skip("no Node here")
    files = {name: json.dumps(str(STATIC / f"{name}.js")) for name in ("text", "api")}
    modules = " ".join(f"import * as {name} from {file};" for name, file in files.items())
    code = f"{modules}\nconsole.log(JSON.stringify((() => {{ {script} }})()))"
    done = subprocess.run(["node", "--input-type=module", "-e", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_both_languages_say_the_same_things() -> None:
    both = node("return text.LANGUAGES")
    assert set(both["en"]) == set(both["zh"])
    for name in both["en"]:
        gaps = [sorted(part.split("}")[0] for part in both[language][name].split("{")[1:]) for language in ("en", "zh")]
        assert gaps[0] == gaps[1], name


def test_events_are_parsed_however_they_are_cut() -> None:
    stream = 'data: {"a": 1}\n\n: keep-alive\n\ndata: x\r\ndata: y\r\n\r\ndata: 中文\n\nevent: z\n\ndata: [DONE]\n\n'
    found = node(
        f"const s = {json.dumps(stream)}; const all = [];"
        "for (let size = 1; size < 20; size++) { const p = new api.EventParser(); const found = [];"
        " for (let i = 0; i < s.length; i += size) found.push(...p.push(s.slice(i, i + size))); all.push(found); }"
        "return all"
    )
    assert all(events == ['{"a": 1}', "x\ny", "中文", "[DONE]"] for events in found)


def test_offsets_count_characters_as_python_does() -> None:
    answer, paragraph = "It 😀 stands. 它在。", "😀 The mill 磨坊 stands."
    start = paragraph.index("mill")
    got = node(
        f"return [text.parts({json.dumps(answer)}, [{{offset: {answer.index('.') + 1}, citations: [1]}},"
        f" {{offset: {len(answer)}, citations: [2]}}]),"
        f" text.highlighted({{text: {json.dumps(paragraph)}, start: 100}}, {100 + start}, {100 + start + 7})]"
    )
    assert got[0] == [{"text": "It 😀 stands.", "citations": [1]}, {"text": " 它在。", "citations": [2]}]
    assert got[1] == {"before": "😀 The ", "inside": "mill 磨坊", "after": " stands."}


def test_time_left_and_durations() -> None:
    got = node(
        "return [text.progress({total: 1000, cache: 200, processed: 400, time_ms: 2000}),"
        " text.progress({total: 1000, cache: 200, processed: 200, time_ms: 1}),"
        " text.duration(8), text.duration(125), text.duration(4200, 'zh'), text.count(1234567)]"
    )
    assert got[0] == {"percent": 40, "seconds": 6}
    assert got[1] == {"percent": 20, "seconds": None}
    assert got[2:] == ["8 s", "2 min 5 s", "1 小时 10 分", "1,234,567"]


class Outline(HTMLParser):
    """What a page holds: tags, ids, and what refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.outside: list[str] = []
        self.inline: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("for", "aria-labelledby", "aria-describedby"):
                self.references.append(value or "")
            if name in ("src", "href") and not (value or "").startswith(("/static/", "#")):
                self.outside.append(value or "")
            if name.startswith("on") or name == "style":
                self.inline.append(name)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_is_whole_and_loads_nothing_from_outside() -> None:
    outline = Outline()
    outline.feed((STATIC / "index.html").read_text(encoding="utf-8"))
    assert outline.open == []
    assert len(set(outline.ids)) == len(outline.ids)
    assert set(outline.references) <= set(outline.ids)
    assert outline.outside == outline.inline == []
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not [
            word for word in ("http://", "https://", "innerHTML", "insertAdjacentHTML", "eval(") if word in text
        ]
