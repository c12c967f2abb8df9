"""The architecture as a test: files import downwards and in no circle, each dependency has one home, and what
a method is called stays in few places.
"""

import ast
import graphlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lowbit_dist
from lowbit_dist.methods import METHODS

PACKAGE = Path(lowbit_dist.__file__).parent

# A file imports its own floor or lower.
FLOOR = {
    "grid": 0, "errors": 0, "files": 0, "network": 0, "yamlfile": 0, "section": 0, "shape": 0, "execution": 0,
    "precision": 0, "synonyms": 0, "timing": 0,
    "registry": 0, "naming": 0, "guard": 0, "heartbeat": 0, "record": 0, "machine": 0, "folders": 0,
    "clock": 0,
    "ops": 1, "documents": 1,
    "packed": 2, "linear": 2, "compiled_linear": 2, "float8": 2, "charts": 2, "tokenizer": 2,
    "hf_tokenizer": 2, "pretrained": 2, "experts": 2, "attention": 2,
    "methods": 3, "optim": 3, "config": 3, "configfile": 3, "schedule": 3,
    "model": 3, "products": 3, "data": 3, "loss": 3, "zero": 3, "statistics": 3, "compiled": 3,
    "memory": 4, "cost": 4, "checkpoint": 4, "runs": 4, "tracking": 4, "convert": 4,
    "inference": 4, "serving": 6, "harness": 6,
    "inputs": 5, "resuming": 5, "trained": 5, "loop": 5, "evaluate": 5, "generate": 5, "bench": 5,
    "bench_training": 5,
    "doctor": 5,
    "cluster": 6, "compare": 6, "sweep": 6, "quantize": 6, "export": 6,
    "cli": 7, "__main__": 7,
    "__init__": 8,  # the Python API: nothing in the package imports from it
}  # fmt: skip

HOMES = {
    "deepspeed": {"zero"},
    "mlflow": {"tracking"},
    "wandb": {"tracking"},
    "tensorboard": {"tracking"},
    "streaming": {"data"},
    "sentencepiece": {"tokenizer", "export"},  # export: what a file says of its pieces
    "gguf": {"export"},
    "triton": {"ops"},
    "typer": {"cli"},
    "matplotlib": {"charts"},
    "yaml": {"yamlfile"},
    "pyarrow": {"documents"},
    "zstandard": {"documents"},
    "fcntl": {"files"},
    "grpc": {"network"},
    "safetensors": {"checkpoint", "export", "pretrained", "statistics"},
    "compressed_tensors": {"export"},
    "fastapi": {"serving"},
    "uvicorn": {"serving"},
    "lm_eval": {"harness"},
    "ray": {"cluster", "data", "tracking"},  # cluster: Train and Jobs; data: Ray Data; tracking: metrics
}

FILES = {
    ".".join(("lowbit_dist", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in PACKAGE.rglob("*.py")
}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def part(name: str) -> str:
    """The key of a module's floor."""
    return [*name.split("."), "__init__"][1]


def imports(name: str) -> set[str]:
    """What a module imports when it runs, inside functions too: modules, and names of packages."""
    found: set[str] = set()
    nodes: list[ast.AST] = [tree(name)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import; write the module's whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    return found


def needs(name: str) -> set[str]:
    """The files of the package that a module imports, with the `__init__` of each package that it enters."""
    found = set()
    for target in imports(name):
        if target.split(".")[0] == "lowbit_dist":
            target = target if target in FILES else target.rpartition(".")[0]
            found.add(target)
            while not f"{name}.".startswith(f"{(target := target.rpartition('.')[0])}."):
                found.add(target)
    return found


def calls(name: str, *functions: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions
    ]


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downwards(name):
    assert part(name) in FLOOR, f"{FILES[name]} has no floor yet; give it one"
    for other in needs(name):
        assert FLOOR[part(other)] <= FLOOR[part(name)], f"{name} imports {other} from a higher floor"


def test_files_form_no_circle():
    graphlib.TopologicalSorter({name: needs(name) for name in FILES}).prepare()  # CycleError names the circle


@pytest.mark.parametrize("name", FILES)
def test_each_dependency_has_one_home(name):
    for target in imports(name):
        homes = HOMES.get(target.split(".")[0])
        assert homes is None or part(name) in homes, f"{target} belongs to {homes}, not to {name}"


def test_methods_are_listed_in_three_files_at_most():
    found = [name for name, path in FILES.items() if re.search(r"\bMETHODS\b", path.read_text())]
    assert len(found) <= 3, f"{found} name METHODS"


@pytest.mark.parametrize("name", FILES)
def test_no_file_asks_for_a_methods_class(name):
    """A method answers for itself: there is no other behaviour for one of them in shared code."""
    classes = {place.rpartition(":")[2] for place in METHODS.values()}
    for call in calls(name, "isinstance", "issubclass"):
        asked = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(call.args[1])}
        assert not asked & classes, f"{name} line {call.lineno}: {ast.unparse(call)}"


@pytest.mark.parametrize("name", FILES)
def test_attributes_are_there_or_not_but_are_not_asked_for(name):
    found = [f"line {call.lineno}: {ast.unparse(call)}" for call in calls(name, "hasattr")]
    assert not found, f"{name} {found}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_in_one_sitting(name):
    n_lines = len(FILES[name].read_text().splitlines())
    assert n_lines <= 400, f"{FILES[name]} has {n_lines} lines; cut it where its subject changes"


def test_importing_the_package_stays_light():
    code = (
        "import sys, lowbit_dist.cli, lowbit_dist.config;"
        "heavy = {'torch', 'ray', 'deepspeed', 'mlflow', 'streaming', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
