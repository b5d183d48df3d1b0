"""A built wheel works outside the checkout, and never asks for another torch than an installed one of 2.6 or newer."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import slowmo_hf

ROOT = Path(__file__).parents[1]


def _run(*command, cwd, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    clean |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    _run(
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
        cwd=folder,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


@pytest.mark.slow
def test_pip_installs_it_from_git(tmp_path):
    """README's command, with an address on this machine: a repository of one commit, what the build needs."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__"))
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for command in (("init", "--quiet"), ("add", "."), (*who, "commit", "--quiet", "-m", "all")):
        subprocess.run(["git", *command], cwd=source, check=True)
    flags = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", "installed")
    _run("-m", "pip", "install", *flags, f"git+file://{source}", cwd=tmp_path)
    installed = {path.relative_to(tmp_path / "installed") for path in (tmp_path / "installed").rglob("*.py")}
    assert {path.relative_to(source / "src") for path in (source / "src").rglob("*.py")} <= installed


@pytest.mark.slow
def test_an_installed_wheel_works_outside_the_checkout(wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    _run(
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(installed),
        str(wheel),
        cwd=elsewhere,
    )
    program = """
import importlib.metadata, json, sys, torch, accelerate, slowmo_hf
from pathlib import Path
lean, listed = "transformers" not in sys.modules, dir(slowmo_hf)
weight = torch.nn.Parameter(torch.tensor([8.0]))
config = slowmo_hf.SlowMoConfig.lookahead(sync_every=2)
optimizer = slowmo_hf.SlowMoOptimizer(torch.optim.SGD([weight], lr=1.0), config)
for _ in range(2):
    weight.grad = torch.tensor([1.0])
    optimizer.step()
print(json.dumps({
    "file": slowmo_hf.__file__,
    "typed": (Path(slowmo_hf.__file__).parent / "py.typed").exists(),
    "version": slowmo_hf.__version__,
    "metadata": importlib.metadata.version("slowmo-hf"),
    "names": sorted(n for n in slowmo_hf.__all__ if hasattr(slowmo_hf, n)),
    "weight": weight.item(),
    "lean": lean,
    "listed": listed,
    "callback": slowmo_hf.SlowMoCallback.__name__ == "SlowMoCallback" and "transformers" in sys.modules,
}))
"""
    said = json.loads(_run("-c", program, cwd=elsewhere, PYTHONPATH=str(installed)).splitlines()[-1])
    assert Path(said["file"]) == installed / "slowmo_hf" / "__init__.py"
    assert said["typed"]
    assert said["version"] == said["metadata"] == slowmo_hf.__version__
    assert said["names"] == sorted(slowmo_hf.__all__)
    assert said["weight"] == 7.0  # 8, 7, 6, and half the way back
    assert said["lean"], "transformers comes with the callback: custom loops need no Trainer"
    assert said["callback"]
    assert set(slowmo_hf.__all__) <= set(said["listed"])
    with pytest.raises(AttributeError, match="module 'slowmo_hf' has no attribute 'SlowMoCalback'"):
        slowmo_hf.SlowMoCalback  # noqa: B018


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        f"slowmo_hf/{path.relative_to(ROOT / 'src/slowmo_hf')}" for path in (ROOT / "src/slowmo_hf").rglob("*.py")
    }
    assert {name for name in names if ".dist-info/" not in name} == sources | {"slowmo_hf/py.typed"}
    assert any(name.endswith("/LICENSE") for name in names)


def test_metadata(metadata):
    assert metadata["Name"] == "slowmo-hf"
    assert metadata["Version"] == slowmo_hf.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"recipes", "test", "docs", "dev"}


def test_an_installed_torch_is_never_replaced(metadata, wheel, tmp_path):
    """
    Torch 2.6 and everything after it satisfies the wheel, local builds and a next major version too; 2.5 does not.
    """
    plain = [r for r in map(Requirement, metadata.get_all("Requires-Dist")) if r.marker is None]
    assert {r.name for r in plain} == {"torch", "accelerate", "transformers"}
    for requirement in plain:
        assert all(specifier.operator == ">=" for specifier in requirement.specifier), (
            f"{requirement} has an upper bound"
        )
    (torch,) = (r for r in plain if r.name == "torch")
    for version in ("2.6.0", "2.6.0+cu124", "2.13.0+cpu", "3.0", "99.0"):
        assert torch.specifier.contains(version), version
    assert not torch.specifier.contains("2.5.1")
    extras = [r for r in map(Requirement, metadata.get_all("Requires-Dist")) if r.marker is not None]
    assert "torch" not in {r.name for r in extras}


def test_pip_would_install_this_package_alone(wheel, tmp_path):
    """With no index to ask, pip finds every requirement satisfied by what is here."""
    _run(
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--no-index",
        "--report",
        "report.json",
        str(wheel),
        cwd=tmp_path,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert {item["metadata"]["name"] for item in report["install"]} <= {"slowmo-hf"}
