"""LLaMA-Factory's SFT under the constraint: the file that `llamafactory-cli train` reads, and a callback.

    python examples/llama_factory.py train.yaml

With training tokens, set `use_reentrant_gc: false` (or `disable_gradient_checkpointing: true`) and `packing: false` in
the file; otherwise the run stops and says why. It also stops with DFT, EAFT and ASFT, which make losses of their own.

Tested on a CPU with LLaMA-Factory 0.9.5 and the newest versions that it takes: transformers 5.6.0, peft 0.18.1,
accelerate 1.11.0, trl 0.24.0 (LoRA, 5 steps of 2 micro-batches). The extra `llama-factory` admits them:
`pip install '.[llama-factory]'` in a checkout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="LLaMA-Factory's settings: a YAML file")
    parser.add_argument("--terms", default="probes", help="what the constraint keeps: probes, tokens (paper) or both")
    parser.add_argument("--schedule", default="procon_s", help="alpha over training: procon_s, or phases (1@2ep,0)")
    args = parser.parse_args()

    from llamafactory.train.tuner import run_exp

    from procon.integrations import ProConCallback

    callback = ProConCallback(terms=args.terms, schedule=args.schedule)
    run_exp(yaml.safe_load(args.config.read_text(encoding="utf-8")), callbacks=[callback])


if __name__ == "__main__":
    main()
