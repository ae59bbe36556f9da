"""The page that shows a generation, in a real browser: what is coloured, what is told, and that nothing is loaded."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_modules import LinearHeads, MTPModel, RecurrentHeads, RecurrentTrunk, SpeculativeDecoder, TransformerTrunk
from mtp_modules.commands.report import report
from mtp_modules.data.tokenizers import ByteTokenizer
from mtp_modules.decoders import StopRule
from mtp_modules.loading import load_model
from mtp_modules.reports.recording import Recording, record
from tests.command_line import refusal, run
from tests.pages import Outline

PROMPT = 'if a<b & "c":\n\t\u20ac'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of bytes, some of whose drafts are right, and the page of a run."""
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(5)
    trunk = TransformerTrunk(vocab_size=256, d_model=8, num_layers=1, num_heads=2, max_positions=128)
    model = MTPModel(trunk=trunk, heads=RecurrentHeads(d_model=8, num_horizons=4)).eval()
    model.save_pretrained(folder / "model", tokenizer=ByteTokenizer())
    report(str(folder / "model"), generation=True, output=str(folder / "page.html"), prompt=PROMPT, max_new_tokens=60)
    return folder


@pytest.fixture(scope="module")
def recording(folder: Path) -> Recording:
    """Return the same run, made once more."""
    model, _ = load_model(folder / "model")
    tokens = list(PROMPT.encode())
    stop = StopRule(tokens=[0])
    return record(
        tokens, SpeculativeDecoder(return_distributions=True).stream(model, [tokens], max_new_tokens=60, stop=stop)
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start the browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    """Open a page, and see at the end that it asked for nothing but itself and said nothing on the console."""
    noise: list[str] = []
    asked: list[str] = []
    page = browser.new_page(**options)
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    page.close()
    assert noise == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


def test_the_page_is_whole_and_loads_nothing(folder: Path) -> None:
    text = (folder / "page.html").read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.tags.count("script") == 1
    for forbidden in ("http:", "https:", "src=", "@import", "url(", "a<b"):
        assert forbidden not in text


@needs_browser
def test_colours_and_figures_are_those_of_the_run(browser: Any, folder: Path, recording: Recording) -> None:
    accepted = sum(recording.stats.accepted)
    assert accepted > 0
    with opened(browser, folder / "page.html") as page:
        assert page.locator(".text .t:not(.own):not(.r)").count() == accepted
        assert page.locator(".text .t.own").count() == recording.stats.tokens - accepted
        for depth in range(1, 4):
            counted = sum(token.depth == depth for token in recording.tokens)
            assert page.locator(f".text .d{depth}").count() == counted
        plain = page.locator(".text .own").first.evaluate("one => getComputedStyle(one).backgroundColor")
        assert plain == "rgba(0, 0, 0, 0)"
        first = page.locator(".text .d1").first.evaluate("one => getComputedStyle(one).backgroundColor")
        assert first not in (plain, page.locator("body").evaluate("one => getComputedStyle(one).backgroundColor"))
        figures = page.locator(".figures b").all_inner_texts()
        stats = recording.stats
        assert figures == [f"{stats.tokens_per_forward:.2f}", str(stats.tokens), str(stats.forwards), str(accepted)]
        assert page.locator(".prompt").inner_text() == 'if a<b & "c":\u21b5\n\u21e5\tE282\u20ac'


@needs_browser
def test_pointing_at_a_token_tells_its_numbers(browser: Any, folder: Path, recording: Recording) -> None:
    with opened(browser, folder / "page.html") as page:
        drafts = [place for place, token in enumerate(recording.tokens) if token.depth]
        for place in (0, *drafts[:3]):
            token, card = recording.tokens[place], page.locator(f"#t{place}")
            assert not card.is_visible()
            page.locator(".text .t:not(.r)").nth(place).hover()
            assert card.is_visible()
            said = card.inner_text()
            assert f"p {token.p:.3f}" in said
            assert ("q " in said) == (token.q is not None)
            if token.depth:
                assert f"accepted at depth {token.depth}" in said
                assert f"q {token.q:.3f}" in said
            for table, probs in zip(card.locator("table").all(), (token.model, token.draft), strict=False):
                shown = [row.split() for row in table.locator("tr").all_inner_texts()]
                assert [row[-1] for row in shown] == [f"{one.probability:.3f}" for one in probs]
            assert page.locator(".about:visible").count() == 1


@needs_browser
def test_rejected_drafts_are_shown_on_demand(browser: Any, folder: Path, recording: Recording) -> None:
    rejected = [draft for token in recording.tokens for draft in token.rejected]
    with opened(browser, folder / "page.html") as page:
        drafts = page.locator(".text .r")
        assert drafts.count() == len(rejected) > 0
        assert page.locator(".text .r:visible").count() == 0
        page.get_by_label("Show rejected drafts").check()
        assert page.locator(".text .r:visible").count() == len(rejected)
        assert drafts.first.locator("s").count() == 1
        drafts.first.hover()
        said = drafts.first.locator(".about").inner_text()
        assert f"rejected at depth {rejected[0].depth}" in said
        assert f"q {rejected[0].q:.3f}" in said


@needs_browser
def test_the_keyboard_walks_through_the_tokens(browser: Any, folder: Path, recording: Recording) -> None:
    with opened(browser, folder / "page.html") as page:
        for key in ("Tab", "Tab"):  # the switch, then the text
            page.keyboard.press(key)
        for place in (0, 1, 2):
            assert page.evaluate("document.activeElement.querySelector('.about').id") == f"t{place}"
            assert page.locator(f"#t{place}").is_visible()
            page.keyboard.press("ArrowRight")
        page.keyboard.press("End")
        assert page.locator(f"#t{len(recording.tokens) - 1}").is_visible()
        page.keyboard.press("Home")
        assert page.locator("#t0").is_visible()
        page.keyboard.press("Escape")
        assert page.locator(".about:visible").count() == 0


@needs_browser
def test_dark_mode_narrow_screens_and_paper(browser: Any, folder: Path) -> None:
    colours = []
    for scheme in ("light", "dark"):
        with opened(browser, folder / "page.html", color_scheme=scheme, viewport={"width": 480, "height": 800}) as page:
            colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert page.evaluate("document.documentElement.scrollWidth") <= 480
            page.emulate_media(media="print")
            assert not page.locator("#rejected").is_visible()
            page.locator(".text .t.own").first.hover()
            assert page.locator(".about:visible").count() == 0
            colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, paper, dark, same_paper = colours
    assert light == paper == same_paper == "rgb(255, 255, 255)"
    assert dark != light


def test_the_command_says_what_it_wrote(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "drawn.html"
    run(
        *("report", "--generation", "--ckpt_path", folder / "model", "--output", page, "--max_new_tokens", "9"),
        *("--temperature", "0.9", "--top_k", "50"),
    )
    assert capsys.readouterr().out.startswith("9 tokens, ")
    written = page.read_text(encoding="utf-8")
    assert "temperature 0.9, top_k 50, top_p 1, seed 0" in written
    assert "Decoding was greedy" not in written


def test_what_report_refuses(folder: Path) -> None:
    model = ("--ckpt_path", folder / "model")
    assert refusal("report", *model) == "report: no page was requested; give --generation."
    assert refusal("report", *model, "--generation", "--alternatives=0") == (
        "report: alternatives must be at least 1, got 0."
    )
    assert refusal("report", *model, "--generation", f"--output={folder}") == (
        f"output: {folder} is a folder; give the name of a file in it."
    )
    assert refusal("report", *model, "--generation", "--prompt=") == (
        "generate: prompt 0 is empty; give at least one token."
    )


def test_drafts_of_a_model_that_drafts_nothing_are_refused(tmp_path: Path) -> None:
    single = MTPModel(trunk=RecurrentTrunk(vocab_size=9, d_model=4), heads=LinearHeads(d_model=4, num_horizons=1))
    single.save_pretrained(tmp_path)
    assert refusal("report", "--generation", "--ckpt_path", tmp_path, "--prompt=1", "--num_drafts=3") == (
        "num_drafts: LinearHeads with one horizon cannot draft; omit num_drafts."
    )
