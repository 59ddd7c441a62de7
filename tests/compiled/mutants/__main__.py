"""``python tests/compiled/mutants [REGEX]``: does each planted fault of the kernels fail a test that needs no GPU?

Each of ``planted.py`` is written into a copy of the package, one at a time, on which the tests of compiled kernels then
run up to the first that fails. A copy without a fault has to pass first. It prints the test that finds each fault, and
ends with status 1 if one was not found. It needs what ``python tests/compiled`` needs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from planted import FAULTS, Fault
from tqdm import tqdm

ROOT = Path(__file__).parents[3]
TESTS = ("tests/compiled/test_kernels.py", "tests/ops/test_projection_penalty.py", "tests/ops/test_rms_norm_penalty.py")
#: Tests of these names are run first, because they launch what is in the file.
FIRST = {"rms_norm_penalty.py": "norm or weights", "projection_penalty.py": "projection or penalty"}
#: Of one fault's run, which may be a loop without an end.
SECONDS = 1200


def copied(fault: Fault | None, folder: Path) -> None:
    """A copy of the package in ``folder``, with the fault if there is one.

    Raises:
        ValueError: if the file has not what is replaced, as often as the fault says.
    """
    shutil.copytree(ROOT / "procon", folder / "procon", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", folder / "procon" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    if fault is None:
        return
    file = folder / "procon" / "kernels" / fault.file
    parts = file.read_text().split(fault.old)
    if len(parts) != fault.times + 1:
        raise ValueError(
            f"{fault.file} has {len(parts) - 1} times {fault.old!r}, not {fault.times}: correct planted.py"
        )
    left, right = parts[: fault.which + 1], parts[fault.which + 1 :]
    file.write_text(fault.old.join(left) + fault.new + fault.old.join(right))


def first_failure(fault: Fault | None) -> str:
    """The test that finds the fault, and by what; empty if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copied(fault, Path(folder))
        first = [] if fault is None else ["-k", FIRST.get(fault.file, "norm and not gradient")]
        return failure(folder, *first) or (failure(folder) if first else "")


def failure(folder: str, *options: str) -> str:
    """The first test that fails with the package in ``folder``, and by what; empty if all pass."""
    command = [sys.executable, "-P", str(ROOT / "tests" / "compiled"), *TESTS, "-x", "-q", "-n", "0", "--tb=line"]
    command += ["-p", "no:cacheprovider", *options]
    environment = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS} s"
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", done.stdout, re.M)
    if found is None:
        raise RuntimeError(f"the tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    reason = re.search(r"^E +(.+)$", done.stdout, re.M)
    return f"{found[1]}: {reason[1] if reason else 'no reason given'}"


def main() -> int:
    wanted = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
    faults = [fault for fault in FAULTS if wanted.search(f"{fault.file}: {fault.what}")]
    missed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sound = pool.submit(first_failure, None)
        running = {pool.submit(first_failure, fault): fault for fault in faults}
        for done in tqdm(as_completed(running), total=len(faults), unit="fault"):
            fault, found = running[done], done.result()
            missed += not found
            tqdm.write(f"{fault.file}: {fault.what}: {found or 'NOT FOUND'}", file=sys.stdout)
    if sound.result():
        print(f"without a fault a test fails too, so nothing of this counts: {sound.result()}")
        return 1
    print(f"{len(faults) - missed} of {len(faults)} faults were found; without one all tests pass")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
