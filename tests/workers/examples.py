"""``examples.py FOLDER CONFIG...``: what ``examples/accelerate/train.py`` prints on two ranks, with each configuration.

Its environment is the one that ``accelerate launch`` would set.
"""

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import gloo
from accelerate.commands import launch
from accelerate.state import AcceleratorState, PartialState

from procon.directions import Directions

FOLDER = Path(sys.argv[1])
EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"
RANK = int(os.environ["RANK"])


def set_environment(config: str) -> None:
    ranks = {name: value for name, value in os.environ.items() if "RANK" in name or name.startswith("MASTER_")}
    arguments = launch.launch_command_parser().parse_args(
        [f"--config_file={EXAMPLES / config}", "--main_process_port=0", "train.py"]
    )
    arguments, defaults, _ = launch._validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        os.environ |= launch.prepare_deepspeed_cmd_env(arguments)[1]
    else:
        os.environ |= launch.prepare_multi_gpu_env(arguments)
    os.environ |= ranks


def extract(*_, **__) -> Directions:
    """As where the main process alone has the weights."""
    assert RANK == 0
    return Directions.load(FOLDER / "directions.safetensors")


def run(config: str) -> dict[str, str]:
    gloo.start(sharding=config == "fsdp2.yaml")
    set_environment(config)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    arguments = ["--model=model", "--data=data.jsonl", f"--output_dir={config}", "--batch_size=2", "--epochs=2"]
    arguments += ["--schedule=0@1steps,100@2steps,0", "--learning_rate=1e-3"]
    if config == "deepspeed_zero3.yaml":
        arguments += ["--directions=directions.safetensors", "--terms=tokens"]
    else:
        arguments.append("--terms=both")
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        mock.patch.object(sys, "argv", ["train.py", *arguments]),
        mock.patch.object(Directions, "extract", extract),
        # The ranks go on to the next.
        mock.patch.object(PartialState, "destroy_process_group"),
    ):
        runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    return {"kind": AcceleratorState().distributed_type.value, "printed": printed.getvalue()}


os.chdir(FOLDER)
found = {config: run(config) for config in sys.argv[2:]}
if RANK == 0:
    (FOLDER / "printed.json").write_text(json.dumps(found))
gloo.stop()
