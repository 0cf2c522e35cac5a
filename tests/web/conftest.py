"""A real browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.apt import install

REQUIRED = "MEGATRON_CPT_REQUIRE_BROWSER"  # set in CI: there these tests must not be skipped
PICTURES = Path(os.environ.get("MEGATRON_CPT_PICTURES", "/tmp/megatron-cpt-web-pictures"))


def chromium() -> str | None:
    """The path of a browser, installed from Debian's package where there is none and that is allowed."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (found := shutil.which(name)) is not None:
            return found
    install(["chromium"], ["chromium"])
    return shutil.which("chromium")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = chromium()
    if path is None:
        assert not os.environ.get(REQUIRED), "no chromium, and it could not be installed"
        pytest.skip("no chromium, and it can only be installed by root on Debian")
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


class Watched:
    """Collects what no page may do: errors on the console, and requests to anybody else."""

    def __init__(self, page: Page, own: str) -> None:
        self.wrong: list[str] = []
        page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on(
            "request", lambda sent: self.wrong.append(sent.url) if not sent.url.startswith((own, "blob:")) else None
        )
