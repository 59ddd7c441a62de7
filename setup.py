"""Packaging of ProCon. The folder ``kernels/`` installs as ``procon.kernels``: a top-level ``kernels`` would
shadow Hugging Face's package of that name, which transformers imports."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "procon" / "version.py").read_text(), re.M).group(1)

EXTRAS = {
    "demo": ["gguf>=0.10"],
    "trl": ["trl>=1.9,<2"],
    "train": ["tensorboard>=2.16", "wandb>=0.17"],
    "flash": ["flash-attn>=2.7"],
    "completion": ["shtab>=1.13"],
    "lm-eval": ["lm-eval>=0.4.13"],
    "docs": ["latex2mathml>=3.77", "mkdocs-material>=9.6", "mkdocstrings[python]>=1", "ruff>=0.12"],
    "study": ["markdown>=3.6", "scikit-learn>=1.6", "scipy>=1.13"],
    # One version of mutmut: another one makes other mutants.
    "mutation": ["coverage>=7.6", "mutmut==3.8.1"],
    # One version of pyright: another one finds other errors.
    "lint": [
        "codespell>=2.4",
        "import-linter>=2.5",
        "pre-commit>=4",
        "pre-commit-hooks>=6",
        "pyright==1.1.414",
        "ruff>=0.12",
    ],
}
EXTRAS["test"] = [
    *(
        requirement
        for name in ("completion", "demo", "trl", "train", "lm-eval", "docs", "study", "lint")
        for requirement in EXTRAS[name]
    ),
    "bitsandbytes>=0.50.2",
    "deepspeed>=0.19",
    "hypothesis>=6.100",
    "lightning>=2.6",
    "liger-kernel>=0.8",
    "playwright>=1.50",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "triton>=3.6,<4; platform_system == 'Linux'",
]

setup(
    name="procon-llm",
    version=VERSION,
    description="Fine-tune a chat model without it forgetting how to refuse: a fused projection constraint.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The ProCon developers",
    project_urls={"Paper": "https://arxiv.org/abs/2509.06795"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["procon", "procon.*"]), "procon.kernels"],
    package_dir={"procon": "procon", "procon.kernels": "kernels"},
    package_data={
        "procon.assets": ["*.jsonl", "refusal-adapters/*/*"],
        "procon.cli": ["accelerate_configs/*.yaml"],
        "procon": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11,<2.16",
        "transformers>=5.16.1,<6",
        "accelerate>=1.13",
        "peft>=0.20",
        "datasets>=4.8.4",
        "jinja2>=3.1.6",
        "safetensors>=0.8",
        "numpy>=2.1",
        "pyyaml>=6.0.1",
        "matplotlib>=3.9",
        "rich>=13.9",
        "tqdm>=4.66.3",
        "xxhash>=3.4.1",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["procon = procon.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
