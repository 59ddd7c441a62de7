"""What mkdocs does to each page of this site after Markdown; part of the build, not of the site.

- A drawing stands in its page, where it takes the page's colours, light or dark. In the repository it is a file of its
  own, which any reader of Markdown shows.
- Formulas become MathML, which browsers lay out by themselves: no script, no font and no server of anyone else.
- A name in a table may go on in the next line after an underscore, a point, a slash or a bracket, and nowhere else.
- The foot of each page has the version.
"""

from __future__ import annotations

import re
import runpy
from html import unescape
from pathlib import Path
from posixpath import dirname, join, normpath

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]

_IMAGE = re.compile(r'<p><img [^>]*?src="(?P<source>[^":]+\.svg)"[^>]*></p>')
_ALONE = re.compile(r"<\?xml.*?\?>\s*|<style>.*?</style>", re.DOTALL)
_FORMULA = re.compile(r'<(?P<tag>div|span) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
_CELL = re.compile(r"<t[dh]\b.*?</t[dh]>", re.DOTALL)
_TEXT = re.compile(r"(?<=>)[^<]+(?=<)")
# Where a word may break: behind a joint, or before the capital that ends a long part.
_JOINT = re.compile(r"(?<=[A-Za-z_])[_./(]+(?=[A-Za-z])|(?<=[a-z]{5})(?=[A-Z])")


def on_config(config):
    version = runpy.run_path(str(ROOT / "procon" / "version.py"))["__version__"]
    config.copyright = f"procon-llm {version}, Apache-2.0"
    if not config.repo_url:  # then there is no address of a page's source either
        config.edit_uri = ""
    return config


def on_post_page(output: str, page, config) -> str:
    def drawing(image: re.Match[str]) -> str:
        path = normpath(join(dirname(page.file.dest_uri), image["source"]))
        svg = (Path(config.docs_dir) / path).read_text(encoding="utf-8")
        return f"<figure>{_ALONE.sub('', svg)}</figure>"

    output = _FORMULA.sub(_mathml, _IMAGE.sub(drawing, output))
    return _CELL.sub(_with_breaks, output)


def _with_breaks(cell: re.Match[str]) -> str:
    def joints(text: re.Match[str]) -> str:
        # A short name breaks on a phone alone.
        mark = "<wbr class='phone'>" if len(text[0]) < 24 else "<wbr>"
        return _JOINT.sub(rf"\g<0>{mark}", text[0])

    return _TEXT.sub(joints, cell[0])


def _mathml(formula: re.Match[str]) -> str:
    tex = " ".join(unescape(formula["tex"]).split())
    block = formula["tag"] == "div"
    math = convert(tex, display="block" if block else "inline")
    return f'<div class="formula">{math}</div>' if block else math
