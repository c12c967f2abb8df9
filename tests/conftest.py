"""What several test files share: prepared data and living ranks, made once per session."""

import json
import os
import shutil
import signal
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; two cores serve every process here
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # whatever else fills the memory, no worker ends
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as network.py has it: gRPC is loaded before that here

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ranks import Ranks, search_path, start_server

for signum in (signal.SIGINT, signal.SIGHUP):  # ignored behind `nohup` and `&`, which processes would inherit
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, lambda *_: None)

SEQ_LEN = 64
# Tests of these files, and those that use these fixtures, are of marker `integration`.
INTEGRATED = {"test_fitting.py", "test_memory.py", "test_services.py", "test_tracking.py"}
INTEGRATING = {"ranks", "ray", "ray_port", "disk", "store", "new_store"}
# Files whose tests take longest, longest first: begun last, one of them would keep one process busy alone.
LONGEST = (
    "hosts", "cluster", "train", "memory", "sweep", "fitting", "signals", "kernels", "resume", "outside",
    "data", "guard", "toys", "wrong_input", "tracking", "checkpoint", "disk", "quantize", "export",
    "export_trained",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in INTEGRATED or INTEGRATING & set(getattr(item, "fixturenames", ())):
            item.add_marker("integration")
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder: some of the standard library's sources, 512 pieces, samples of 64 tokens.

    Made by the first of pytest's processes that needs it, for all of them.
    """
    import json as module_with_source

    from preparing import prepare_alone

    from lowbit_dist import tokenizer
    from lowbit_dist.files import locked

    sources = [str(Path(module_with_source.__file__).parent), str(Path(os.__file__))]
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "corpus"
    folder.mkdir(exist_ok=True)
    with locked(folder / "lock"):
        words, out = folder / "tokenizer", folder / "data"
        if not out.exists():
            tokenizer.train(sources, 512, words)
            prepare_alone(sources, words, out, seq_len=SEQ_LEN, val_fraction=0.1)
    return out


@pytest.fixture(scope="module")
def ray() -> Iterator[int]:
    """A Ray session that launches of this process join, and that is not their own: its metrics port."""
    from lowbit_dist.cluster import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with session.ray_session(os.getppid(), print):
            import ray

            patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
            yield ray.nodes()[0]["MetricsExportPort"]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """`ranks(n)`: n gloo processes, kept for the session."""
    alive: dict[int, Ranks] = {}
    start_server()

    def get(world: int) -> Ranks:
        if world not in alive:
            alive[world] = Ranks(world, str(tmp_path_factory.mktemp("store") / "file"))
        return alive[world]

    yield get
    for each in alive.values():
        each.close()


@pytest.fixture(scope="session")
def few_steps(
    ranks: Callable[[int], Ranks], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """`few_steps(method={...}, model={...}, ...)`: the summary of a run of four steps in fp32, made once."""
    folder = tmp_path_factory.mktemp("few")
    made: dict[str, dict[str, Any]] = {}

    def summary(**sections: Any) -> dict[str, Any]:
        if (key := json.dumps(sections, sort_keys=True)) not in made:
            configuration: dict[str, Any] = {
                "run": {"name": f"run-{len(made)}", "dir": str(folder)},
                "model": {
                    "hidden_size": 256, "intermediate_size": 512, "layers": 2, "heads": 4, "kv_heads": 2
                },
                "data": {"path": str(corpus), "seq_len": SEQ_LEN},
                "optimizer": {"lr": 2e-3},
                "schedule": {"warmup_steps": 1},
                "precision": "fp32",
                "train": {"steps": 4, "batch_tokens": 256, "micro_batch": 2, "eval_samples": 6},
                "cluster": {"workers": 1},
                "tracking": {"mlflow": None},
            }  # fmt: skip
            for section, content in sections.items():
                mapping = isinstance(content, dict)
                configuration[section] = {**configuration.get(section, {}), **content} if mapping else content
            (made[key],) = ranks(1).run(_train, configuration)
        return made[key]

    return summary


def _train(configuration: dict[str, Any]) -> dict[str, Any]:
    from lowbit_dist import configfile, loop

    return loop.run(configfile.from_dict(configuration))


@pytest.fixture
def small(corpus: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`small(method={...}, train={...}, ...)`: the configuration of a run that takes seconds, as a
    mapping.
    """

    def configuration(**sections: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "run": {"name": "small", "dir": str(tmp_path)},
            "model": {"hidden_size": 256, "intermediate_size": 512, "layers": 2, "heads": 4, "kv_heads": 2},
            "method": {"name": "dqt"},
            "data": {"path": str(corpus), "seq_len": SEQ_LEN},
            "optimizer": {"lr": 2e-3},
            "schedule": {"warmup_steps": 2},
            "precision": "fp32",
            "zero": {},
            "train": {
                "steps": 8,
                "batch_tokens": 4 * SEQ_LEN,
                "micro_batch": 2,
                "log_every": 4,
                "eval_every": 8,
                "eval_samples": 4,
                "save_every": 8,
            },
            "cluster": {},
            "tracking": {"mlflow": None},
        }
        for name, content in sections.items():
            merges = isinstance(content, dict) and isinstance(base[name], dict)
            base[name] = {**base[name], **content} if merges else content
        return base

    return configuration


@pytest.fixture(scope="session")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package of tests/outside in it; pip builds in a copy, so that the source stays as it
    is.
    """
    folder = tmp_path_factory.mktemp("outside")
    source = shutil.copytree(Path(__file__).parent / "outside", folder / "source")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", source]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / "site"


@pytest.fixture
def installed(outside: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, found by this process and those that it starts."""
    monkeypatch.syspath_prepend(outside)
    monkeypatch.setenv("PYTHONPATH", search_path(outside))
    return outside


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def lowbit(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`lowbit("plan", ...)` in this process: what the shell would see."""

    def run(*arguments: Any) -> Done:
        from lowbit_dist.cli import main

        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        capfd.readouterr()
        stdout = os.dup(1)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.close(stdout)
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, *capfd.readouterr())

    return run
