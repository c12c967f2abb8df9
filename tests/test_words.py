"""The field's words: names say what a thing is, and the examples in docstrings give what they say."""

import ast
import doctest
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import lowbit_dist
from lowbit_dist.grid import BLOCK, GRIDS
from lowbit_dist.methods import DQT
from lowbit_dist.packed import PackedTensor

PACKAGE = Path(lowbit_dist.__file__).parent
ROOT = Path(__file__).parent.parent
EMPTY_NAMES = {"found", "each", "cfg", "opt", "ckpt"}
OLD_WORDS = """
    answers.py Pulse pulse.py rehearse Room room_here of_each Way _mildest _without_needless that_answer
    is_rays GOODBYE OTHERS_END PATIENCE SILENCE ENOUGH FLAT RETURNS remembered _pushed _through Stock
    drafted Draft explained
"""
OLD_PHRASES = ("goes on where", "of a full disk, others speak")

ONE_MEANING = {"Watch", "Stock", "Part", "Outcome", "Progress", "State", "Run", "Lines"}


@cache
def trees():
    """The code of each file of the package."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")
    }


def bound_names(tree):
    """Every name that is given a value: variables, parameters, attributes, functions, classes, imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler):
            yield node.name, node.lineno
        elif isinstance(node, ast.alias):
            yield node.asname or node.name, node.lineno
        elif isinstance(node, ast.MatchAs | ast.MatchStar):
            yield node.name, node.lineno


def written():
    """Every text that users and readers see, by its name."""
    for top in ("lowbit_dist", "tests", "launch", "configs"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path != Path(__file__):
                try:
                    yield path.relative_to(ROOT).as_posix(), path.read_text()
                except UnicodeDecodeError:  # a picture
                    continue
    yield "README.md", (ROOT / "README.md").read_text()


def test_nothing_is_called_found_or_each_or_by_an_abbreviation():
    wrong = [
        f"{file}:{line} {name}"
        for file, tree in trees().items()
        for name, line in bound_names(tree)
        if name in EMPTY_NAMES
    ]
    assert not wrong, "\n".join(wrong)


def test_old_names_are_gone():
    pattern = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, OLD_WORDS.split())) + r")(?!\w)")
    wrong = [f"{file}: {match[0]}" for file, text in written() for match in pattern.finditer(text)]
    assert not wrong, "\n".join(wrong)


def test_old_phrases_are_gone():
    wrong = [
        f"{file}: {phrase}"
        for file, text in written()
        for phrase in OLD_PHRASES
        if phrase in " ".join(text.split())
    ]
    assert not wrong, "\n".join(wrong)


def test_one_name_is_one_thing():
    homes = {}
    for file, tree in trees().items():
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        for name in defined & ONE_MEANING:
            homes.setdefault(name, []).append(file)
    assert all(len(files) == 1 for files in homes.values()), homes


@pytest.mark.parametrize("module", ["methods.dqt", "ops.reference"])
def test_the_examples_of_a_docstring_are_true(module):
    failed, attempted = doctest.testmod(import_module(f"lowbit_dist.{module}"))
    assert attempted and not failed


def test_the_drawing_of_a_packed_shard_is_true():
    """Of lowbit_dist/zero/shards.py: a ternary weight [5, 256] on two workers."""
    from lowbit_dist.zero import shards

    levels = torch.arange(5 * 256).view(5, 256) % 3 - 1.0
    tensor = PackedTensor.quantize(levels, torch.ones(1), GRIDS["ternary"])
    parameter, packed = SimpleNamespace(ds_numel=tensor.numel), []
    for rank in range(2):
        dist.init_process_group("fake", rank=rank, world_size=2)
        try:
            padded = tensor.numel + shards.Partitioner._padding_size(None, parameter)
            packed.append(
                shards.Packed(
                    tensor.shape,
                    tensor.scale.numel(),
                    padded,
                    torch.bfloat16,
                    torch.device("cpu"),
                    replicated=False,
                    in_layer=True,
                    method=DQT(),
                )
            )
        finally:
            dist.destroy_process_group()
    first, second = packed
    for part in packed:
        start = part.stored.first_block * tensor.grid.bytes_per_block
        part.stored.codes.copy_(tensor.codes[start : start + part.stored.codes.numel()])
    gathered = torch.cat([first.wire, second.wire])
    first.whole = gathered
    dense = first.dense(levels.shape, torch.bfloat16)
    assert torch.equal(dense.float(), levels)
    numbers = {
        "1,280 elements": f"{tensor.numel:,} elements",
        "5 * 64 = 320 bytes of codes": f"5 * 64 = {tensor.codes.numel()} bytes of codes",
        "1280      1536": f"{tensor.numel}      {padded}",
        "ds_tensor: 192 bytes": f"ds_tensor: {first.own.numel()} bytes",
        "192 bytes, 512 elements": f"{second.own.numel()} bytes, {second.stored.levels().numel()} elements",
        "768 elements with": f"{first.stored.levels().numel()} elements with",
        "384 bytes on each worker": f"{gathered.numel()} bytes on each worker",
        "the stub: 2 bytes in bf16": f"the stub: {first.stub.nbytes} bytes in bf16",
        "2,560 bytes for one matmul": f"{dense.nbytes:,} bytes for one matmul",
        "weights would be 1,536": f"weights would be {first.own.numel() * 4 * dense.itemsize:,}",
    }
    for said, true in numbers.items():
        assert said == true and said in shards.__doc__
    assert second.stored.first_block * BLOCK == 768 and not second.own[128:].any()
