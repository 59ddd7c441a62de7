"""The op for the hub of kernels: ``python -m benchmarks.hub FOLDER`` builds what the package ``kernels`` loads.

It has one variant for each backend of the op, of Python alone (``torch-noarch``, in the words of kernel-builder). The
files are the library's, with imports within the package. Of each other file that the op imports from, the package has
what the op uses. ``kernel-builder upload FOLDER --repo-id OWNER/projection-penalty`` publishes it.
"""

import argparse
import ast
import json
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from symtable import symtable

ROOT = Path(__file__).parents[1]
NAME = "projection-penalty"
BACKENDS = ("cpu", "cuda", "rocm")
FUNCTIONS = ("constrain", "project", "projection_penalty", "rms_norm", "rms_norm_constrain")
FOLDERS = ("procon/ops", "procon/eager", "kernels")
CARD = f"""---
library_name: kernels
license: apache-2.0
---

A penalty on how far hidden states, projected on directions, are from their anchors (arXiv 2509.06795): on its own, or
within RMSNorm. Triton on CUDA and ROCm, PyTorch on CPUs. The functions {", ".join(f"`{name}`" for name in FUNCTIONS)}
say in their docstrings what they take and return.

```python
op = kernels.get_kernel("OWNER/{NAME}", version=0, trust_remote_code=True)
hidden, penalty = op.constrain(hidden, direction, anchor, weight)
```
"""


def used(source: str, names: set[str]) -> str:
    """What of a module gives ``names`` their meaning, and what that needs of the module."""
    kept, nodes = set[ast.stmt](), ast.parse(source).body
    while found := [node for node in nodes if node not in kept and names & bound(node)]:
        kept.update(found)
        names = names | {each.id for node in found for each in ast.walk(node) if isinstance(each, ast.Name)}
    for node in kept:
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [alias for alias in node.names if alias.name in names]
    return "\n\n".join(["from __future__ import annotations", *(ast.unparse(node) for node in nodes if node in kept)])


def bound(node: ast.stmt) -> set[str]:
    symbols = symtable(ast.unparse(node), "", "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}


def package() -> dict[str, str]:
    """The files of the package, by their paths in it."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
    files = {f"{path.parent.name}/{path.name}": path.read_text() for path in paths}
    imports = re.findall(r"^from procon\.(\w+) import (.+)$", "\n".join(files.values()), re.MULTILINE)
    for module in {module for module, _ in imports} - {path.parent.name for path in paths}:
        names = {name for of, listed in imports if of == module for name in listed.split(", ")}
        files[f"{module}.py"] = used((ROOT / "procon" / f"{module}.py").read_text(), names)
    for path, text in files.items():
        files[path] = re.sub(r"^from procon\.", "from .." if "/" in path else "from .", text, flags=re.MULTILINE)
    shown = f"from .errors import ProConError\nfrom .ops import {', '.join(FUNCTIONS)}\n"
    return files | {"__init__.py": f"{shown}\n__all__ = {['ProConError', *FUNCTIONS]}\n"}


def build(folder: Path) -> None:
    """Write the package to ``folder``, which has to be new."""
    folder.mkdir(parents=True)
    files = package()
    digest = {path: b64encode(sha256(text.encode()).digest()).decode() for path, text in sorted(files.items())}
    version = sha256(json.dumps(digest).encode()).hexdigest()[:7]
    about = {"name": NAME, "version": 0, "license": "Apache-2.0", "python-depends": []}
    about["digest"] = {"algorithm": "sha256", "files": digest}
    for backend in BACKENDS:
        identity = {"id": f"_{NAME.replace('-', '_')}_{backend}_{version}", "backend": {"type": backend}}
        for path, text in (files | {"metadata.json": json.dumps(about | identity, indent=2)}).items():
            place = folder / "build" / f"torch-{backend}" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
    (folder / "build" / "CARD.md").write_text(CARD)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hub", description="Build the op's package for the hub.")
    parser.add_argument("folder", type=Path, help="a new folder for it")
    build(parser.parse_args().folder)
