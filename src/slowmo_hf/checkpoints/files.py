"""
Checkpoint files: the folder `slowmo/` inside a checkpoint of Trainer or Accelerate.

    shared.json, shared.safetensors    clock, anchors, velocity: equal on all workers, written once
    worker_3.json, .safetensors, .pt   what worker 3 alone has: weights and buffers, push-sum state, inner optimizer
    generators_3.*                     a worker's random generators, where all are in one process
    manifest.json                      SHA-256 of every file, written last (`manifest`)

Every file is written beside, synced and renamed. Optimizers' states are torch's own, and read with `weights_only`.
Nothing outside the checkpoint is read, whatever a name or a link in it says.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..contents import CheckpointError, Contents

FOLDER = "slowmo"
MANIFEST = "manifest.json"
LOCK = ".slowmo-saving"  # `claim`: there while it is being written
FORMAT = 1  # "version" in the files


def write_part(checkpoint: str | os.PathLike[str], name: str, contents: Contents) -> None:
    """Write `slowmo/{name}.*` of a checkpoint, synced to the disk; a manifest that is there is removed first."""
    folder = Path(checkpoint) / FOLDER
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in contents.tensors.items()}
    write_file(folder / f"{name}.safetensors", lambda path: save_file(tensors, path))
    if contents.objects:
        write_file(folder / f"{name}.pt", lambda path: torch.save(contents.objects, path))
    settings = {"version": FORMAT, **contents.settings}
    write_file(folder / f"{name}.json", lambda path: path.write_text(json.dumps(settings, indent=1)))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Beside, synced and renamed; with the rights that the process gives its files, whoever writes it."""
    beside = path.with_name(path.name + ".tmp")
    beside.unlink(missing_ok=True)
    beside.touch()
    rights = stat.S_IMODE(beside.stat().st_mode)
    write(beside)
    with suppress(OSError):  # a file system without rights
        beside.chmod(rights)  # safetensors lets the owner alone read
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """To the disk: a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS) or not path.is_dir():
            raise  # folders alone: a file system that has no sync of them writes them through
    finally:
        os.close(descriptor)


def read_part(checkpoint: str | os.PathLike[str], name: str, *, settings_alone: bool = False) -> Contents:
    """
    Read `slowmo/{name}.*` of a checkpoint. Tensors are the files' own, mapped: processes of a machine share them, and
    who keeps one copies it.

    Args:
        settings_alone (`bool`, *optional*, defaults to `False`): The JSON file alone is read.

    Raises:
        CheckpointError: A file is missing or cannot be read, or is of another format.
    """
    root = Path(checkpoint)
    base = root / FOLDER / name
    path = base.with_suffix(".json")
    try:
        settings = json.loads(inside(root, path).read_text())
        refuse_format(path, settings.get("version"))
        if settings_alone:
            return Contents(settings, source=str(base))
        path = base.with_suffix(".safetensors")
        tensors = load_file(inside(root, path))
        path = base.with_suffix(".pt")
        objects = torch.load(inside(root, path), "cpu", weights_only=True, mmap=True) if path.exists() else {}
        if not isinstance(objects, dict):
            raise ValueError(f"it holds {type(objects).__name__}, not a dictionary")
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        if path.exists():  # so says safetensors of one that it may not read
            raise unreadable(path, error) from error
        raise CheckpointError(f"{path} is missing. Resume from another checkpoint.") from error
    except PermissionError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # torch.load raises whatever the bytes of a forged file ask for
        raise damaged(path, error) from error
    return Contents(settings, tensors, objects, str(base))


def refuse_format(path: Path, found: object, release: object = None) -> None:
    """
    Refuse a file of a format that is not read here.

    Args:
        release (`str`, *optional*): The slowmo_hf that has written it, where the file names it.

    Raises:
        CheckpointError: It is of another format.
        ValueError: It names none.
    """
    if type(found) is not int or found < 1:
        raise ValueError(f"version {found!r}")
    if found != FORMAT:
        raise CheckpointError(
            f"{path} is of format {found}, and this slowmo_hf reads format {FORMAT}: another release has written it"
            f"{f' ({release})' if release else ''}. Install that one on every machine, or resume from another "
            "checkpoint."
        )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What to raise of a file that is there."""
    return CheckpointError(
        f"{path} cannot be read ({error}). Give this user the right to read it (chmod -R u+rX, chown), or resume from "
        "another checkpoint."
    )


def damaged(path: Path, error: Exception) -> CheckpointError:
    """What to raise of a file with another content than was written."""
    if unknown := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
        return CheckpointError(
            f"{path} holds an object of {unknown[1]}, which is not read by default: reading it may run code. If you "
            "trust the checkpoint, call torch.serialization.add_safe_globals([...]) with that class, and resume again."
        )
    return CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}). Resume from another checkpoint.")


def inside(root: Path, path: Path) -> Path:
    """
    The path of a file; `CheckpointError` where it leads out of the checkpoint, by `..`, as an absolute one or by a
    link, or where something else is there.
    """
    if not is_inside(root, path):
        raise CheckpointError(
            f"{path} leads out of {root}, and nothing outside a checkpoint is read. Copy the checkpoint with its "
            "links followed (cp -rL), or resume from another one."
        )
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path} is missing: what is there is no file. Resume from another checkpoint.")
    return path


def is_inside(root: Path, path: Path) -> bool:
    """Whether a path leads to a place in the folder, links followed."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links; a NUL in a name
        return False
