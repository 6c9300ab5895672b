"""A real browser on the page of a real server with the demo model."""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from tests.server.page.person import opened

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)
    path = shutil.which("chromium") or shutil.which("google-chrome")  # None: Playwright's own
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        except Error as error:
            reason = f"no Chromium found: {error.message.splitlines()[0]}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def url(browser: Browser, request: pytest.FixtureRequest) -> str:
    """The demo server's URL; without a browser the server does not start."""
    demo_url: str = request.getfixturevalue("demo_url")
    return demo_url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page with its first sample image."""
    with opened(browser, url) as page:
        expect(page.locator("#samples [aria-pressed=true]")).to_have_count(1)
        expect(page.locator("#stops li")).to_have_count(4)
        yield page
