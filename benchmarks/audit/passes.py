"""Does a pass of the compiler change what a kernel computes? Its IR before each pass is run on a CPU, by ttsem.

Triton lowers a kernel in some sixty passes. The module that each one is given is run on the same inputs, and what it
leaves in memory is compared with what the front end's module leaves. Results may differ by the order of a sum, and by
the last places of what the hardware computes approximately. Below LLVM's dialect nothing is run.

It needs ttsem and the version of Triton that ttsem knows (``requirements/compiled.txt``).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from unittest.mock import patch

from rich.console import Console
from rich.table import Table
from triton import JITFunction
from ttsem import harness, validate

from benchmarks.audit.builds import Shape, launched_for
from benchmarks.audit.calls import calls
from benchmarks.audit.processors import PROCESSORS

#: Of no tile, and more rows than the programs of a backward take in one round.
ROWS, SIZE, DIRECTIONS = 11, 1000, 3


@dataclass(frozen=True)
class Record:
    target: str
    call: str
    size: int
    kernel: str
    stages: int
    #: Number of stages by what ttsem says of them: match, approx, mismatch, unsupported or error.
    verdicts: dict[str, int]
    changed_by: str | None  # the pass whose result first means something else
    not_run: list[str]  # the first stage that was not run, and why


@contextmanager
def _recorded() -> Iterator[list[harness.LaunchRecord]]:
    """The launches made inside, with a copy of what is in memory then; none of which runs."""
    records = []

    def run(function, *positional, grid, warmup, **named):
        found = harness.record_launch(function, positional, named, grid, lambda *_, **__: None, "", len(records))
        records.append(found.record)

    with patch.object(JITFunction, "run", run):
        yield records


def _validated(record: harness.LaunchRecord, target: str) -> validate.Report:
    stages = validate.split_dump(harness.dump_for_launch(record, PROCESSORS[target].target))
    expected = harness.final_state(record, harness.mlir.to_generic(stages[0][1]))
    if isinstance(expected, harness.Comparison):
        raise RuntimeError(f"ttsem cannot run {record.fn_name}: {expected.verdict} {expected.message}")
    record.post = expected
    return validate.validate_stages(record, stages)


def run(targets: list[str], sizes: list[int] | None = None) -> list[dict]:
    """``sizes``: of the hidden states."""
    return [asdict(record) for target in targets for size in sizes or [SIZE] for record in _records(target, size)]


def _records(target: str, size: int) -> Iterator[Record]:
    shape = Shape(size, DIRECTIONS, penalty="absolute")
    for name, call in calls(ROWS, *shape).items():
        with launched_for(target), _recorded() as launches:
            call.run()
        for launch in launches:
            report = _validated(launch, target)
            yield Record(
                target=target,
                call=name,
                size=size,
                kernel=report.kernel,
                stages=len(report.passes),
                verdicts=dict(Counter(stage.verdict for stage in report.passes)),
                changed_by=report.changed_by,
                not_run=[
                    f"{stage.pass_name}: {stage.message}"
                    for stage in report.passes
                    if stage.verdict not in ("match", "approx", "mismatch")
                ],
            )


def show(records: list[dict]) -> None:
    table = Table(title="What the passes of the compiler make of each kernel")
    for heading in ("call", "D", "target", "passes", "same bits", "within rounding", "not run", "changed by"):
        justify = "left" if heading in ("call", "target", "changed by") else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for r in records:
        verdicts = Counter(r["verdicts"])
        same, near, changed = (verdicts[name] for name in ("match", "approx", "mismatch"))
        run = same + near + changed
        numbers = (run, same, near, r["stages"] - run)
        table.add_row(r["call"], str(r["size"]), r["target"], *map(str, numbers), r["changed_by"] or "none")
    Console().print(table)
    if changed := [r["call"] for r in records if r["changed_by"] or "error" in r["verdicts"]]:
        raise SystemExit(f"a pass changes the meaning of a kernel, or its module cannot be read: {', '.join(changed)}")
