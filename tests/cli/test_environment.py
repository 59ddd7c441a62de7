"""``procon env``: the lines of a bug report."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from procon.cli import main
from procon.cli.environment import VARIABLES, describe_environment
from procon.version import __version__

ROOT = Path(__file__).parents[2]


def test_lines_to_paste(capsys, monkeypatch):
    monkeypatch.setenv("PROCON_CACHE", "/a\x1bplace")
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("- ") and ": " in line for line in lines)
    assert f"- ProCon: {__version__}" in lines
    text = "\n".join(lines)
    assert f"torch {torch.__version__}" in text
    assert f"transformers {transformers.__version__}" in text
    assert "PROCON_CACHE=/a\\x1bplace" in text
    if not torch.cuda.is_available():
        assert "- backend `auto`: eager: there is no CUDA or ROCm GPU" in lines
        assert "- attention for packing: sdpa: there is no CUDA or ROCm GPU" in lines


def test_as_json(capsys):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == describe_environment()
    assert facts["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("eager", "eager: PROCON_BACKEND says so"),
        ("cuda", "none: PROCON_BACKEND is 'cuda', which is not one of auto, triton, eager"),
    ],
)
def test_what_auto_means_goes_by_the_variable(monkeypatch, value, told):
    monkeypatch.setenv("PROCON_BACKEND", value)
    assert describe_environment()["auto"]["backend"] == told


def test_a_gpu(monkeypatch):
    class Facts:
        name, major, minor, total_memory = "a GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Facts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("procon.ops.backends._triton_installed", lambda: True)
    facts = describe_environment()
    assert facts["devices"][1].startswith("CUDA 0: a GPU, capability 9.0, 80 GiB")
    assert facts["auto"]["backend"] == "triton: there is a GPU, and Triton is installed"


def test_every_variable_that_is_read_is_shown():
    read = set()
    for file in [*ROOT.glob("procon/**/*.py"), *ROOT.glob("kernels/*.py")]:
        read |= set(re.findall(r'environ(?:\.get\(|\[)?"?([A-Z_]{3,})"', file.read_text()))
        read |= set(re.findall(r'"([A-Z_]{3,})" in os\.environ', file.read_text()))
    assert {"LOCAL_RANK", "PROCON_CACHE"} <= read <= {*VARIABLES}
