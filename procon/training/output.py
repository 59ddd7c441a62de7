"""The output folder of a training: one training at a time, and none over what another has left there."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from procon.errors import ProConError
from procon.files import writing
from procon.method.probes import PROBES_FILE
from procon.method.ranks import on_main
from procon.method.record import RECORD, read_record
from procon.training.model_card import drop_section

try:
    import fcntl
except ImportError:  # without it, nothing is locked
    fcntl = None

#: Of the output folder, push_to_hub leaves out what begins with an underscore.
_LOCK = "_training.lock"

#: Of the output folder, the model that its adapter was merged into.
MERGED = "merged"

#: Weights that a training leaves; what loads the folder takes the first that it knows.
_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

#: What two records of the same training share from its beginning on.
_SAME = (
    "run",
    "arguments",
    "schedule",
    "scope",
    "penalty",
    "units",
    "anchors",
    "probes",
    "probe_batch",
    "probe_every",
    "probe_weight",
    "probe_reply_tokens",
)

#: Folders that this process has locked.
_held: set[Path] = set()


def output_folder(args: TrainingArguments) -> Path:
    """The run's own folder."""
    # None is what they may be made with: they then name one themselves.
    return Path(cast(str, args.output_dir))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the context, no other process trains into ``folder``; all ranks must enter, and share it.

    The lock is the system's, so it ends with the process, however that ends. Entered again within, it does nothing.

    Raises:
        ProConError: on every rank, if another process trains there, which is named, or the folder cannot be written.
    """
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(_locked(folder.resolve())))
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if folder in _held:
        yield
        return
    is_new = not folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = _acquire(folder / _LOCK)
    _held.add(folder)
    try:
        yield
    finally:
        _held.discard(folder)
        with file, suppress(OSError):
            (folder / _LOCK).unlink()
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _acquire(path: Path) -> IO[str]:
    """The open lock file; the lock is that of this process alone, and not of those that it forks."""
    while True:
        file = path.open("a+")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file meanwhile, and another may have made one in its place.
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.truncate(0)
                file.write(
                    f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
                )
                file.flush()
                return file
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise ProConError(
                f"output_dir {str(path.parent)!r} is in use: {holder} trains there: wait for it to end, or give "
                "another output_dir"
            ) from None
        except BaseException:
            file.close()
            raise
        file.close()


def claim(folder: Path, record: dict[str, Any], *, overwrite: bool) -> None:
    """Raise ProConError if another training has left weights or checkpoints in ``folder``.

    Those of the same training, started again, are no others.

    Args:
        record: of this training, as it begins.
        overwrite: delete them instead, and what is written beside them.
    """
    checkpoints = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    weights = [folder / name for name in _WEIGHTS if (folder / name).exists()]
    if not overwrite:
        others = [path for path in weights if not _is_same(folder, record, if_none=False)]
        # One that was being written as its run was killed has no record, and no one takes it for whole.
        others += [path for path in checkpoints if not _is_same(path, record, if_none=True)]
        if others:
            raise ProConError(
                f"output_dir {str(folder)!r} holds {others[0].name} of another training: give another output_dir, or "
                "pass procon_overwrite=True (--procon_overwrite true) to delete what it left"
            )
        return
    beside = [folder / name for name in (RECORD, PROBES_FILE, MERGED, "adapter_config.json", "trainer_state.json")]
    for path in (*beside, *weights, *checkpoints, *folder.glob("model-*-of-*.safetensors")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    drop_section(folder / "README.md")


def drop_merged(folder: Path) -> None:
    """Delete the merged model in ``folder``, before another adapter than the one in it is written there."""
    if (folder / MERGED).exists():
        shutil.rmtree(folder / MERGED)


def forget(folder: Path) -> None:
    """Take away what an earlier training has said of the model in ``folder``, before another one writes there."""
    (folder / RECORD).unlink(missing_ok=True)
    drop_section(folder / "README.md")


def _is_same(folder: Path, record: dict[str, Any], *, if_none: bool) -> bool:
    try:
        found = read_record(folder)
    except ProConError:
        return False
    return if_none if found is None else all(found.get(name) == record.get(name) for name in _SAME)
