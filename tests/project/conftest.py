"""What tests of the project as a whole share."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

_PROGRAM = """
import json, runpy
from unittest import mock

with mock.patch("setuptools.setup") as setup:
    runpy.run_path("setup.py")
print(json.dumps(setup.call_args.kwargs))
"""


@pytest.fixture(scope="session")
def setup() -> dict[str, Any]:
    """What setup.py declares.

    Read in a process of its own: in one that had run other tests, importing setuptools once stopped at Python's own
    distutils.
    """
    done = subprocess.run([sys.executable, "-c", _PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
