"""The site builds without a warning, and can be read: in a browser, on a desktop and on a phone, light and dark."""

import re
import sys
import zlib
from pathlib import Path

import pytest

import procon

# The command that looks at pages is a script with its modules beside it.
sys.path.append(str(Path(__file__).parents[1] / "pages"))

import chromium
import links
import looks
import made

ROOT = Path(__file__).parents[2]
NO_TOOLS = "the documentation's tools are not installed: pip install -e '.[docs]'"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for tool in ("mkdocs", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(tool, reason=NO_TOOLS)
    return made.build_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def tab():
    if reason := chromium.why_not():
        pytest.skip(reason)
    with chromium.a_tab() as found:
        yield found


def test_site_has_every_public_name(site):
    """``mkdocs build --strict`` passes, and the reference holds what ``procon`` exports."""
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    listed = {line.split(" ")[0] for line in inventory.splitlines()}
    homes = {f"procon.{home}.{name}" for name, home in procon._HOME.items()}
    defined = {name.rpartition(".")[2]: name for name in listed if name.startswith("procon.")}
    missing = {name for name in homes if name not in listed and name.rpartition(".")[2] not in defined}
    assert not missing


def test_no_link_is_dead_and_nothing_comes_from_elsewhere(site):
    pages = made.pages(site)
    assert len(pages) > 20
    assert links.dead_links(pages, site) == []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert 'src="http' not in text, page
        assert "arithmatex" not in text, f"{page} has a formula that a script would have to lay out"
        for formula in re.findall(r"<math.*?</math>", text, re.DOTALL):
            assert "\\" not in formula, f"{page} has a formula with TeX left in it: {formula}"


SEARCHES = {
    "poison": "choose/",
    "task suffers": "choose/",
    "ZeRO-3": "how-to/loading/",
    "reasoning": "how-to/data/",
    "cost": "cost/",
    "short samples": "choose/",
    "GGUF": "how-to/saving/",
    "trackio": "how-to/saving/",
}


@pytest.mark.slow
def test_search_has_the_right_page_among_the_first_three(site, tab):
    tab.route("http://site/**", lambda route: route.fulfill(path=site / route.request.url.partition("site/")[2]))
    found = {}
    for words in SEARCHES:
        tab.goto("http://site/index.html")
        tab.fill(".md-search__input", words)
        tab.press(".md-search__input", "Shift")  # the field listens to keys
        tab.wait_for_selector(".md-search-result__item")
        first = tab.locator(".md-search-result__item > a:first-child").evaluate_all("all => all.map(a => a.href)")
        found[words] = [link.removeprefix("http://site/").partition("/?")[0] for link in first[:3]]
    assert {words: page for words, page in SEARCHES.items() if page not in found[words]} == {}, found


@pytest.mark.slow
def test_every_page_can_be_read(site, tab, tmp_path):
    shown = [*made.pages(site), made.write_report(tmp_path)]
    faults = {str(page): found for page in shown if (found := looks.faults(tab, page))}
    assert not faults, "\n".join(f"{page}: {fault}" for page, found in faults.items() for fault in found)


@pytest.mark.slow
def test_every_page_is_looked_at_in_both_schemes(site, tab):
    """Whatever the page's own script sets meanwhile, which answers the reader's system at a time of its own."""
    for page in made.pages(site):
        looks.visit(tab, page)
        for scheme, ground in [("dark", "rgb(30, 33, 41)"), ("light", "rgb(255, 255, 255)")]:
            looks.show(tab, scheme)
            assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == ground, (page, scheme)


def test_lines_of_figures_are_seen_in_both_schemes():
    figures = [path for path in (ROOT / "docs" / "assets").rglob("*.svg") if "prefers-color-scheme" in path.read_text()]
    assert len(figures) > 2
    assert [path.name for path in figures if "#000" in path.read_text()] == []


FAULTY = {
    "<table><tr><td>{word}</td><td>{word}</td></tr></table>": "the page is",
    "<div style='overflow-x: auto'><table><tr><td>{word}</td></tr></table></div>": "table",
    "<table><tr><td style='width: 4em'><code style='word-break: break-all'>procon_schedule</code></td></tr></table>": (
        "breaks in a word"
    ),
    "<p style='color: #ccc'>faint</p>": 'in the light, "faint" has a contrast of 1.6',
    "<figure><svg viewBox='0 0 900 90' width='100%'><text x='9' y='50' font-size='16'>small</text></svg></figure>": (
        "has letters of"
    ),
    "<figure><svg viewBox='0 0 90 90' width='90'><text x='60' y='50'>cut off</text></svg></figure>": "is cut off",
    "<figure><svg viewBox='0 0 90 90' width='90'><text y='50'>one</text><text y='52'>two</text></svg></figure>": (
        "lie on each other"
    ),
    "<figure><svg viewBox='0 0 90 90' width='90'><text x='9' y='50'>dark</text></svg></figure>": (
        'in the dark, "dark" has a contrast of'
    ),
}


@pytest.mark.parametrize(("body", "fault"), FAULTY.items())
def test_a_planted_fault_is_found(tab, tmp_path, body, fault):
    page = tmp_path / "page.html"
    style = "<meta name='viewport' content='width=device-width'><style>:root { color-scheme: light dark; }"
    style += "@media (prefers-color-scheme: dark) { body { background: #111; color: #eee; } }</style>"
    page.write_text(f"<!doctype html>{style}<main>{body.format(word='long' * 80)}</main>")
    assert any(fault in found for found in looks.faults(tab, page))


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "index.html").write_text("<h1 id='top'></h1><a href='../b.html'></a><a href='#top'></a>")
    (tmp_path / "c.html").write_text(
        "<a href='a/#top'></a><a href='a/#no'></a><img src='no.svg'><a href='https://x'></a>"
    )
    assert links.dead_links(made.pages(tmp_path), tmp_path) == [
        "a/index.html: ../b.html is no file",
        "c.html: a/#no is no place of that page",
        "c.html: no.svg is no file",
    ]
