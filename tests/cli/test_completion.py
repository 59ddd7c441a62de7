"""Tab completion, in a real bash; and that other shells' scripts are made."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from procon.cli import main

shtab = pytest.importorskip("shtab")

#: Completes the line that is given word by word, as bash does it at the last one.
_COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"$(complete -p procon | sed 's/.*-F \\([^ ]*\\) .*/\\1/')" procon "${COMP_WORDS[COMP_CWORD]}" x
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "procon.bash"
    made = subprocess.run([sys.executable, "-m", "procon.cli", "completion", "bash"], capture_output=True, check=True)
    file.write_bytes(made.stdout)
    return file


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("procon tr", {"train"}),
        ("procon co", {"completion"}),
        ("procon help ev", {"eval"}),
        ("procon train --procon_pen", {"--procon_penalty"}),
        ("procon train --procon_penalty ", {"absolute", "huber", "squared"}),
        ("procon train --procon_penalty absolute --save_strategy st", {"steps"}),
        ("procon train --flatten ", {"true", "false"}),
        ("procon eval mod", {"models"}),
        ("procon eval --malicious ro", {"rows.jsonl"}),
        ("procon report ro", {"rows.jsonl"}),
        ("procon completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_bash(script, line, offered, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "rows.jsonl").touch()
    words = ["bash", "--norc", "-c", _COMPLETE, "bash", str(script), *line.split(" ")]
    found = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stderr == ""
    assert {word.strip().rstrip("/") for word in found.stdout.splitlines()} - {""} == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "procon_penalty" in text
    assert "quickstart" in text


def test_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'procon-llm[completion]'" in capsys.readouterr().err
    assert main(["completion", "sh"]) == 2
    assert "shell is 'sh': choose one of bash, zsh, fish" in capsys.readouterr().err
