"""How many bytes each load and store moves per thread, and for which argument: read from what the compiler made.

Addresses are followed back to the argument that they start from: in PTX for NVIDIA, in the LLVM IR handed to the
backend for AMD, whose assembly must then have as many accesses of 16 bytes.
"""

import re
from collections.abc import Iterator

from triton.compiler import CompiledKernel


def widths(compiled: CompiledKernel) -> list[tuple[int, str, int]]:
    """(number of the argument, ``"load"`` or ``"store"``, bytes per thread) of each access to global memory."""
    if "ptx" in compiled.asm:
        return list(_in_ptx(compiled.asm["ptx"]))
    found = list(_in_llvm(compiled.asm["llir"]))
    for way in ("load", "store"):
        wide = sum(access[1:] == (way, 16) for access in found)
        if len(re.findall(rf"\b(?:global|buffer)_{way}_dwordx4\b", compiled.asm["amdgcn"])) < wide:
            raise RuntimeError(f"the backend splits a {way} of 16 bytes")
    return found


def _in_ptx(code: str) -> Iterator[tuple[int, str, int]]:
    origin: dict[str, int] = {}
    for line in code.splitlines():
        if found := re.search(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
            origin[found[1]] = int(found[2])
        elif found := re.search(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s", line):
            address = re.search(r"\[\s*(%rd\d+)", line)[1]
            yield origin[address], "load" if found[1] == "ld" else "store", int(found[2] or 1) * int(found[3]) // 8
        elif found := re.search(
            r"\bcp\.async\.c[ag]\.shared\.global\s.*\[\s*(%rd\d+)[^]]*\],\s*(0x[0-9a-f]+|\d+)", line
        ):
            yield origin[found[1]], "load", int(found[2], 0)
        elif found := re.match(r"\s*(?:@\S+\s+)?\S+\s+(%rd\d+), (.*);", line):
            sources = [origin[register] for register in re.findall(r"%rd\d+", found[2]) if register in origin]
            if sources:
                (origin[found[1]],) = set(sources)


_POINTER = re.compile(r"ptr addrspace\([18]\)(?: \w+)* (%[\w.]+)")
_MADE = re.compile(r"(%[\w.]+) = (?:getelementptr|(?:tail )?call ptr addrspace\(8\) @llvm\.amdgcn\.make\.buffer)")
_TYPE = r"(<\d+ x \w+>|\w+)"
_LOADED = re.compile(rf"= (?:load|(?:tail )?call) {_TYPE}(?:,| @llvm\.amdgcn\.raw\.ptr\.buffer\.load)")
_STORED = re.compile(rf"(?:store |call void @llvm\.amdgcn\.raw\.ptr\.buffer\.store\.\w+\(){_TYPE} ")


def _in_llvm(code: str) -> Iterator[tuple[int, str, int]]:
    origin: dict[str, int] = {}
    for line in code.splitlines():
        bases = _POINTER.findall(line)
        if line.startswith("define"):
            origin = {name: int(name[1:]) for name in re.findall(r"%\d+", line)}
        elif not bases:
            continue
        elif found := _MADE.search(line):
            origin[found[1]] = origin[bases[0]]
        elif found := _LOADED.search(line):
            yield origin[bases[0]], "load", _bytes(found[1])
        elif found := _STORED.search(line):
            yield origin[bases[0]], "store", _bytes(found[1])
        else:
            raise RuntimeError(f"an access that this audit cannot read: {line.strip()}")


def _bytes(kind: str) -> int:
    count, element = re.fullmatch(r"(?:<(\d+) x )?(\w+)>?", kind).groups()
    bits = {"half": 16, "bfloat": 16, "float": 32, "double": 64}.get(element) or int(element.removeprefix("i"))
    return int(count or 1) * bits // 8
