"""What limits how many warps reside on a multiprocessor, or wavefronts on a compute unit, of each architecture.

NVIDIA: CUDA C++ Programming Guide, "Compute Capabilities": 65536 registers, 64 warps and 32 blocks per multiprocessor,
in four parts with a scheduler each; 1 KiB of shared memory is reserved for each block. AMD: CDNA3 instruction set
reference and LLVM's "User Guide for AMDGPU Backend": 512 vector registers per lane and 8 wavefronts for each of four
SIMDs, 64 KiB of LDS. All of them allocate registers in units of 8 per lane.
"""

from typing import NamedTuple

from triton.backends.compiler import GPUTarget


class Processor(NamedTuple):
    """A multiprocessor has ``parts``, each with its own registers and warps."""

    target: GPUTarget
    parts: int
    registers: int  # of one part, per lane, of all its warps together
    warps: int  # of one part
    shared_bytes: int
    reserved_bytes: int  # shared memory that a block takes in addition to its own
    blocks: int


PROCESSORS = {
    "sm_80": Processor(GPUTarget("cuda", 80, 32), 4, 512, 16, 164 * 1024, 1024, 32),
    "sm_90": Processor(GPUTarget("cuda", 90, 32), 4, 512, 16, 228 * 1024, 1024, 32),
    "sm_100": Processor(GPUTarget("cuda", 100, 32), 4, 512, 16, 228 * 1024, 1024, 32),
    "gfx942": Processor(GPUTarget("hip", "gfx942", 64), 4, 512, 8, 64 * 1024, 0, 32),
}


def occupancy(processor: Processor, registers: int, warps: int, shared_bytes: int) -> float:
    """Share of the warps that a multiprocessor has room for, if it is filled with blocks of ``warps`` warps."""
    allocated = -(-registers // 8) * 8
    by_registers = min(processor.warps, processor.registers // allocated) * processor.parts // warps
    by_shared = processor.shared_bytes // max(1, shared_bytes + processor.reserved_bytes)
    return min(by_registers, by_shared, processor.blocks) * warps / (processor.warps * processor.parts)
