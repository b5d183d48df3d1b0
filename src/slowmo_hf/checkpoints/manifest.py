"""
The manifest: SHA-256 of every file of a checkpoint, written last, so that a folder that has one is whole. It,
`shared.json` and Trainer's `trainer_state.json` name the save that they are of.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..contents import CheckpointError
from .files import (
    FOLDER,
    FORMAT,
    LOCK,
    MANIFEST,
    damaged,
    inside,
    is_inside,
    refuse_format,
    sync,
    unreadable,
    write_file,
)

TRAINER_STATE = "trainer_state.json"  # Trainer's last file

Digests = dict[str, dict[str, Any]]  # of files, by name: size and SHA-256
Stamps = dict[str, tuple[int, ...]]  # of files, by name: what changes with their content
_TAIL = 4096  # bytes


def stamps(folder: str | os.PathLike[str]) -> Stamps:
    """Of all that lies in a folder before it becomes a checkpoint, or becomes another one."""
    found = Stamps()
    for path in _files(Path(folder)):
        with suppress(FileNotFoundError):
            found[str(path.relative_to(folder))] = _stamp(path)
    return found


def _stamp(path: Path) -> tuple[int, ...]:
    told = path.stat()
    return (told.st_ino, told.st_size, told.st_mtime_ns, _tail(path, told.st_size))


def _tail(path: Path, end: int) -> int:
    """Of the last bytes before `end`; 0 of a file that this process may not read."""
    with suppress(PermissionError), path.open("rb") as file:
        file.seek(max(0, end - _TAIL))
        return zlib.crc32(file.read(min(end, _TAIL)))
    return 0


def _is_as_before(path: Path, before: tuple[int, ...] | None) -> bool:
    """Unchanged, or only longer: a log that goes on."""
    if before is None:
        return False
    now, (node, size, _, tail) = _stamp(path), before
    return now == before or (now[0] == node and now[1] > size > 0 and _tail(path, size) == tail)


def file_digests(
    checkpoint: str | os.PathLike[str], turn: int = 0, turns: int = 1, before: Stamps | None = None
) -> Digests:
    """
    Of a checkpoint's files: of all, or of those of one process of several, which deal them out. None where no part of
    it is ours: there will be no manifest.

    Args:
        before (`dict`, *optional*): What lay there before the save began, and is no part of it as long as it is as it
            was, or has only grown: logs, or other checkpoints, in the folder that the user has chosen.
    """
    root, found = Path(checkpoint), Digests()
    if not (root / FOLDER).is_dir():
        return found
    with suppress(FileNotFoundError):  # another program takes the folder away: who keeps it sees that
        sizes = {name: path.stat().st_size for name, path in _written(root, before).items()}
        for name in _dealt_out(sizes, turn, turns):
            found[name] = _entry(root / name)
    return found


def _dealt_out(sizes: dict[str, int], turn: int, turns: int) -> list[str]:
    """Names of files for one of several processes, dealt out from the largest on."""
    return sorted(sizes, key=lambda name: (sizes[name], name), reverse=True)[turn::turns]


def _entry(path: Path) -> dict[str, Any]:
    sync(path)  # what a manifest lists is on the disk
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def seal_again(checkpoint: str | os.PathLike[str], stamped: Stamps) -> None:
    """
    Write the manifest once more, with what the program has made of files beside ours since they were stamped behind
    the seal: changed ones as they are now, without those that it has deleted.
    """
    root, now = Path(checkpoint), stamps(checkpoint)
    changed = [name for name in stamped if now.get(name) != stamped[name] and not name.startswith(f"{FOLDER}/")]
    if not changed or not (root / FOLDER / MANIFEST).is_file():
        return
    manifest = _read_manifest(root)
    for name in changed:
        if manifest["files"].pop(name, None) and name in now:
            manifest["files"][name] = _entry(root / name)
    _write_manifest(root, manifest)


def seal(
    checkpoint: str | os.PathLike[str],
    settings: dict[str, Any],
    known: Digests | None = None,
    before: Stamps | None = None,
) -> None:
    """
    Write the manifest: every file of the checkpoint is there, and its digest. Call it when all have written.

    Args:
        known (`dict`, *optional*): What `file_digests` has found; the others are read here.
        before (`dict`, *optional*): See there.
    """
    root, found = Path(checkpoint), known or {}
    files = {name: found.get(name) or _entry(path) for name, path in _written(root, before).items()}
    release = sys.modules["slowmo_hf"].__version__
    _write_manifest(root, {"version": FORMAT, "slowmo_hf": release, **settings, "files": files})


def _write_manifest(root: Path, manifest: dict[str, Any]) -> None:
    signed = {**manifest, "sha256": _own_digest(manifest)}
    for folder in {root.parent, root, *((root / name).parent for name in manifest["files"])}:
        if os.access(folder, os.R_OK):  # the first is the user's own
            sync(folder)
    write_file(root / FOLDER / MANIFEST, lambda path: path.write_text(json.dumps(signed, indent=1)))


def is_whole(checkpoint: str | os.PathLike[str]) -> bool:
    """
    Whether a checkpoint was finished: it has a manifest; or no file of ours at all, and what Trainer writes last (a
    stock run's).
    """
    root = Path(checkpoint)
    if (root / FOLDER).exists():
        return (root / FOLDER / MANIFEST).exists()
    try:
        return (root / TRAINER_STATE).is_file() and isinstance(json.loads((root / TRAINER_STATE).read_text()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def unseal(checkpoint: Path) -> None:
    """Before it is deleted: half deleted it is not whole."""
    for name in (f"{FOLDER}/{MANIFEST}", TRAINER_STATE):
        (checkpoint / name).unlink(missing_ok=True)


def recorded_saves(callbacks: Any, step: int | None = None) -> list[dict[str, Any]]:
    """
    What `trainer_state.json` says of our saves.

    Args:
        callbacks: Its `stateful_callbacks`: by name of the class, which may have been another one.
        step (`int`, *optional*): Those of this step alone: a stock run that went on from our checkpoint writes its
            record into later ones of its own.
    """
    found = []
    for states in callbacks.values() if isinstance(callbacks, dict) else ():
        for state in states if isinstance(states, list) else [states]:
            match state:
                case {"attributes": {"checkpoint": {"run": str(), "save": str()} as record}}:
                    found.append(record)
                case {"attributes": {"checkpoint": {"run": str(), "folder": str()} as record}}:  # before saves had one
                    found.append(record)
    return [one for one in found if step is None or one.get("save", f"-{step}").endswith(f"-{step}")]


def refuse_another_save(checkpoint: str | os.PathLike[str], callbacks: Any) -> None:
    """
    Compare a manifest with what `trainer_state.json` says.

    Args:
        callbacks: As for `recorded_saves`.

    Raises:
        CheckpointError: They are of different saves, or nothing is said.
    """
    manifest, records = _read_manifest(Path(checkpoint)), recorded_saves(callbacks)
    name = "save" if "save" in manifest else "run"
    told = [record.get(name) for record in records]
    if manifest.get(name) not in told:
        raise CheckpointError(
            f"{Path(checkpoint) / TRAINER_STATE} is of {name} {told[-1] if told else None!r}, {FOLDER}/{MANIFEST} of "
            f"{manifest.get(name)!r}: they are of different saves. Resume from another checkpoint."
        )


def verify_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """
    Compare every file that a checkpoint's manifest lists with its digest, and which save its files are of.

    Args:
        checkpoint (`str` or `os.PathLike`): A folder of Trainer (`checkpoint-500`) or of `accelerator.save_state`.

    Raises:
        CheckpointError: There is no manifest; a file is missing, truncated or changed, of another save or outside the
            folder; or one lies in `slowmo/` that was not saved. The file and the reason are named.
    """
    verify_in_turns(checkpoint)


def verify_in_turns(checkpoint: str | os.PathLike[str], turn: int = 0, turns: int = 1) -> None:
    """`verify_checkpoint` by several processes, each of which reads some of the files."""
    try:
        _verify(Path(checkpoint), turn, turns)
    except PermissionError as error:  # of a folder
        raise unreadable(Path(checkpoint), error) from error


def _verify(root: Path, turn: int, turns: int) -> None:
    manifest = _read_manifest(root)
    files: Digests = manifest["files"]
    dealt_out = _dealt_out({name: entry["bytes"] for name, entry in files.items()}, turn, turns)
    for name, entry in sorted(files.items()):
        path = inside(root, root / name)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though the manifest lists it. Resume from another checkpoint.")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}. Resume from another "
                "checkpoint."
            )
        if name in dealt_out and _read_digest(path) != entry["sha256"]:
            raise CheckpointError(
                f"{path} is not what was written: its SHA-256 differs from the manifest's. Resume from another "
                "checkpoint."
            )
    for path in sorted((root / FOLDER).rglob("*")):
        is_part = path.suffix in (".json", ".safetensors", ".pt") and path.name != MANIFEST
        if is_part and str(path.relative_to(root)) not in files:
            raise CheckpointError(f"{path} is not in the manifest. Delete it, or resume from another checkpoint.")
    for shared in sorted((root / FOLDER).glob("shared*.json")):
        part = _read_json(shared)
        for name, told in (("run", "run"), ("step", "attempted_steps"), ("save", "save")):
            if part.get(told) != manifest.get(name):
                raise CheckpointError(
                    f"{shared} is of {name} {part.get(told)!r}, {MANIFEST} of {manifest.get(name)!r}: they are of "
                    "different saves. Resume from another checkpoint."
                )
    if TRAINER_STATE in files:
        refuse_another_save(root, _read_json(root / TRAINER_STATE).get("stateful_callbacks"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
        if not isinstance(read, dict):
            raise ValueError(f"it holds {type(read).__name__}, not an object")
    except PermissionError as error:
        raise unreadable(path, error) from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    return read


def _read_manifest(root: Path) -> dict[str, Any]:
    """The manifest, of which every value has been checked."""
    path = root / FOLDER / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{path} is missing: the checkpoint was never finished, or is none of ours.")
    manifest = _read_json(inside(root, path))
    try:
        if manifest.pop("sha256") != _own_digest(manifest):
            raise ValueError("its own SHA-256 differs")
        refuse_format(path, manifest.get("version"), manifest.get("slowmo_hf"))
        match manifest:
            case {"run": str(), "step": int() as step, "files": dict() as files} if files and step is not True:
                pass
            case _:
                raise ValueError("run, step or files is missing or of another type, or it lists no file")
        if not isinstance(manifest.get("save", ""), str):
            raise ValueError(f"save {manifest['save']!r} is no string")
        for name, entry in files.items():
            if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
                raise ValueError(f"the entry of {name!r} has no size and digest")
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, error) from error
    return manifest


def _files(root: Path) -> list[Path]:
    """Those that a checkpoint may be made of; links that lead out of it are the user's, and no part of it."""
    found = (p for p in root.rglob("*") if p.is_file() and p.name not in (MANIFEST, LOCK) and p.suffix != ".tmp")
    return sorted(path for path in found if is_inside(root, path))


def _written(root: Path, before: Stamps | None) -> dict[str, Path]:
    """By name, what is new or another than it was before."""
    paths = {str(path.relative_to(root)): path for path in _files(root)}
    return {name: path for name, path in paths.items() if not before or not _is_as_before(path, before.get(name))}


def _own_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_digest(path: Path) -> str:
    try:
        return _digest(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
