"""The ``procon`` command.

In: flags, or settings in a YAML file.
Out: what the library found, and an exit code.
May import: every room; but before a command runs, nothing that loads torch.
"""

from procon.cli.parsing import main

__all__ = ["main"]
