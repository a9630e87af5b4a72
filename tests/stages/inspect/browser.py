"""The system's Chromium, without a window, driven by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 600  # seconds to wait for Chromium


class Browser:
    """One page. `errors`: what its scripts threw or the console complained of; `requests`: URLs that it asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, page: Path) -> None:
        """Loads a page from file:// and waits until its scripts have run; clears `errors` and `requests`."""
        self.page.goto("about:blank")
        self.errors.clear()
        self.requests.clear()
        self.page.goto(page.absolute().as_uri())

    def run(self, script: str) -> Any:
        """The value of an expression; of a promise what it resolves to."""
        return self.page.evaluate(script)

    def until(self, condition: str, seconds: float = 30) -> None:
        """Waits for an expression to become true; the page forbids the `eval` of Playwright's wait_for_function."""
        poll = f"""new Promise((resolve) => {{
            const look = () => (({condition}) ? resolve(true) : setTimeout(look, 20));
            look();
            setTimeout(() => resolve(false), {1000 * seconds});
        }})"""
        assert self.run(poll), condition

    def settle(self) -> None:
        """Waits for two frames: what was under way is drawn, and its events have come."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start Chromium with an empty profile; it ends with the block."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            timeout=1000 * PATIENCE,
        )  # fmt: skip
        with started:
            page = started.new_page(viewport={"width": 1200, "height": 900})
            page.set_default_timeout(1000 * PATIENCE)
            yield Browser(page)
