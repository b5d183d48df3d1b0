"""Where sentence pairs come from: the Hub, or a folder of files or a saved DatasetDict, and its faults."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

import loading
from records import DataError

SHIPPED = Path(__file__).parents[1] / "data" / "en_de_help"
WMT = ("wmt/wmt14", "wmt/wmt16")
LOCAL_FOLDER = (
    "a folder that holds a saved DatasetDict, or train*, validation* and test* as .parquet or .jsonl, or text files "
    "such as train.en and train.de"
)


@dataclass(frozen=True)
class Languages:
    """Where a row holds its sentences."""

    source: str
    target: str
    column: str


def load_splits(dataset_name: str | None, config: str | None, languages: Languages) -> Mapping[str, Any]:
    """Splits, or functions that load them, by name."""
    folder = SHIPPED if dataset_name is None else Path(dataset_name)
    if folder.is_dir():
        return _load_folder(folder, languages)
    if folder.exists() or folder.is_absolute() or str(dataset_name).startswith("."):
        raise DataError(
            f"dataset_name must be a name on the Hub or {LOCAL_FOLDER}, got {dataset_name!r}, which is no folder. "
            "Set --dataset_name."
        )
    if config is None and dataset_name in WMT:
        config = "-".join([language for language in (languages.source, languages.target) if language != "en"] + ["en"])
    return from_hub(str(dataset_name), config, "dataset_name")


def _load_folder(folder: Path, languages: Languages) -> Mapping[str, Any]:
    if (folder / "dataset_dict.json").is_file():
        return loading.from_folder(folder, lambda: datasets.load_from_disk(str(folder)))
    for end, builder in ((".parquet", "parquet"), (".jsonl", "json")):
        files: dict[str, list[str]] = {}
        for path in sorted(folder.glob(f"*{end}")):
            files.setdefault(re.match("[^.-]*", path.name).group(), []).append(str(path))
        if files:
            return {split: _later(folder, builder, paths) for split, paths in files.items()}
    ends = (languages.source, languages.target)
    names = sorted({path.name.removesuffix(f".{end}") for end in ends for path in folder.glob(f"*.{end}")})
    if names:
        return {
            name: lambda flag, name=name: _read_text([folder / f"{name}.{end}" for end in ends], ends, flag)
            for name in names
        }
    raise DataError(
        f"dataset_name must be {LOCAL_FOLDER}, got {str(folder)!r}, which holds none of these for {ends[0]} and "
        f"{ends[1]}. Set --dataset_name, or --source_lang and --target_lang."
    )


def _later(folder: Path, builder: str, paths: list[str]) -> Callable[[str], datasets.Dataset]:
    """Splits are read apart: they may differ in columns that nobody wants. The function takes the split's flag."""

    def load(flag: str) -> datasets.Dataset:
        loading.check_one_split(folder, [Path(path).name for path in paths], flag)
        _refuse_empty([Path(path) for path in paths], flag)
        return loading.from_folder(
            folder,
            lambda: datasets.load_dataset(builder, data_files={"train": paths}, split="train"),
            f" ({', '.join(Path(path).name for path in paths[:3])})",
        )

    return load


def _refuse_empty(paths: list[Path], flag: str) -> None:
    """datasets has other words for each kind of file, and names none."""
    for path in paths:
        if not path.stat().st_size:
            raise DataError(
                f"{flag} must hold sentence pairs, got {str(path)!r}, which is empty. Fill it, or set --{flag} or "
                "--dataset_name."
            )


def _read_text(paths: list[Path], languages: tuple[str, str], flag: str) -> datasets.Dataset:
    """Two text files, read line by line into columns named after the languages."""
    for path, other in (paths, paths[::-1]):
        if not path.is_file():
            raise DataError(
                f"{flag} must have a file for each language, got {str(other)!r} without {path.name!r}. Add it, or set "
                f"--{flag}, --source_lang or --target_lang."
            )
    _refuse_empty(paths, flag)
    # A file that changed is not taken from the cache.
    stamps = tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    # Datasets would divide lists into shards.
    settings = {
        "paths": tuple(map(str, paths)),
        "languages": languages,
        "stamps": stamps,
    }
    features = datasets.Features({language: datasets.Value("string") for language in languages})
    try:
        rows = datasets.Dataset.from_generator(_lines, gen_kwargs=settings, features=features)
    except Exception as error:  # datasets' own, around what `_lines` said
        wrong = _wrong_text(paths) or f"cannot be read: {error.__cause__ or error}"
        raise DataError(f"{flag} {wrong}. Mend it, or set --{flag} or --dataset_name.") from error
    if len(rows) == 1 and any("\r" in sentence for sentence in rows[0].values()):
        raise DataError(
            f"{flag} must end lines with line feeds, got one line with carriage returns in {str(paths[0])!r} or "
            f"{str(paths[1])!r}. Mend it, or set --{flag} or --dataset_name."
        )
    return rows


def _lines(paths: tuple[str, str], languages: tuple[str, str], stamps: tuple[Any, ...]) -> Iterator[dict[str, str]]:
    """Only `\\n` ends a line: other marks occur inside sentences, in one language and not in the other."""
    with (  # a byte-order mark at a file's start is none of its first sentence
        open(paths[0], encoding="utf-8-sig", newline="\n") as source,
        open(paths[1], encoding="utf-8-sig", newline="\n") as target,
    ):
        for pair in zip(source, target, strict=True):
            yield {language: line.rstrip("\r\n") for language, line in zip(languages, pair, strict=True)}


def _wrong_text(paths: list[Path]) -> str:
    """Why two files are no pairs of lines; empty where that is not the reason."""
    lines = dict.fromkeys(paths, 0)
    for path in paths:
        with open(path, "rb") as file:
            for line in file:
                lines[path] += 1
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    return f"must be text in UTF-8, got {str(path)!r} with line {lines[path]:,} that is not ({error})"
    told = " and ".join(f"{count:,} in {str(path)!r}" for path, count in lines.items())
    return f"must have as many lines in each language, got {told}" if len(set(lines.values())) > 1 else ""


def from_hub(name: str, config: str | None, flag: str, **settings: Any) -> Any:
    """A set of the Hub, or `DataError` with a way out."""
    offline = f"Set --{flag} to a split of your own data, such as {flag.removesuffix('_set')}."
    if flag == "dataset_name":
        offline = f"Leave --dataset_name and --preset out for the shipped help text, or set it to {LOCAL_FOLDER}."
    otherwise = f"Set --{flag}, or --dataset_config (such as de-en)."
    return loading.from_hub(name, config, flag, offline=offline, otherwise=otherwise, **settings)
