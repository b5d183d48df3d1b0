"""
Imports run downwards only. The sources are read, not run: an import inside a function, under TYPE_CHECKING, by
`importlib` with a name written out, or an attribute of an imported package (`torch.distributed.barrier`) counts like
one at the top.
"""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import slowmo_hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "slowmo_hf"
PROGRAMS = sorted(path for folder in ("recipes", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

# From the top down: wings, which are folders, and in each the modules. A module imports from lower rows only, so two
# of one row never know each other.
WINGS = {
    "": [["__init__"]],  # the public names
    "adapters": [
        ["accelerate_checkpoints"],
        ["callback", "functions"],
        ["optimizer", "trainer_logs", "trainer_saves", "trainer_views"],
        ["model_calls", "trainer_end", "trainer_gathers"],
        [
            *("accelerate_objects", "exit_notice", "first_pass", "given", "isolation", "optimizer_wrapper"),
            *("other_optimizers", "stop_signals", "trainer_start"),
        ],
        ["held_apart", "trainer_checkpoints"],
        ["refusals", "trainer_methods"],
        ["fully_sharded"],
        ["alive"],
    ],
    "checkpoints": [["last_lines", "state"], ["together"], ["claim", "manifest", "places"], ["files"]],
    "training": [
        ["outer_loop"],
        ["ending", "gradients", "slow_state_dict", "start_table"],
        ["consensus"],
        ["in_flight"],
        ["plan", "round"],
        ["parts", "start_check", "start_values"],
        ["local_state", "slow_state", "status"],
        ["consensus_view", "costs", "inner_state", "own_collectives", "written"],
        ["account", "model_tensors"],
        ["other_tensors"],
        ["clock", "digests", "modes", "optimizers_inside", "program", "report"],
    ],
    "wire": [
        ["error_feedback", "gossip", "inside", "sharding"],
        ["two_stage"],
        ["reduction"],
        ["averages", "exchange", "workers"],
        ["communicator", "roll_call"],
        ["processes", "register"],
        ["failures", "job", "job_store"],
        ["in_process"],
    ],
    "algorithm": [
        ["outer_update"],
        ["codec", "digest", "slow_momentum", "starts"],
        ["layout", "norms", "topology"],
    ],
    "ground": [
        ["config"],
        ["presets"],
        ["rules", "values"],
        ["contents", "hints"],
        ["finite"],
        ["dtensors", "log", "names", "random_state", "upstream"],
        ["frames"],
    ],
}
LAYERS = [
    [name if wing in ("", "ground") else f"{wing}.{name}" for name in row]
    for wing, rows in WINGS.items()
    for row in rows
]
LEVEL = {name: level for level, row in enumerate(reversed(LAYERS)) for name in row}

# Who alone may reach a package of others.
ONLY = {
    # What carries messages; its types of errors; the groups that keep DDP and FSDP2 inside a worker, and `Join`, which
    # is refused; DTensors; the job's store, which has no public name.
    "torch.distributed": (
        "wire.failures",
        "adapters.isolation",
        "adapters.fully_sharded",
        "adapters.refusals",
        "wire.job",
        "dtensors",
        "upstream",
    ),
    "slowmo_hf.wire.job.wire": ("wire.communicator", "wire.processes"),  # what talks to other processes
    # Custom loops need no Trainer.
    "transformers": (
        "adapters.callback",
        "adapters.trainer_checkpoints",
        "adapters.trainer_end",
        "adapters.trainer_gathers",
        "adapters.trainer_saves",
        "adapters.trainer_start",
        "adapters.trainer_views",
    ),
}

TALKERS = ", ".join(ONLY["torch.distributed"])
ADAPTERS_OF_TRAINER = ", ".join(ONLY["transformers"])

# Attributes of public objects that are not public themselves, and the programs that reach for one, with their reasons.
INTERNAL_ATTRIBUTES = ("outer_loop", "isolation")
INTERNALS = {
    (
        "benchmarks/columns.py",
        "outer_loop",
    ): "counts what each process of a worker sends and holds, where a report is of the whole worker",
    (
        "benchmarks/round_parts.py",
        "outer_loop",
    ): "times the outer optimizer's arithmetic apart from the round around it",
    (
        "benchmarks/kill_switch.py",
        "slowmo_hf.wire.communicator.Communicator",
    ): "kills a process in the middle of a message",
    (
        "benchmarks/kill_switch.py",
        "slowmo_hf.dtensors.local",
    ): "notes a process's own shards at every step",
}


def names_reached(source: str, module: str = "") -> set[tuple[int, str]]:
    """
    (line, absolute dotted name) of all that a source imports, or reaches through what it has imported. Relative names
    are those of a module of the package.
    """
    package = ["slowmo_hf", *module.split(".")[:-1]]
    found: set[tuple[int, str]] = set()
    bound: dict[str, str] = {}  # name in the source: what it stands for
    chains: list[tuple[int, list[str]]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add((node.lineno, alias.name))
                first = alias.name.split(".")[0]
                bound[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{origin}.{alias.name}"
                found.add((node.lineno, f"{origin}.{alias.name}"))
        elif isinstance(node, ast.Call) and (name := _imported_by_call(node, ".".join(package))):
            found.add((node.lineno, name))
        elif isinstance(node, ast.Attribute):
            chains.append((node.lineno, _chain(node)))
    found |= {(line, ".".join([bound[root], *rest])) for line, (root, *rest) in chains if root in bound}
    return found


def _imported_by_call(call: ast.Call, package: str) -> str:
    """
    The name that `importlib.import_module("a.b")` imports; empty for other calls and for names that are computed.
    """
    if (
        _chain(call.func)[-1] not in ("import_module", "__import__")
        or not call.args
        or not isinstance(call.args[0], ast.Constant)
    ):
        return ""
    name = str(call.args[0].value)
    return f"{package}{name}" if name.startswith(".") else name


def _chain(node: ast.AST) -> list[str]:
    """["a", "b", "c"] of `a.b.c`; [""] of anything that is no plain chain of names."""
    rest: list[str] = []
    while isinstance(node, ast.Attribute):
        rest.insert(0, node.attr)
        node = node.value
    return [node.id, *rest] if isinstance(node, ast.Name) else [""]


def _own_module(dotted: str) -> str | None:
    """The module of the package that a dotted name leads to; None for other packages, and for a wing's folder."""
    root, *rest = dotted.split(".")
    if root != "slowmo_hf":
        return None
    if not rest or (rest[0] in slowmo_hf.__all__ or rest[0].startswith("__")):
        return "__init__"
    return rest[0] if rest[0] not in WINGS else ".".join(rest[:2]) if rest[1:] else None


def _is_within(dotted: str, package: str) -> bool:
    return f"{dotted}.".startswith(f"{package}.")


def broken_rules(module: str, source: str) -> list[str]:
    """What a module of the package does that LAYERS and ONLY forbid, a line each."""
    if module not in LEVEL:
        return [
            f"{module}.py is not in the table: add it to LAYERS in tests/test_layering.py, above all that it imports."
        ]
    words = []
    for line, dotted in sorted(names_reached(source, module)):
        where, other = f"{module}.py, line {line}: {dotted}", _own_module(dotted)
        if other is not None and other not in LEVEL:
            words.append(f"{where}: {other} is not in the table: add it to LAYERS in tests/test_layering.py.")
        elif other is not None and LEVEL[other] >= LEVEL[module]:
            words.append(f"{where}: imports run downwards only, and {other} is no lower than {module} in LAYERS.")
        for package, allowed in ONLY.items():
            if _is_within(dotted, package) and module not in allowed:
                words.append(f"{where}: only {', '.join(allowed)} may reach {package}.")
    return words


def internals_used(source: str) -> dict[str, int]:
    """{what a program uses of the package that is not public: the line}."""
    used = {}
    for line, dotted in names_reached(source):
        root, *rest = dotted.split(".")
        if root == "slowmo_hf" and rest and rest[0] not in (*slowmo_hf.__all__, "__version__"):
            used[dotted] = line
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in INTERNAL_ATTRIBUTES:
            used.setdefault(node.attr, node.lineno)
    return used


def _modules() -> dict[str, Path]:
    """By dotted name below the package; a wing's `__init__.py` says what it is, and imports nothing."""
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: path for name, path in found.items() if not name.endswith(".__init__")}


def test_imports_run_downwards_only(subtests):
    for module, path in _modules().items():
        with subtests.test(module):
            words = broken_rules(module, path.read_text())
            assert not words, "\n" + "\n".join(words)


def test_rooms_are_small(subtests):
    """No file above 400 lines, no class above 250, recipes and benchmarks too; the heart under 200."""
    assert len(_modules()["training.outer_loop"].read_text().splitlines()) < 200
    for path in (*_modules().values(), *PROGRAMS):
        source = path.read_text()
        with subtests.test(str(path.relative_to(ROOT))):
            assert len(source.splitlines()) <= 400
            classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
            long = [c.name for c in classes if c.end_lineno - c.lineno + 1 > 250]
            assert not long, f"{', '.join(long)}: above 250 lines"


def test_files_of_tests_are_small(subtests):
    """None above 500 lines."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        with subtests.test(path.name):
            assert len(path.read_text().splitlines()) <= 500


def test_every_wing_is_in_the_docs():
    """And every room of it, by name."""
    words = (ROOT / "docs" / "internals.md").read_text()
    for wing, rows in WINGS.items():
        for name in [name for row in rows for name in row if wing]:
            assert f"`{name}`" in words or (name.startswith("trainer_") and "`trainer_*`" in words), name


def private_names_of_others(source: str, own: set[str]) -> list[tuple[int, str]]:
    """(line, name) of underscored attributes that are defined nowhere in the package: another package's."""
    found = [(n.lineno, n.attr) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)]
    return sorted((line, name) for line, name in found if re.match(r"_[a-z]", name) and name not in own)


def _defined(source: str) -> set[str]:
    """Underscored names that a source gives a meaning: functions, classes, fields, what is assigned."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


# Of torch.optim.Optimizer, on `self`: upstream.py says why they are no functions there.
INHERITED = {
    f"_optimizer_{name}_{when}_hooks" for name in ("state_dict", "load_state_dict", "step") for when in ("pre", "post")
}


def test_private_names_of_other_packages_are_in_one_room(subtests):
    sources = {module: path.read_text() for module, path in _modules().items()}
    own = INHERITED.union(*(_defined(source) for source in sources.values()))
    for module, source in sources.items():
        with subtests.test(module):
            assert module == "upstream" or private_names_of_others(source, own) == []
    assert {name for _, name in private_names_of_others(sources["upstream"], own)} >= {
        "_update_process_group",
        "_get_default_store",
        "_shared_state",
    }
    assert private_names_of_others("trainer._secret()", own) == [(1, "_secret")]


def test_every_private_name_names_the_test_that_holds_it(subtests):
    source = _modules()["upstream"].read_text()
    named = re.findall(r"(tests/\w+\.py)::(\w+)", source)
    for path, name in named:
        with subtests.test(name):
            assert f"def {name}(" in (ROOT / path).read_text()
    functions = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    assert len(functions) >= 9
    for function in functions:
        with subtests.test(function.name):
            words = ast.get_docstring(function)
            assert re.search(r"tests/\w+\.py::test_", words)
            assert re.search(r">= \d", words), "since which version"


def test_there_is_no_cycle():
    """Apart from the table, which could be wrong: what each module leads to, sorted."""
    leads_to = {
        module: {other for _, dotted in names_reached(path.read_text(), module) if (other := _own_module(dotted))}
        for module, path in _modules().items()
    }
    TopologicalSorter(leads_to).prepare()  # CycleError tells the cycle


def test_the_table_holds_nothing_twice_and_nothing_stale():
    names = [name for row in LAYERS for name in row]
    assert len(names) == len(LEVEL), "LAYERS names a module twice"
    stale = sorted(set(names) - set(_modules()))
    assert not stale, f"LAYERS names modules that do not exist: {', '.join(stale)}. Take them out."


def test_programs_use_public_names_only(subtests):
    for path in PROGRAMS:
        with subtests.test(path.relative_to(ROOT).as_posix()):
            check_program(path)


def check_program(path):
    name = path.relative_to(ROOT).as_posix()
    used = {(name, what): line for what, line in internals_used(path.read_text()).items()}
    words = [
        f"{name}, line {line}: {what} is not public"
        for (_, what), line in used.items()
        if (name, what) not in INTERNALS
    ]
    assert not words, "\n" + "\n".join(
        [*words, f"Public are {', '.join(slowmo_hf.__all__)}; a benchmark may list it in INTERNALS, with a reason."]
    )
    stale = [what for program, what in INTERNALS if program == name and (name, what) not in used]
    assert not stale, f"{name} no longer uses {', '.join(stale)}: take it out of INTERNALS."


def test_internals_are_excused_in_benchmarks_only():
    for program, what in INTERNALS:
        assert program.startswith("benchmarks/"), f"{program} is for users: it must do without {what}."
        assert ROOT / program in PROGRAMS, f"{program} does not exist: take it out of INTERNALS."


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        (
            "wire.averages",
            "from ..training.outer_loop import OuterLoop",
            "training.outer_loop is no lower than wire.averages",
        ),
        (
            "adapters.optimizer",
            "from .functions import consensus",
            "adapters.functions is no lower than adapters.optimizer",
        ),
        (
            "training.outer_loop",
            "def late():\n    from slowmo_hf.adapters import callback",
            "line 2: slowmo_hf.adapters.callback: imports run downwards only",
        ),
        (
            "training.outer_loop",
            "from ..adapters import callback as c",
            "adapters.callback is no lower than training.outer_loop",
        ),
        ("training.round", "from . import in_flight", "training.in_flight is no lower than training.round"),
        (
            "wire.communicator",
            "import slowmo_hf\nprint(slowmo_hf.__version__)",
            "__init__ is no lower than wire.communicator",
        ),
        ("config", "from slowmo_hf import SlowMoOptimizer", "__init__ is no lower than config"),
        (
            "wire.averages",
            "import importlib\nimportlib.import_module('slowmo_hf.adapters.callback')",
            "adapters.callback is no lower than wire.averages",
        ),
        (
            "wire.averages",
            "from importlib import import_module\nimport_module('.two_stage', __package__)",
            "wire.two_stage is no lower than wire.averages",
        ),
        ("wire.averages", "from .averages import Pool", "wire.averages is no lower than wire.averages"),
        (
            "adapters.optimizer",
            "if TYPE_CHECKING:\n    from transformers.trainer import Trainer",
            f"only {ADAPTERS_OF_TRAINER} may reach transformers",
        ),
        (
            "wire.averages",
            "from torch import distributed",
            f"only {TALKERS} may reach torch.distributed",
        ),
        ("wire.averages", "import torch\ntorch.distributed.barrier()", "line 2: torch.distributed"),
        (
            "wire.averages",
            "from .job import wire",
            "only wire.communicator, wire.processes may reach slowmo_hf.wire.job.wire",
        ),
        (
            "wire.averages",
            "import torch as t\nf = t.distributed.barrier",
            f"only {TALKERS} may reach torch.distributed",
        ),
        ("training.gizmo", "import torch", "training.gizmo.py is not in the table: add it to LAYERS"),
        ("training.outer_loop", "from .gizmo import Gizmo", "training.gizmo is not in the table: add it to LAYERS"),
    ],
)
def test_the_checker_catches(module, source, words):
    assert words in "\n".join(broken_rules(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "training.outer_loop",
            "import torch\nfrom ..algorithm.layout import flat_view\nfrom ..config import SlowMoConfig as C\nC.a",
        ),
        ("wire.job", "import torch.distributed as dist\ndist.barrier()"),
        ("wire.communicator", "from .job import wire\nwire().barrier()"),
        ("adapters.callback", "from transformers import Trainer\nfrom ..training.outer_loop import OuterLoop"),
        ("wire.averages", "words = 'torch.distributed, from .callback import SlowMoCallback'  # import transformers"),
    ],
)
def test_the_checker_lets_pass(module, source):
    assert broken_rules(module, source) == []


@pytest.mark.parametrize(
    ("source", "used"),
    [
        (
            "from slowmo_hf.training.outer_loop import OuterLoop",
            ["slowmo_hf.training.outer_loop.OuterLoop"],
        ),
        ("from slowmo_hf.config import SlowMoConfig", ["slowmo_hf.config.SlowMoConfig"]),
        ("import slowmo_hf.wire.averages", ["slowmo_hf.wire.averages"]),
        ("import slowmo_hf as s\ns.wire.averages", ["slowmo_hf.wire", "slowmo_hf.wire.averages"]),
        ("prepared.optimizer.outer_loop.rounds", ["outer_loop"]),
        (
            "import slowmo_hf\nfrom slowmo_hf import SlowMoConfig\nSlowMoConfig.bmuf(block_momentum=0.5), "
            "slowmo_hf.__version__",
            [],
        ),
    ],
)
def test_the_checker_knows_what_is_public(source, used):
    assert sorted(internals_used(source)) == used
