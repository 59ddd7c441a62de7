"""The documentation is held to the code: its Python runs, its commands parse, its YAML has known keys.

A page declares nothing. Its Python blocks run in order in one namespace, which holds ``model_name`` (a folder with a
tiny chat model and its tokenizer), ``data_file`` (JSON lines) and ``output_dir``; the current folder is a fresh one.
"""

import ast
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import yaml
from transformers import AutoTokenizer

import procon
from procon.chat import builtin_prompts
from procon.cli.parsing import COMMANDS, parse
from procon.data import load_conversations, tokenize_conversations
from procon.demo import arithmetic_problems, fetch_demo_model
from procon.errors import ProConError
from procon.training import ProConArguments

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]

#: The README's blocks leave more names to the reader; tests/project/test_readme.py sets them.
TESTED_ELSEWHERE = frozenset({ROOT / "README.md"})

LANGUAGES = {"python", "bash", "yaml", "text"}

#: Packages that ProCon does not need, and pages may.
OPTIONAL = {"axolotl", "bitsandbytes", "lightning", "trl"}

#: ChatML with TRL's marks around what the assistant says, for ``assistant_only_loss``.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)``` *$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the page, on which the code begins


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """All fenced blocks of a page, those in tabs and notes too."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(
            match["language"].split(" ")[0],
            textwrap.dedent(match["code"]),
            text.count("\n", 0, match.start("code")) + 1,
        )
        for match in _FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def pages_with(language: str, besides: frozenset[Path] = frozenset()) -> list:
    pages = [page for page in PAGES if page not in besides and blocks(page, language)]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def run_python(page: Path, names: dict) -> None:
    """Run all Python blocks of ``page``; a traceback names its lines."""
    for block in blocks(page, "python"):
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)


@pytest.fixture
def tokenizer(tokenizer):
    """With words for tokens and not bytes, so that the pages' samples are as short as a real model's."""
    problems = [text for problem in arithmetic_problems(200, seed=0) for text in problem.values()]
    words = tokenizer.train_new_from_iterator([*builtin_prompts("extraction").malicious, *problems], vocab_size=1000)
    words.chat_template = CHAT_TEMPLATE
    return words


@pytest.fixture
def names(place, few_prompts, monkeypatch) -> dict:
    """What a page's blocks may take for granted."""
    module = ModuleType("page")  # a real one, so that classes of a page can be pickled into a checkpoint
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module).update(model_name=str(place / "model"), data_file="data.jsonl", output_dir=str(place / "out"))
    return vars(module)


def test_every_block_has_a_language_that_is_tested():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(blocks(page)), f"{page}: a fence that is not closed"
        assert "~~~" not in text, f"{page}: fences are written with backticks"
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{page}:{block.line}: a block of {block.language or 'no language'}"


@pytest.mark.parametrize("page", pages_with("python", besides=TESTED_ELSEWHERE))
def test_python_runs(page, names):
    try:
        run_python(page, names)
    except ModuleNotFoundError as missing:
        if missing.name not in OPTIONAL:
            raise
        pytest.skip(f"{page.name} is about {missing.name}, which is not installed")


def test_the_first_example_runs_with_the_tokenizer_of_the_quickstart(names, tiny_model):
    """For whose template TRL has none for training: the labels are those of `procon train`."""
    pytest.importorskip("trl", reason="the example's trainer extends TRL's")
    tokenizer = AutoTokenizer.from_pretrained(fetch_demo_model())
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(names["model_name"])
    tokenizer.save_pretrained(names["model_name"])
    # Short: TRL's loss over so many words takes seconds per step.
    Path(names["data_file"]).write_text('{"prompt": "count to 2", "completion": "1 2"}\n' * 2)
    run_python(ROOT / "docs" / "index.md", names)
    expected = tokenize_conversations(load_conversations(names["data_file"]), tokenizer)
    assert names["trainer"].train_dataset["labels"] == expected["labels"]


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and words of each simple command in a page's shell blocks."""
    for block in blocks(page, "bash"):
        lines = block.code.replace("\\\n", " " * 2).splitlines()
        for number, line in enumerate(lines, block.line):
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word not in ("&&", "||", "|", ";", "&"):
                    words.append(word)
                    continue
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield number, words
                words = []


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_are_ours(page, tmp_path, monkeypatch):
    """Commands of ours parse, scripts exist and know the flags that they are given, extras are declared."""
    for line, words in commands(page):
        where = f"{page}:{line}: {' '.join(words)}"
        if words[0].rpartition("/")[2] == "procon":
            check_procon(words[1:], where)
        script = next((at for at, word in enumerate(words) if word.endswith((".py", ".sh")) and "/" in word), None)
        for word in words:
            path = word.partition("::")[0]
            if path.startswith(("examples/", "benchmarks/", "tests/")):
                assert (ROOT / path).exists(), f"{where}: there is no {path}"
        if script is not None:
            flags = [word.partition("=")[0] for word in words[script + 1 :] if word.startswith("--")]
            known = flags_of(ROOT / words[script]) if words[0] != "pytest" else flags
            assert set(flags) <= {*known, "--help"}, f"{where}: {words[script]} has {sorted(known)}"
        if "install" in words:
            for extra in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
                assert set(extra.split(",")) <= declared_extras(), f"{where}: setup.py declares other extras"


def flags_of(script: Path) -> set[str]:
    """What an example takes: its own arguments, and the fields of the configuration that it parses."""
    text = script.read_text(encoding="utf-8")
    flags = set(re.findall(r'add_argument\("(--[\w-]+)"', text))
    if "HfArgumentParser" in text:
        flags |= {f"--{name}" for name in re.findall(r"^    (\w+): .* = field\(", text, re.MULTILINE)}
        config = re.search(r"HfArgumentParser\(\(ScriptArguments, (\w+)\)\)", text)[1]
        flags |= {f"--{field.name}" for field in fields(getattr(procon, config))}
    return flags


def check_procon(words: list[str], where: str) -> None:
    if (
        words in (["--version"], ["-V"], ["--help"])
        or words[1:] == ["--help"]
        or (words[0] == "help" and words[1] in COMMANDS)
    ):
        return
    assert words[0] in COMMANDS, where
    if "--config" in words:  # its settings are those of a YAML block, checked as one
        at = words.index("--config")
        words = [*words[:at], *words[at + 2 :], "--model", "MODEL", "--data", "DATA"]
    try:
        parse(words[0], words[1:], look=False)
    except ProConError as error:
        raise AssertionError(f"{where}: {error}") from error


def declared_extras() -> set[str]:
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    return set(re.findall(r'^    "([\w-]+)": [[A-Z]', source, re.MULTILINE)) | set(
        re.findall(r'^EXTRAS\["([\w-]+)"\]', source, re.MULTILINE)
    )


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_yaml_has_known_keys(page, tmp_path):
    for block in blocks(page, "yaml"):
        check_yaml(block.code, f"{page}:{block.line}", tmp_path)


def check_yaml(text: str, where: str, folder: Path) -> None:
    settings = yaml.safe_load(text)
    assert isinstance(settings, dict), f"{where}: holds no 'name: value' lines"
    if "plugins" in settings or "base_model" in settings:
        # The keys that the plugin adds, without it: axolotl itself need not be there.
        ours = {field.name for field in fields(ProConArguments)} | {"procon_alpha", "procon_directions"}
        unknown = {name for name in settings if name.startswith("procon_")} - ours
    elif "distributed_type" in settings or "compute_environment" in settings:
        from accelerate.commands.config.config_args import ClusterConfig

        unknown = settings.keys() - ClusterConfig.__dataclass_fields__.keys()
    elif "model_name_or_path" in settings:  # LLaMA-Factory's own
        unknown = set()
    else:
        (folder / "settings.yaml").write_text(text, encoding="utf-8")
        parse("train", ["--config", str(folder / "settings.yaml")], look=False)
        return
    assert not unknown, f"{where}: unknown keys {sorted(unknown)}"


def test_settings_table_is_complete():
    """The table of settings has each field of ProConArguments with its default."""
    text = (ROOT / "docs" / "how-to" / "index.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(procon_\w+)` \| `([^`]+)` \|", text, re.MULTILINE))
    assert {name: ast.literal_eval(default) for name, default in table.items()} == {
        field.name: field.default for field in fields(ProConArguments)
    }


def test_versions_are_those_of_requirements():
    rows = re.findall(
        r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "docs" / "support.md").read_text(), re.MULTILINE
    )
    texts = ((ROOT / "requirements" / f"{name}.txt").read_text() for name in ("oldest", "newest"))
    oldest, newest = (dict(re.findall(r"^([\w-]+)[<=]=(\S+)$", text, re.MULTILINE)) for text in texts)
    assert rows == [(name, version, newest[name]) for name, version in oldest.items()]


#: Code, tables, headings, pictures and formulas.
_NO_PROSE = re.compile(r"^( *)```.*?^\1```|^ *(?:[|#:]|!\[).*?$|^ {4,}.*?$|\\\[.*?\\\]", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name)
        for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
        if page.name == "results.md" or "<!-- Generated by" not in page.read_text(encoding="utf-8")
    ],
)
def test_sentences_are_short(page):
    """At most 35 words, and 18 on the mean of a page by hand."""
    prose = re.sub(
        r"^ *([-*]|\d+\.) ", "\n\n", _NO_PROSE.sub("\n\n", page.read_text(encoding="utf-8")), flags=re.MULTILINE
    )
    sentences = [found.split() for found in re.split(r"(?<=[.!?])(?:\*\*|\))?\s+|\n\s*\n", prose) if found.split()]
    assert not [" ".join(words) for words in sentences if len(words) > 35]
    assert sum(map(len, sentences)) <= 18 * len(sentences)
