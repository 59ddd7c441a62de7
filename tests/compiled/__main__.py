"""``python tests/compiled [PATHS] [options of pytest]``: tests marked ``gpu`` run on a GPU that ttsem plays on the CPU.

It needs ttsem and the version of Triton that it knows (``requirements/compiled.txt``), and runs all tests if no path is
given. ``not_run.toml`` lists those that it cannot run, and why.
"""

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    # The folder of this file is on the path, also for the processes of pytest-xdist: the plugin is found there.
    given = sys.argv[1:]
    tests = [] if any(Path(part.split("::")[0]).exists() for part in given) else [str(Path(__file__).parents[1])]
    sys.exit(pytest.main(["-p", "played_gpu", "-m", "gpu", *tests, *given]))
