"""What a reader would see wrong in a page, found by the browser that shows it."""

from __future__ import annotations

from pathlib import Path

WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")

#: Of WCAG 2.2, success criterion 1.4.3, for text of the usual size.
CONTRAST = 4.5

#: Pixels, of letters in a figure on a phone.
LETTERS = 9

#: All that is folded is opened: a reader opens it too.
_OPEN = "for (const each of document.querySelectorAll('details')) each.open = true;"

#: Nothing moves while it is looked at.
_STILL = """async () => {
  const still = document.createElement('style');
  still.textContent = '* { transition: none !important; animation: none !important; }';
  document.head.append(still);
  // The page's own scripts put their last hand to it.
  await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
}"""

#: Of the page's own scheme, if it has a switch. Its script answers the reader's system too, at a time of its own:
#: what it sets is set back.
_SCHEME = """async scheme => {
  const body = document.body;
  if (body.dataset.mdColorScheme) {
    const keep = () => { if (body.dataset.mdColorScheme !== scheme) body.dataset.mdColorScheme = scheme; };
    window.keeper?.disconnect();
    window.keeper = new MutationObserver(keep);
    window.keeper.observe(body, {attributeFilter: ['data-md-color-scheme']});
    keep();
  }
  await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
}"""

_TOO_WIDE = """width => {
  const faults = [];
  const root = document.documentElement;
  if (root.scrollWidth > width) faults.push(`the page is ${root.scrollWidth} px wide`);
  const what = element => `${element.tagName.toLowerCase()} "${element.innerText.slice(0, 50).replace(/\\s+/g, ' ')}"`;
  const main = document.querySelector('article') || document.querySelector('main');
  for (const table of main.querySelectorAll('table')) {
    if (!table.offsetParent || table.closest('.highlight')) continue;
    for (let part = table; part !== main; part = part.parentElement) {
      if (part.scrollWidth > part.clientWidth + 1 && getComputedStyle(part).display !== 'inline') {
        faults.push(`${what(table)} has ${part.scrollWidth} px in ${part.clientWidth}`);
        break;
      }
    }
    for (const cell of table.querySelectorAll('td, th')) {
      if (cell.scrollWidth > cell.clientWidth + 1) faults.push(`${what(cell)} is wider than its cell`);
    }
  }
  for (const name of main.querySelectorAll('td code, th code')) {
    for (const part of name.childNodes) {
      const word = document.createRange();
      word.selectNodeContents(part);
      if (/^[\\w./(]+$/.test(part.textContent) && new Set([...word.getClientRects()].map(line => line.top)).size > 1)
        faults.push(`${what(name)} breaks in a word`);
    }
  }
  for (const figure of main.querySelectorAll('figure svg')) {
    const box = figure.getBoundingClientRect();
    const shown = [];
    for (const text of figure.querySelectorAll('text')) {
      const at = text.getBoundingClientRect();
      const label = text.textContent.trim();
      const place = text.getScreenCTM();
      const size = parseFloat(getComputedStyle(text).fontSize) * Math.abs(place.a || place.b);
      if (width < 400 && size < LETTERS) faults.push(`"${label}" in a figure has letters of ${size.toFixed(1)} px`);
      if (at.left < box.left - 1 || at.right > box.right + 1) faults.push(`"${label}" in a figure is cut off`);
      for (const [other, name] of shown) {
        const across = Math.min(at.right, other.right) - Math.max(at.left, other.left);
        const down = Math.min(at.bottom, other.bottom) - Math.max(at.top, other.top);
        if (across > 1 && down > 0.35 * at.height) faults.push(`"${label}" and "${name}" lie on each other`);
      }
      shown.push([at, label]);
    }
  }
  return faults;
}""".replace("LETTERS", str(LETTERS))

_TOO_FAINT = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const remembered = (known, find) => key => known.has(key) ? known.get(key) : known.set(key, find(key)).get(key);
  const parse = remembered(new Map(), colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  });
  const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]).concat(1);
  const behind = remembered(new Map(), element => element
    ? over(parse(getComputedStyle(element).backgroundColor), behind(element.parentElement)) : [255, 255, 255, 1]);
  const light = ([r, g, b]) => {
    const part = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const faults = new Set();
  const main = document.querySelector('article') || document.querySelector('main');
  const within = document.createTreeWalker(main, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (within.nextNode()) {
    const element = within.currentNode.parentElement;
    if (!within.currentNode.data.trim() || seen.has(element)) continue;
    seen.add(element);
    if (element.closest('script, style, title, .headerlink, .md-content__button, pre, math')) continue;
    const style = getComputedStyle(element);
    const drawn = element.closest('svg');
    const ground = behind(drawn ? drawn.parentElement : element);
    const ink = over(parse(drawn ? style.fill : style.color), ground);
    const [high, low] = [light(ink), light(ground)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    const words = element.textContent.trim().slice(0, 40);
    if (ratio < CONTRAST) faults.add(`"${words}" has a contrast of ${ratio.toFixed(1)}`);
  }
  return [...faults];
}""".replace("CONTRAST", str(CONTRAST))


def faults(tab, page: Path) -> list[str]:
    """What is too wide at each width, and too faint in each scheme."""
    found = []
    visit(tab, page)
    tab.evaluate(_OPEN)
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 800})
        found += [f"at {width} px, {fault}" for fault in tab.evaluate(_TOO_WIDE, width)]
    for scheme in SCHEMES:
        show(tab, scheme)
        found += [f"in the {scheme}, {fault}" for fault in tab.evaluate(_TOO_FAINT)]
    return found


def visit(tab, page: Path) -> None:
    """Go to a page in which nothing moves."""
    tab.goto(page.as_uri(), wait_until="domcontentloaded")
    tab.evaluate(_STILL)


def show(tab, scheme: str) -> None:
    """In this scheme, whether the page follows the reader's system or has a switch."""
    tab.emulate_media(color_scheme=scheme)
    tab.evaluate(_SCHEME, {"light": "default", "dark": "slate"}[scheme])
