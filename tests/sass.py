"""What a compiled kernel costs on an NVIDIA GPU, read from its machine code: no GPU is needed."""

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);")
_LABEL = re.compile(r"(\.L_\w+):")


class Cost(NamedTuple):
    registers: int  # of a thread
    stack: int  # bytes of a thread: what was spilled
    instructions: Counter[str]  # of a thread, by name, on its way without slow paths

    def per_element(self, elements: float) -> float:
        """Instructions for each of a thread's `elements`."""
        return self.instructions.total() / elements


def cost_of(kernel: Any, folder: Path) -> Cost:
    """`kernel` is what a launch compiled."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _run("cuobjdump", "-res-usage", str(cubin)))
    assert usage, "cuobjdump says nothing of registers"
    lines = _run("nvdisasm", "-c", str(cubin)).splitlines()
    return Cost(int(usage[1]), int(usage[2]), Counter(_way(lines)))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _way(lines: list[str]) -> list[str]:
    """The instructions up to the first exit, branches over slow paths (which call) taken, all others not."""
    code, places = [], {}
    for line in lines:
        if label := _LABEL.match(line.strip()):
            places[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append((found[1], found[2], found[3]))
    way, at = [], 0
    while True:
        condition, name, rest = code[at]
        way.append(name)
        if name == "EXIT" and not condition:
            return way
        target = places[re.search(r"\.L_\w+", rest)[0]] if name == "BRA" else 0  # type: ignore[index]
        over = [name.split(".")[0] for _, name, _ in code[at + 1 : target]]
        at = target if name == "BRA" and (not condition or "CALL" in over) else at + 1
        assert len(way) < 100_000, "a loop is followed without an end"
