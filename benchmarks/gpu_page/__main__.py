"""``python -m benchmarks.gpu_page FOLDER``: one page of what benchmarks/gpu.sh left in a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The installed procon comes first: in the source tree, the kernels lie beside procon and not inside it.
sys.path.append(sys.path.pop(0))

from benchmarks.gpu_page.page import write_page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_page", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of benchmarks/gpu.sh")
    parser.add_argument("--output", type=Path, help="folder for gpu.md and assets/ (default: the same)")
    options = parser.parse_args(arguments)
    try:
        written = write_page(options.folder, options.output or options.folder)
    except ValueError as error:
        parser.error(str(error))
    for file in written:
        print(file)


if __name__ == "__main__":
    main()
