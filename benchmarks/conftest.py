"""Interleaved samples in pytest-benchmark's tables and files; the machine they are from; the ratios at the end.

pytest-benchmark times one test after another. Contenders are timed in turn instead
(:mod:`benchmarks.harness.interleaved`), and each test then replays its samples: a clock given as pytest-benchmark's
``timer`` goes forward by one sample per round.
"""

import pytest

from benchmarks.harness import machine
from benchmarks.harness.interleaved import Samples
from procon import errors

# The suites load no data set, so a machine that is there for the GPU need not have the package.
errors.EXTRAS["train"] = tuple(package for package in errors.EXTRAS["train"] if package != "datasets")


class _Clock:
    def __init__(self):
        self._now = 0.0

    def interleaved_samples(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


_CLOCK = _Clock()
_KEEPS_MEMORY = pytest.StashKey[bool]()
_RATIOS = pytest.StashKey[list[tuple[str, str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RATIOS] = []
    config.stash[_KEEPS_MEMORY] = machine.keep_freed_memory()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=_CLOCK.interleaved_samples))


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info["procon"] = machine.describe()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    # Not part of the machine: --benchmark-compare warns if that differs.
    output_json["run"] = {
        "command": " ".join(["pytest", *map(str, config.invocation_params.args)]),
        "size": machine.SIZE,
        "freed_memory_kept": config.stash[_KEEPS_MEMORY],
        "copy_bandwidth": machine.copy_bandwidth(),
    }


@pytest.fixture
def replay(benchmark, request: pytest.FixtureRequest):
    """``replay(group, samples, contender, baseline, **extra)`` hands one contender's samples to pytest-benchmark."""

    def hand_over(group: str, samples: Samples, contender: str, baseline: str, **extra: object) -> None:
        ratios = {other: samples.ratio(contender, other) for other in samples.seconds if other != contender}
        benchmark.group = group
        benchmark.extra_info.update(
            contender=contender,
            baseline=baseline,
            ratios={other: ratio._asdict() for other, ratio in ratios.items()},
            **extra,
        )
        seconds = iter(samples.seconds[contender])
        rounds = len(samples.seconds[contender])
        benchmark.pedantic(_CLOCK.advance, setup=lambda: ((next(seconds),), {}), rounds=rounds)
        if contender != baseline:
            ratio = ratios[baseline]
            line = f"{ratio.median:6.3f} times {baseline}, 95% [{ratio.low:.3f}, {ratio.high:.3f}], {rounds} pairs"
            request.config.stash[_RATIOS].append((group, contender, line))

    return hand_over


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for group, contender, line in config.stash[_RATIOS]:
        groups.setdefault(group, []).append((contender, line))
    if groups:
        terminalreporter.section("median of paired ratios")
    for group, lines in groups.items():
        terminalreporter.write_line(group)
        for contender, line in lines:
            terminalreporter.write_line(f"    {contender:<24}{line}")
