"""The architecture as a test: files import downwards, and each dependency has one home."""

import ast
import subprocess
import sys
from pathlib import Path

import lowbit_dist

PACKAGE = Path(lowbit_dist.__file__).parent

# A module imports its own floor or lower.
FLOOR = {
    "grid": 0, "answers": 0, "files": 0, "yamlfile": 0, "config": 0, "schedule": 0, "guard": 0, "pulse": 0,
    "ops": 1,
    "packed": 2, "linear": 2, "charts": 2,
    "methods": 3, "model": 3, "tokenizer": 3, "data": 3, "zero": 3, "memory": 4, "tracking": 3,
    "checkpoint": 4, "runs": 4,
    "train": 5, "evaluate": 5, "generate": 5, "bench": 5, "doctor": 5,
    "cluster": 6, "compare": 6, "sweep": 6,
    "cli": 7, "__main__": 7,
}  # fmt: skip

HOMES = {
    "deepspeed": {"zero"},
    "mlflow": {"tracking"},
    "streaming": {"data"},
    "sentencepiece": {"tokenizer"},
    "triton": {"ops"},
    "typer": {"cli"},
    "matplotlib": {"charts"},
    "yaml": {"yamlfile"},
    "pyarrow": {"data"},
    "zstandard": {"data"},
    "safetensors": {"checkpoint", "model"},
    "ray": {"cluster", "data", "tracking"},  # cluster: Train and Jobs; data: Ray Data; tracking: metrics
}


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "lowbit_dist":
                yield from (f"lowbit_dist.{alias.name}" for alias in node.names)
            else:
                yield node.module


def sources():
    return [path for path in PACKAGE.rglob("*.py") if module_of(path) != "__init__"]


def test_every_module_has_a_floor():
    assert {module_of(path) for path in sources()} <= set(FLOOR)


def test_imports_point_downwards():
    for path in sources():
        for name in imports(path):
            if name.startswith("lowbit_dist."):
                other = name.split(".")[1]
                assert FLOOR[other] <= FLOOR[module_of(path)], f"{path} imports {other} from a higher floor"


def test_each_dependency_has_one_home():
    for path in sources():
        for name in imports(path):
            homes = HOMES.get(name.split(".")[0])
            assert homes is None or module_of(path) in homes, f"{name} belongs to {homes}, not to {path}"


def test_importing_the_package_stays_light():
    code = (
        "import sys, lowbit_dist.cli, lowbit_dist.config;"
        "heavy = {'torch', 'ray', 'deepspeed', 'mlflow', 'streaming', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
