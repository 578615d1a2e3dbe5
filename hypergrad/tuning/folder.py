"""Folders of checkpoints, numbered by training step, of which the newest few are kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hypergrad.errors import ArgumentError, CheckpointError, CheckpointWarning, DamagedFileError, warn
from hypergrad.tuning.recipe import check_count

T = TypeVar("T")


def check_saving(where: str, path: str | Path | None, every: int | None, keep: int | None, step: int) -> None:
    """Check the arguments of a run that saves on its way, and that begins at a step.

    Raises:
        ArgumentError: if they do not fit.
        CheckpointError: if the folder has checkpoints of later steps.
    """
    for name, count in (("save_every", every), ("keep", keep)):
        if count is not None:
            check_count(name, count)
            if path is None:
                raise ArgumentError(f"{where}: {name} needs save_to, the file or folder to write to")
    if path is not None and keep is not None:
        _refuse_later(Path(path), step)


def _refuse_later(folder: Path, step: int) -> None:
    """Refuse a folder that has checkpoints of later steps, which belong to another run.

    `load_latest` would read them, and to remove them would lose that run.
    """
    if folder.exists() and (later := [k for k in numbered(folder) if k > step]):
        raise CheckpointError(
            f"{folder} has checkpoints up to step {later[-1]}, and this run is at step {step}: go on from "
            "them with load_latest, take another folder, or remove them"
        )


def save(path: str | Path, keep: int | None, step: int, write: Callable[[Path], None]) -> None:
    """Call ``write`` with the path of a file, with ``keep`` that of a file for this step in a folder.

    The folder is made if it does not exist. After the write the oldest files are removed, so that ``keep`` of
    them are left.

    Raises:
        CheckpointError: if the folder has checkpoints of later steps.
    """
    if keep is None:
        write(Path(path))
        return
    check_count("keep", keep)
    folder = Path(path)
    _refuse_later(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"step-{step:09d}.npz")
    for file in list(numbered(folder).values())[:-keep]:
        file.unlink(missing_ok=True)


def numbered(folder: str | Path) -> dict[int, Path]:
    """Return the checkpoints of a folder by their steps, the oldest first."""
    matches = ((re.fullmatch(r"step-(\d{9,})\.npz", file.name), file) for file in Path(folder).iterdir())
    return dict(sorted((int(match[1]), file) for match, file in matches if match))


def load_latest(folder: str | Path, read: Callable[[Path], T]) -> T:
    """Read the newest checkpoint of a folder that is not damaged.

    Raises:
        CheckpointError: if it belongs to another run, or if all files are damaged.
        FileNotFoundError: if the folder does not exist or has no checkpoints.

    Warns:
        CheckpointWarning: for each damaged file that is newer.
    """
    for file in reversed(numbered(folder).values()):
        try:
            return read(file)
        except DamagedFileError as error:
            warn(f"{error}; reading the one before it", CheckpointWarning, str(file))
            damaged = error
    if numbered(folder):
        raise CheckpointError(f"every checkpoint in {folder} is damaged") from damaged
    raise FileNotFoundError(f"there are no checkpoints in {folder}")
