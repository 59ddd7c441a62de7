"""``python requirements/renew.py``: what is installed here becomes the newest versions that are tested.

They stand in ``newest.txt``, beside which pip takes nothing newer; in ``procon/version.py``, by which a newer one is
said when training begins; and in the table of ``docs/support.md``. `.ci/run unpinned` calls it when its tests have
passed.
"""

import re
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).parent

#: What torch itself pins, and what pip brings.
_LEFT_OUT = re.compile(r"nvidia-|cuda-|procon-|pip$|setuptools$|wheel$")

_HEAD = """\
# The newest versions that the tests passed with, of every package that is installed for them, as a constraints file of
# pip. `.ci/run unpinned` writes it. Older versions are admitted, as not each of these runs on every Python.
"""


def main() -> None:
    """Write the three."""
    installed = {re.sub(r"[-_.]+", "-", found.name).lower(): found.version for found in distributions()}
    kept = {name: version.split("+")[0] for name, version in sorted(installed.items()) if not _LEFT_OUT.match(name)}
    (HERE / "newest.txt").write_text(_HEAD + "".join(f"{name}<={version}\n" for name, version in kept.items()))
    for path in (HERE.parent / "procon" / "version.py", HERE.parent / "docs" / "support.md"):
        text = path.read_text(encoding="utf-8")
        for name, version in kept.items():
            text = re.sub(rf'(?m)^(    "{name}": )"[^"]+",$', rf'\g<1>"{version}",', text)
            text = re.sub(rf"(?m)^(\| {name} \| [\d.]+ \|) [\d.]+ \|$", rf"\g<1> {version} |", text)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
