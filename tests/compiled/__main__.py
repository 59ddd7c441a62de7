"""``python tests/compiled [PATHS] [options of pytest]``: tests marked ``gpu`` run on a GPU that ttsem plays on the CPU.

It needs ttsem and the version of Triton that ttsem knows (``requirements/compiled.txt``). Without a path it takes every
file that has such tests. ``not_run.toml`` lists those that it cannot run, and why.
"""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    options = sys.argv[1:]
    # The folder of this file is on the path, of the processes of pytest-xdist too: the plugin is found there.
    options = ["-p", "played_gpu", "-m", "gpu", *options]
    if not any(Path(option.split("::")[0]).exists() for option in options):
        options += [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    sys.exit(pytest.main(options))
