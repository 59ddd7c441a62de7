"""The folder of a run: one training at a time, checkpoints that are whole or none, and what a run must share with the
one that it goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from procon.errors import ProConError
from procon.files import sync, sync_files, writing
from procon.method.record import RECORD, read_record, write_record
from procon.models import weights_hash
from procon.ranks import on_main
from procon.settings import ProConSettings
from procon.training.model_card import drop_section

try:
    import fcntl
except ImportError:  # without it, nothing is locked
    fcntl = None

logger = logging.getLogger(__name__)

#: Weights that a training leaves; what loads the folder takes the first that it knows.
_WEIGHTS = ("adapter_model.*", "model.safetensors*", "pytorch_model.bin*")

#: Endings of the files that weights, states and lists of them are in.
_LOADED = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".index.json")

#: What two records of the same training share from its beginning on.
_SAME = ("run", *(setting.name for setting in fields(ProConSettings) if setting.name not in ("blocks", "anchors_dir")))

#: Bytes that are read at a time.
_PIECE = 16 * 2**20

#: Of a model's or an adapter's configuration, what the computation does not depend on.
_NO_MATTER = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "name_or_path"}
_NO_MATTER |= {"base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping"}

#: What to do about a fact that differs, beyond giving the same settings.
REMEDIES = {
    "base_model": "load the model that the run began with",
    "model": "load the model, and train an adapter or parameters, as the run did",
    "training_data": "give the same rows in the same order",
    "reference_model": "give the reference model that the run began with",
    "samples_per_step": "keep ranks times batch size times gradient accumulation steps as it was",
}

#: Folders that this process has locked.
_held: set[Path] = set()


def output_folder(args: TrainingArguments) -> Path:
    """The run's own folder."""
    return Path(cast(str, args.output_dir))  # None is what they may be made with: they then name one themselves


# One training at a time


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the context, no other process trains into ``folder``; all ranks must enter, and share it.

    The lock is the system's, on the folder itself, so it ends with the process, however that ends. Entered again
    within, it does nothing.

    Raises:
        ProConError: on every rank, if another process trains there, or the folder cannot be made.
    """
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(_locked(folder.resolve())))
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if fcntl is None or folder in _held:
        yield
        return
    is_new = not folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ProConError(
                f"output_dir {str(folder)!r} is in use by another training: wait for it to end, or give another"
            ) from None
        except OSError:  # the file system has no locks
            pass
        _held.add(folder)
        yield
    finally:
        _held.discard(folder)
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def claim(folder: Path, record: dict[str, Any]) -> None:
    """Raise ProConError if another training than that of ``record`` has left weights or checkpoints in ``folder``."""
    left = [(path, folder) for name in _WEIGHTS for path in folder.glob(name)]
    left += [(path, path) for path in _checkpoints(folder) if _is_whole(path)]
    for path, place in left:
        if not _is_same(place, record):
            raise ProConError(
                f"output_dir {str(folder)!r} holds {path.name} of another training: give another output_dir, or "
                "delete what is there"
            )


def forget(folder: Path) -> None:
    """Take away what an earlier training has said of the model in ``folder``, before another one writes there."""
    (folder / RECORD).unlink(missing_ok=True)
    drop_section(folder / "README.md")


def _is_same(folder: Path, record: dict[str, Any]) -> bool:
    try:
        found = read_record(folder) or {}
    except ProConError:
        return False
    return all(found.get(name) == record.get(name) for name in _SAME)


# Whole checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of which every file was found to be as it was written.

    Attributes:
        path: its folder.
        record: what its ``procon.json`` holds.
    """

    path: Path
    record: dict[str, Any]


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Declare a checkpoint whole: wait until its files are on the disk, then write the record with their checksums.

    Every rank must have written its own by now.
    """
    sync_files(folder)
    sync(folder.parent)
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD)
    files = {path.relative_to(folder).as_posix(): _checksum(path) for path in paths}
    write_record(folder, {**record, "files": files})


def open_checkpoint(folder: Path, *, resumes: bool = True) -> Checkpoint:
    """The checkpoint in ``folder``, every file of which is read once.

    Raises:
        ProConError: if it is not whole or damaged, naming the file, or holds weights that it was not saved with; or, if
            training ``resumes`` from it, was saved without what that needs.
    """
    found = _whole(folder, resumes)
    _refuse_others(found)
    return found


def _whole(folder: Path, resumes: bool = True) -> Checkpoint:
    record = read_record(folder) or {}
    files = record.get("files")
    if not files:
        raise ProConError(f"{str(folder)!r} is not a complete checkpoint: resume from another, or start afresh")
    if resumes and not record.get("resumable"):
        raise ProConError(
            f"checkpoint {str(folder)!r} was saved without the optimiser's state (save_only_model), so training would "
            "not go on as it was: start afresh, and save with save_only_model=False"
        )
    for name, expected in files.items():
        try:
            is_whole = _checksum(folder / name) == expected
        except OSError:  # it is missing, or a folder, or the disk does not give it
            is_whole = False
        if not is_whole:
            raise ProConError(
                f"checkpoint file {str(folder / name)!r} is missing, or not as it was written: resume from another "
                "checkpoint, or start afresh"
            )
    return Checkpoint(folder, record)


def _refuse_others(checkpoint: Checkpoint) -> None:
    """Raise ProConError for weights that are not of the checkpoint: they may be read before those that are."""
    for path in sorted(checkpoint.path.rglob("*")):
        name = path.relative_to(checkpoint.path).as_posix()
        if name.endswith(_LOADED) and name not in checkpoint.record["files"]:
            raise ProConError(
                f"file {str(path)!r} was put there after the checkpoint was saved, and may be loaded in place of its "
                "weights: move it to a folder of its own"
            )


def latest(output_dir: Path) -> Checkpoint | None:
    """The latest whole checkpoint under ``output_dir``; a warning names each later one, and what is wrong with it.

    Raises:
        ProConError: if it holds weights that it was not saved with.
    """
    for path in reversed(_checkpoints(output_dir)):
        try:
            found = _whole(path)
        except ProConError as error:
            logger.warning("passed over %s: %s", path.name, error)
        else:
            _refuse_others(found)
            return found
    return None


def has_checkpoints(output_dir: Path) -> bool:
    """Whether there is a checkpoint that was written to its end."""
    return any(_is_whole(path) for path in _checkpoints(output_dir))


def _checkpoints(output_dir: Path) -> list[Path]:
    """By step."""
    found = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def _is_whole(path: Path) -> bool:
    try:
        return "files" in (read_record(path) or {})
    except ProConError:  # it was
        return True


def _checksum(path: Path) -> str:
    """Size and CRC-32: against what disks, copies and crashes do to a file, not against an attacker."""
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return f"{size}-{crc:08x}"


# The same run


def run_facts(
    args: TrainingArguments,
    model: nn.Module,
    dataset: Any,
    *,
    precision: str,
    together: int = 1,
    reads_data: bool,
    reference: nn.Module | None = None,
) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on from. If parameters are sharded, all ranks must call.

    Takes a pass over the weights that do not train, and one over the rows.

    Args:
        precision: that of Accelerate's autocast, ``"no"`` without.
        together: how many ranks compute a batch together.
        reads_data: whether rows may be read that are made as they are read, as those of a dataset other than
            :class:`datasets.Dataset`.
        reference: a model of its own that the loss compares with, if it is not sharded.
    """
    adapters: dict[str, Any] = getattr(model, "peft_config", None) or {}
    configurations = {"": getattr(model, "config", None), **adapters}
    trained = sorted(
        f"{name}{tuple(getattr(parameter, 'ds_shape', parameter.shape))}{parameter.dtype}"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )
    return {
        "model": _hash([trained, {name: _configuration(found) for name, found in configurations.items()}]),
        "base_model": weights_hash(model, only_frozen=True),
        "training_data": _hash(_rows(dataset, reads_data)),
        "seed": args.seed,
        "data_seed": args.data_seed,
        "samples_per_step": (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size // together
        ),
        "precision": precision,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "neftune_noise_alpha": args.neftune_noise_alpha,
        "reference_model": None if reference is None else weights_hash(reference),
    }


def _configuration(config: Any) -> dict[str, Any] | None:
    if not hasattr(config, "to_dict"):
        return None
    # The Trainer itself sets the tokens to those of the tokenizer.
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in _NO_MATTER and "token_id" not in name and name[0] != "_"
    }


def _rows(dataset: Any, reads_data: bool) -> Iterable[Any]:
    if not hasattr(dataset, "__len__"):
        return
    if hasattr(dataset, "with_format"):  # of the library datasets
        # As they lie on the disk: a transform may draw at random.
        yield from dataset.with_format(None).iter(batch_size=1000)
    elif reads_data:
        for number in range(len(dataset)):
            yield dataset[number]


def _hash(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if hasattr(value, "tolist"):
        return value.tolist()
    # Of others not their text, in which there may be an address.
    return value.value if hasattr(value, "value") else type(value).__name__
