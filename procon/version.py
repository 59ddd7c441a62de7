"""This version, and the newest versions of other packages that it was tested with."""

import logging
import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.2.0.dev0"

#: Of those that decide what a training computes. `.ci/run unpinned` renews them.
TESTED = {
    "torch": "2.15.0",
    "triton": "3.9.0",
    "transformers": "5.25.0",
    "accelerate": "1.16.0",
    "peft": "0.21.2",
    "trl": "1.16.0",
    "datasets": "5.2.0",
    "kernels": "0.19.1",
}


@cache
def say_untested() -> None:
    """Warn, once in a process, if a package that is in use is newer than the newest version tested."""
    newer = []
    for name, tested in TESTED.items():
        try:
            installed = version(name) if name in sys.modules else tested
        except PackageNotFoundError:  # a module of that name from elsewhere
            continue
        if _numbers(installed) > _numbers(tested):
            newer.append(f"{name} {installed} (tested: up to {tested})")
    if newer:
        logging.getLogger(__name__).warning(
            "newer than this version of ProCon was tested with: %s. If something breaks, take the tested ones: pip "
            "install --constraint requirements/newest.txt",
            ", ".join(newer),
        )


def _numbers(text: str) -> list[int]:
    """The release that a version is of, or comes before."""
    return [int(number) for number in re.split(r"[^\d.]", text)[0].split(".") if number]
