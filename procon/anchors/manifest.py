"""What a folder of anchors says of itself: whose they are, and which blocks, tokens and directions they cover."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from procon.errors import ProConError
from procon.files import json_checksum, write_text
from procon.settings import CHOICES, MAX_DIRECTIONS, TokenScope

MANIFEST = "anchors.json"

#: Version of the folder's format.
FORMAT = 2


@dataclass(frozen=True)
class Manifest:
    """Of one folder of anchors.

    Attributes:
        fingerprint: of the state that they were recorded in, 16 hexadecimal digits.
        blocks: those that were recorded, in order.
        scope: tokens that were recorded.
        k: directions per block.

    Raises:
        ValueError: for values that these cannot have.
    """

    fingerprint: str
    blocks: tuple[int, ...]
    scope: TokenScope
    k: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.fingerprint, str) and re.fullmatch("[0-9a-f]{16}", self.fingerprint)):
            raise ValueError(f"fingerprint is {self.fingerprint!r}, not 16 hexadecimal digits")
        if not all(type(block) is int and block >= 0 for block in self.blocks):
            raise ValueError(f"blocks are {list(self.blocks)!r}, not indices")
        if self.scope not in CHOICES["scope"]:
            raise ValueError(f"scope is {self.scope!r}")
        if type(self.k) is not int or not 1 <= self.k <= MAX_DIRECTIONS:
            raise ValueError(f"k is {self.k!r}, not 1 to {MAX_DIRECTIONS}")

    @property
    def columns(self) -> int:
        """Values per token."""
        return len(self.blocks) * self.k

    def write(self, folder: Path) -> None:
        """Put it into ``folder``."""
        content = self._content()
        write_text(json.dumps({**content, "checksum": json_checksum(content)}, indent=2) + "\n", folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """That of ``folder``.

        Raises:
            ProConError: if there is none, or it is damaged, or of another version.
        """
        if not (folder / MANIFEST).exists():
            raise ProConError(f"no anchors in {str(folder)!r}: record them with Anchors.record before training")
        found = cls.read_if_whole(folder)
        if isinstance(found, Manifest):
            return found
        raise ProConError(
            f"anchors manifest in {str(folder)!r} is damaged ({found}): record again from the starting model with "
            "Anchors.record, which keeps what is whole"
        )

    @classmethod
    def read_if_whole(cls, folder: Path) -> Manifest | str:
        """That of ``folder``, or what is wrong with it: then it can be written again.

        Raises:
            ProConError: if it is of another version.
        """
        try:
            data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                return f"it holds {type(data).__name__}"
            checksum, number = data.pop("checksum", None), data.pop("format", None)
            intact = checksum == json_checksum({"format": number, **data})
            if number == FORMAT and intact:
                return cls(**{**data, "blocks": tuple(data["blocks"])})
        # Of an OSError: a folder in its place, or a file that may not be read.
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            return f"no key {error}" if isinstance(error, KeyError) else str(error)
        if intact or (checksum is None and number is None and "fingerprint" in data):
            raise ProConError(
                f"anchors in {str(folder)!r} were recorded by another version of ProCon (format {number or 1}, not "
                f"{FORMAT}): give another folder, or delete this one to record again"
            )
        return "its checksum differs"

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "blocks": list(self.blocks)}
