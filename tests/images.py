"""Folders of images that tests of the image recipe share."""

from pathlib import Path

from PIL import Image


def write_images(folder: Path, files: dict[str, int | list[str]], size: int = 32) -> str:
    """
    Pictures per folder, as many as said (in colour) or one of each mode said; greenish in colour, of medium brightness
    in grey.
    """
    for place, modes in files.items():
        (folder / place).mkdir(parents=True)
        for index, mode in enumerate(["RGB"] * modes if isinstance(modes, int) else modes):
            Image.new("RGB", (size, size), (40, 180, 90)).convert(mode).save(folder / place / f"{index}.JPEG", "JPEG")
    return str(folder)
