"""
Checkpoint files: the folder `slowmo/` inside a checkpoint of Trainer or Accelerate.

    shared.json, shared.safetensors    clock, anchors, velocity: equal on all workers, written once
    worker_3.json, .safetensors, .pt   what worker 3 alone has: weights and buffers, push-sum state, inner optimizer
    manifest.json                      SHA-256 of every file, written last: a folder that has one is whole

Every file is written beside, synced and renamed. Optimizers' states are in torch's own format and read with
`weights_only`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..contents import CheckpointError, Contents

FOLDER = "slowmo"
MANIFEST = "manifest.json"
VERSION = 1


def write_part(checkpoint: str | os.PathLike[str], name: str, contents: Contents) -> None:
    """
    Write `slowmo/{name}.*` of a checkpoint, synced to the disk. A manifest that is there already is removed first.
    """
    folder = Path(checkpoint) / FOLDER
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in contents.tensors.items()}
    _write(folder / f"{name}.safetensors", lambda path: save_file(tensors, path))
    if contents.objects:
        _write(folder / f"{name}.pt", lambda path: torch.save(contents.objects, path))
    settings = {"version": VERSION, **contents.settings}
    _write(folder / f"{name}.json", lambda path: path.write_text(json.dumps(settings, indent=1)))


def _write(path: Path, write: Any) -> None:
    beside = path.with_name(path.name + ".tmp")
    write(beside)
    _sync(beside)
    beside.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_part(checkpoint: str | os.PathLike[str], name: str) -> Contents:
    """
    Read `slowmo/{name}.*` of a checkpoint, to the CPU.

    Raises:
        CheckpointError: A file is missing or cannot be read, or was written by another version.
    """
    base = Path(checkpoint) / FOLDER / name
    path = base.with_suffix(".json")
    try:
        settings = json.loads(path.read_text())
        if settings.get("version") != VERSION:
            raise CheckpointError(f"{path} has version {settings.get('version')!r}; this package reads {VERSION}.")
        path = base.with_suffix(".safetensors")
        tensors = load_file(path)
        path = base.with_suffix(".pt")
        objects = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Resume from another checkpoint.") from error
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}). Resume from another checkpoint."
        ) from error
    return Contents(settings, tensors, objects, str(base))


def seal(checkpoint: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    """Write the manifest: every file of the checkpoint is there, and its digest. Call it when all have written."""
    root = Path(checkpoint)
    files = {
        str(path.relative_to(root)): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in _files(root)
    }
    manifest = {"version": VERSION, **settings, "files": files}
    manifest["sha256"] = _own_digest(manifest)
    _write(root / FOLDER / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=1)))


def is_whole(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was finished: it has a manifest, or no file of ours at all (a stock run's)."""
    folder = Path(checkpoint) / FOLDER
    return (folder / MANIFEST).exists() or not folder.exists()


def run_of(checkpoint: str | os.PathLike[str]) -> str | None:
    """The run that a checkpoint's manifest names; None where it cannot be read."""
    try:
        return str(json.loads((Path(checkpoint) / FOLDER / MANIFEST).read_text())["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verify_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """
    Compare every file that a checkpoint's manifest lists with its digest.

    Args:
        checkpoint (`str` or `os.PathLike`): A folder of Trainer (`checkpoint-500`) or of `accelerator.save_state`.

    Raises:
        CheckpointError: There is no manifest, or a file is missing, truncated or changed; the file and the reason are
            named.
    """
    root = Path(checkpoint)
    manifest = root / FOLDER / MANIFEST
    try:
        listed = json.loads(manifest.read_text())
        if listed.pop("sha256") != _own_digest(listed):
            raise ValueError("its own SHA-256 differs")
        files: Iterable[tuple[str, dict[str, Any]]] = sorted(listed["files"].items())
        expected = [(root / name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in files]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{manifest} is missing: the checkpoint was never finished, or is none of ours."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{manifest} is damaged ({type(error).__name__}: {error}). Resume from another checkpoint."
        ) from error
    if not expected:
        raise CheckpointError(f"{manifest} is damaged: it lists no file. Resume from another checkpoint.")
    for path, size, digest in expected:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though the manifest lists it. Resume from another checkpoint.")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {size}. Resume from another checkpoint."
            )
        if _digest(path) != digest:
            raise CheckpointError(
                f"{path} is not what was written: its SHA-256 differs from the manifest's. Resume from another "
                "checkpoint."
            )


def _files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST and p.suffix != ".tmp")


def _own_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
