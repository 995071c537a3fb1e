"""The page in a browser: a click, tokens that appear, a picture; mistakes as a line; no network.

VISTOK_SCREENSHOT=assets/demo.png pytest -m slow tests/e2e/test_e2e_demo.py makes the picture of the
README.
"""

import io
import json
import os
import re
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from commands import ROOT
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the page is made by gradio")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1280,940 "
    "--force-device-scale-factor=1"
)
TOKENS = re.compile(r"pass (\d+) of (\d+), (\d+) of (\d+) tokens")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM.exists() and DRIVER.exists()), reason=f"no {CHROMIUM} and {DRIVER}"
    ),
]


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def served():
    """The pages of checkpoints, as `vistok demo` serves them."""
    from vistok.commands.demo import load
    from vistok.demo.page import serve

    pages = []

    def serve_one(checkpoint: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pages.append(serve(load(ROOT / checkpoint), "127.0.0.1", port, False, block=False))
        return f"http://127.0.0.1:{port}/"

    yield serve_one
    for page in pages:
        page.close(verbose=False)


def find(browser, selector: str, seconds: float = 120):
    """Return the first element that is there, and seen, within some seconds."""
    return until(
        lambda: next((e for e in browser.find_elements("css selector", selector)
                      if e.is_displayed()), None),
        selector,
        seconds,
    )  # fmt: skip


def until(met, what: str, seconds: float = 120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := met():
            return found
    raise AssertionError(f"{what} not within {seconds} s")


def colours(browser, selector: str) -> int:
    """Return how many different ones a picture on the page has."""
    pixels = Image.open(io.BytesIO(find(browser, f"{selector} img").screenshot_as_png))
    return len(pixels.convert("RGB").getcolors(2**24))


def open_tab(browser, name: str) -> None:
    find(browser, "button[role=tab]")
    tabs = browser.find_elements("css selector", "button[role=tab]")
    next(tab for tab in tabs if tab.text == name).click()


def test_a_pair_generates_reconstructs_and_edits(browser, served):
    url = served("assets/emoji")
    browser.get(url)
    find(browser, "#generate").click()
    seen = []

    def done() -> bool:
        (text,) = (e.text for e in browser.find_elements("css selector", "#progress"))
        if (numbers := TOKENS.search(text)) and numbers.groups() not in seen:
            seen.append(numbers.groups())
        return bool(seen) and seen[-1][2] == seen[-1][3]

    until(done, "the last token")
    assert seen[-1] == ("64", "64", "64", "64")
    assert len(seen) > 1  # tokens appeared as they were decoded
    assert [int(tokens) for _, _, tokens, _ in seen] == sorted(int(t) for _, _, t, _ in seen)
    assert colours(browser, "#generated") > 100
    if "VISTOK_SCREENSHOT" in os.environ:
        browser.save_screenshot(os.environ["VISTOK_SCREENSHOT"])

    field = find(browser, "#guidance input, #guidance textarea")
    field.send_keys("much")
    find(browser, "#generate").click()
    until(lambda: "schedule '1.5much'" in browser.page_source, "the line of a mistake")

    open_tab(browser, "Reconstruct")
    until(lambda: "64 of 64 tokens, 96 bytes, PSNR" in find(browser, "#facts").text, "facts")
    assert colours(browser, "#reconstruction") > 20
    open_tab(browser, "Edit")
    assert colours(browser, "#mix") > 20

    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked = {urlsplit(request["request"]["url"]) for request in sent}
    hosts = {place.netloc for place in asked if place.scheme in ("http", "https", "ws", "wss")}
    assert hosts == {urlsplit(url).netloc}


def test_a_tokenizer_of_any_length_has_a_slider(browser, served):
    browser.get(served("assets/emoji-lengths"))
    until(lambda: "64 of 64 tokens" in find(browser, "#facts").text, "all tokens")
    number = find(browser, "#length input[type=number]")
    number.clear()
    number.send_keys("4\t")
    until(lambda: "4 of 64 tokens, 6 bytes" in find(browser, "#facts").text, "four tokens")
    assert colours(browser, "#reconstruction") > 20
    tabs = browser.find_elements("css selector", "button[role=tab]")
    assert [tab.text for tab in tabs] == ["Reconstruct", "Edit"]
