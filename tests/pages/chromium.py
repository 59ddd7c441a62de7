"""The browser that pages are looked at in: the machine's own Chromium, without a window."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

#: Names that Chromium has.
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def why_not() -> str | None:
    """Why there is no browser, and what to do about it."""
    try:
        import playwright  # noqa: F401
    except ModuleNotFoundError:
        return "playwright is not installed: pip install -e '.[test]'"
    return None if _found() else "there is no Chromium on this machine: apt-get install chromium"


def _found() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


@contextmanager
def a_tab() -> Iterator:
    """An empty page in a browser of its own. Nothing is fetched but files."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=_found(), args=["--no-sandbox", "--allow-file-access-from-files"]
        )
        try:
            yield browser.new_context(offline=True).new_page()
        finally:
            browser.close()
