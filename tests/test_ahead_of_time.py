"""Do the kernels build for real GPUs, in registers and with wide loads? Compiled ahead of time, no GPU needed.

Triton decides between compiler and interpreter when a kernel is declared, so each target is built by this same file run
as a program without ``TRITON_INTERPRET``; it prints one JSON record a kernel.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
MAIN = [
    (kernel, size, k, dtype, {"PENALTY": "squared"} if kernel == "_forward" else {})
    for kernel, size, k, dtype in product(("_forward", "_backward"), (576, 4096, 8192), (1, 4), ("bf16", "fp32"))
]
OTHERS = [
    ("_forward", 576, 1, "fp16", {"PENALTY": "absolute", "weight": None}),
    ("_forward", 576, 1, "bf16", {"PENALTY": "huber", "anchor": None}),
    ("_forward", 16384, 8, "bf16", {"PENALTY": None, "anchor": None, "weight": None, "token_penalty": None}),
    ("_backward", 576, 8, "bf16", {"incoming": None, "upstream": None}),
]


@pytest.fixture(scope="module", params=TARGETS)
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, __file__, request.param]
    built = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return [json.loads(line) for line in built.stdout.splitlines()]


def test_every_kernel_builds(records):
    assert len(records) == len(MAIN + OTHERS)


def test_nothing_spills(records):
    assert [r for r in records if r["spilled_bytes"]] == []
    # Half of what a thread can have: room for other compilers, and two blocks of 16 warps at a time.
    assert max(r["registers"] for r in records) <= 128


def test_loads_and_stores_are_wide(records):
    """All traffic in hidden states and gradients moves 16 bytes a thread: 8 bfloat16 or 4 float32 numbers."""
    for record in records:
        accesses = record["tile_bytes"] // record["threads"] // 16
        assert accesses >= 1, record
        assert record["wide_loads"] >= (accesses if record["reads"] else 0), record
        assert record["wide_stores"] >= (accesses if record["kernel"] == "_backward" else 0), record


def build(kernel: str, target: tuple, size: int, k: int, dtype: str, constants: dict):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from procon.kernels import launch, projection_penalty

    function = getattr(projection_penalty, kernel)
    tile = (launch.row_tile if kernel == "_forward" else launch.patch_tile)(size)
    constants = constants | {"D": size, "K": k, "ROWS": tile.rows, "COLUMNS": tile.columns}
    kinds = {"hidden": f"*{dtype}", "incoming": f"*{dtype}", "gradient": f"*{dtype}", "N": "i32"}
    kinds |= dict.fromkeys((name for name in function.arg_names if name.endswith(("_stride", "_step"))), "i32")
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "*fp32") for name in function.arg_names}
    aligned = [n for n, kind in signature.items() if kind[0] == "*" or n in ("hidden_stride", "incoming_stride")]
    position = {name: (index,) for index, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={position[name]: value for name, value in constants.items()},
        attrs={position[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = compile(source, target=GPUTarget(*target), options={"num_warps": tile.warps})
    return compiled, {
        "tile_bytes": tile.rows * tile.columns * (4 if dtype == "fp32" else 2),
        "threads": tile.warps * target[2],
        "reads": "incoming" not in constants,
    }


def nvidia_record(compiled) -> dict:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump).groups()
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(registers),
        "spilled_bytes": int(stack) + int(local),
        # Loads of directions carry a cache hint: those left are of hidden states and gradients.
        "wide_loads": len(re.findall(r"\bld\.global\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"\bst\.global\.v4\.b32", ptx)),
    }


def amd_record(compiled) -> dict:
    assembly = compiled.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),
        "spilled_bytes": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1]),
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly)),
        "wide_stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4", assembly)),
    }


def main(name: str) -> None:
    record = amd_record if name.startswith("gfx") else nvidia_record
    for kernel, size, k, dtype, constants in MAIN + OTHERS:
        compiled, tile = build(kernel, TARGETS[name], size, k, dtype, constants)
        shown = {"kernel": kernel, "size": size, "k": k, "dtype": dtype}
        print(json.dumps(shown | tile | record(compiled)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
