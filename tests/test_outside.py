"""Methods and optimizers of other packages: `tests/outside`, installed where only these tests look, is
trained, stopped, resumed, evaluated, inspected and submitted; packages that are wrong are answered in a line.
"""

import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from ranks import search_path
from test_cluster import assert_stopped_politely
from test_train import train

from lowbit_dist import configfile
from lowbit_dist.checkpoint import Checkpoint
from lowbit_dist.config import ConfigError

OWN = "dqt, flip, bitnet, trilm, tequila, tbt, dense"
CHOSEN = {"method": {"name": "sign"}, "optimizer": {"name": "momentum", "lr": 0.5}}


def package(folder, name, source, **entry_points):
    """A package of one module, as if it were installed in `folder`; methods={"name": "Class"}."""
    module = name.replace("-", "_")
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, classes in entry_points.items():
        lines += [
            f"[lowbit_dist.{group}]",
            *(f"{each} = {module}:{owner}" for each, owner in classes.items()),
        ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


def read(**sections):
    return configfile.from_dict({"data": {"path": "x"}, **sections})


def refused(**sections):
    with pytest.raises(ConfigError) as caught:
        read(**sections)
    return str(caught.value)


def test_a_method_and_an_optimizer_of_another_package_are_chosen_by_name_and_written_back(installed):
    config = read(method={"name": "sign", "clip": 2}, optimizer={"name": "momentum"})
    flat = config.flat()
    assert {name: flat[name] for name in flat if name.startswith(("method.", "optimizer."))} == {
        "method.name": "sign", "method.clip": 2.0,
        "optimizer.name": "momentum", "optimizer.lr": 0.1, "optimizer.linear_lr_ratio": 1.0,
        "optimizer.weight_decay": 0.01,
        "optimizer.states": "fp32", "optimizer.momentum": 0.9,
    }  # fmt: skip
    assert configfile.from_dict(config.to_dict()) == config
    assert (config.method.label, config.method.forward_grid.name) == ("sign weights", "sign")
    assert config.differences(read(**config.to_dict() | {"method": {"name": "sign"}})) == [
        "method.clip: 2.0 -> 1.0"
    ]


def test_mistakes_in_their_options_are_answered_as_those_of_the_package_itself(installed):
    assert refused(method={"name": "sign", "clip": 0}) == (
        "method.clip (0) must be more than 0; write one, for example 1.0"
    )
    assert refused(method={"name": "sign", "clib": 1}) == (
        "method: unknown name 'clib'; did you mean 'clip'?"
    )
    assert refused(method={"name": "sign", "grid": "int8"}) == (
        "method: unknown name 'grid' for method sign; it belongs to dqt, flip: leave it out "
        "(method={name: sign} drops a file's other options)"
    )
    assert refused(optimizer={"name": "momentum", "betas": [0.9, 0.99]}).startswith(
        "optimizer: unknown name 'betas' for optimizer momentum; it belongs to adamw, lion, muon, rmsprop: "
    )
    assert refused(optimizer={"name": "momentum", "qqqqq": 1}) == (
        "optimizer: unknown name 'qqqqq'; optimizer momentum has lr, linear_lr_ratio, weight_decay, states, "
        "momentum"
    )
    assert refused(optimizer={"name": "momentum", "states": "int8"}) == (
        "optimizer.states ('int8') must be one of fp32, bf16; write fp32, for example"
    )


def test_an_unknown_name_is_answered_with_those_that_are_installed(installed):
    assert refused(method={"name": "sherry"}) == (
        f"method.name ('sherry') must be one of {OWN}, sign; write one of them, or install the package that "
        "brings it"
    )
    assert refused(optimizer={"name": "momentun"}) == (
        "optimizer.name ('momentun') must be one of adafactor, adamw, lion, muon, rmsprop, momentum; did you "
        "mean 'momentum'?"
    )


def test_no_module_is_imported_because_a_configuration_names_it(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('stranger code has run')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("stranger", "stranger:Method", "lowbit_dist.methods.dense:Dense"):
        assert f"method.name ({name!r}) must be one of {OWN}" in refused(method={"name": name})
    assert "stranger" not in sys.modules


METHOD = "from lowbit_dist.methods import Method\nclass Thing(Method):\n    pass\n"
RULE = "from lowbit_dist.optim import Rule\nclass Thing(Rule):\n    "
ADVICE = "; mend that package, or write another name"
WRONG = {
    # what is installed (package, source, entry points), the section, the answer
    "a method that cannot be imported": (
        [("lb-absent", "import lb_nothing_of_this_name", {"methods": {"toy": "Thing"}})],
        {"method": {"name": "toy"}},
        "method.name ('toy') cannot be imported from lb-absent (lb_absent:Thing): ModuleNotFoundError: "
        f"No module named 'lb_nothing_of_this_name'{ADVICE}"),
    "a method that ends the process": (
        [("lb-exit", "raise SystemExit(3)", {"methods": {"toy": "Thing"}})],
        {"method": {"name": "toy"}},
        f"method.name ('toy') cannot be imported from lb-exit (lb_exit:Thing): SystemExit: 3{ADVICE}"),
    "a method whose error has many lines": (
        [("lb-lines", "raise RuntimeError('one\\n  two')", {"methods": {"toy": "Thing"}})],
        {"method": {"name": "toy"}},
        f"method.name ('toy') cannot be imported from lb-lines (lb_lines:Thing): RuntimeError: one "
        f"two{ADVICE}"),
    "a method that is not in its module": (
        [("lb-empty", "", {"methods": {"toy": "Thing"}})],
        {"method": {"name": "toy"}},
        "method.name ('toy') cannot be imported from lb-empty (lb_empty:Thing): AttributeError: module "
        f"'lb_empty' has no attribute 'Thing'{ADVICE}"),
    "a class that is no method": (
        [("lb-class", "class Thing:\n    pass\n", {"methods": {"toy": "Thing"}})],
        {"method": {"name": "toy"}},
        f"method.name ('toy') of lb-class (lb_class:Thing) is no Method{ADVICE}"),
    "a function that is no method": (
        [("lb-function", "def Thing(): pass\n", {"methods": {"toy": "Thing"}})],
        {"method": {"name": "toy"}},
        f"method.name ('toy') of lb-function (lb_function:Thing) is no Method{ADVICE}"),
    "a method that is no optimizer": (
        [("lb-method", METHOD, {"optimizers": {"toy": "Thing"}})],
        {"optimizer": {"name": "toy"}},
        f"optimizer.name ('toy') of lb-method (lb_method:Thing) is no Rule{ADVICE}"),
    "two packages that claim one name": (
        [("lb-two", METHOD, {"methods": {"toy": "Thing"}}),
         ("lb-one", METHOD, {"methods": {"toy": "Thing"}})],
        {"method": {"name": "toy"}},
        "method.name ('toy') is claimed by lb-one (lb_one:Thing) and lb-two (lb_two:Thing); uninstall "
        "all but one of them"),
    "a package that claims a name of this one": (
        [("lb-dqt", METHOD, {"methods": {"dqt": "Thing"}})],
        {"method": {"name": "dqt"}},
        "method.name ('dqt') is lowbit-dist's own and is claimed by lb-dqt (lb_dqt:Thing); uninstall that"),
    "a package that claims the default optimizer": (
        [("lb-adam", RULE + "pass\n", {"optimizers": {"adamw": "Thing"}})],
        {},
        "optimizer.name ('adamw') is lowbit-dist's own and is claimed by lb-adam (lb_adam:Thing); uninstall "
        "that"),
    "a class that calls itself otherwise": (
        [("lb-other", METHOD.replace("pass", "name: str = 'other'"), {"methods": {"toy": "Thing"}})],
        {"method": {"name": "toy"}},
        "method.name ('toy') stands for lb_other.Thing, whose own name is 'other'; mend the package that it "
        "comes from: both must be equal"),
    "states that a rule does not have": (
        [("lb-states", "from typing import Literal\n" + RULE + "states: Literal['fp32'] = 'fp32'\n",
          {"optimizers": {"toy": "Thing"}})],
        {"optimizer": {"name": "toy", "states": "int8"}},
        "optimizer.states ('int8') must be fp32; write fp32, for example"),
    "a rule that sees a matrix, on flat partitions": (
        [("lb-matrix", "from typing import ClassVar\n" + RULE + "scope: ClassVar = 'matrix'\n",
          {"optimizers": {"toy": "Thing"}})],
        {"method": {"name": "dense"}, "optimizer": {"name": "toy", "states": "fp32"}, "zero": {"stage": 2}},
        "zero.stage (2) must not be used with optimizer toy, which sees a whole matrix of a weight at once: "
        "DeepSpeed's stage-1/2 partitions are flat; write zero.stage: 3, or 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_package_that_is_wrong_is_answered_in_one_line(case, lowbit, tmp_path, monkeypatch):
    packages, sections, answer = WRONG[case]
    for name, source, entry_points in packages:
        package(tmp_path / name, name, source, **entry_points)
        monkeypatch.syspath_prepend(tmp_path / name)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"data": {"path": "x"}, **sections}))
    done = lowbit("train", file)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"lowbit: {answer}\n")
    assert read(method={"name": "bitnet"}, optimizer={"name": "lion"}), "other names are not concerned"


def test_a_mistake_elsewhere_is_answered_although_a_package_claims_a_name(tmp_path, monkeypatch):
    package(tmp_path, "lb-claims", METHOD, methods={"dqt": "Thing"})
    monkeypatch.syspath_prepend(tmp_path)
    answer = refused(method={"name": "dense", "grid": "int8"})
    assert answer.startswith("method: unknown name 'grid' for method dense; it belongs to dqt, flip")


def test_a_package_that_is_found_on_two_paths_claims_its_name_once(installed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(shutil.copytree(installed, tmp_path / "again"))
    assert read(**CHOSEN).method.label == "sign weights"


def test_packages_are_told_apart_by_their_version_and_their_source(installed, tmp_path, monkeypatch):
    content = read(**CHOSEN).to_dict()
    (found,) = configfile.providers(content).items()
    assert found[0] == "lowbit-outside" and found[1].startswith("0.1.0 (")
    assert configfile.providers(read().to_dict()) == {}
    elsewhere = shutil.copytree(installed, tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [str(elsewhere), *(each for each in sys.path if each != str(installed))])
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "lowbit_outside", raising=False)
    assert configfile.providers(content) == dict([found])
    with (elsewhere / "lowbit_outside" / "sign.py").open("a") as file:
        file.write("# changed\n")
    changed = configfile.providers(content)["lowbit-outside"]
    assert changed.startswith("0.1.0 (") and changed != found[1]


EXAMINE = """
import json, sys
from lowbit_dist.cluster.probe import examine
print(json.dumps(examine(json.load(sys.stdin), ".", False)))
"""


def test_a_machine_that_has_no_such_package_or_another_one_is_named_in_one_line(
    installed, small, outside, tmp_path, monkeypatch
):
    from lowbit_dist.cluster.probe import check_packages, packages

    def answer(content, path):
        done = subprocess.run(
            [sys.executable, "-c", EXAMINE], input=json.dumps(content), capture_output=True, text=True,
            check=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        check_packages("machine node2 (10.0.0.2)", json.loads(done.stdout), packages(), own)

    def complaint(content, path):
        with pytest.raises(ConfigError) as caught:
            answer(content, path)
        return str(caught.value)

    content = configfile.from_dict(small(**CHOSEN)).to_dict()
    own = configfile.providers(content)
    version = own["lowbit-outside"]
    here = os.environ["PYTHONPATH"]
    answer(content, here)
    assert complaint(content, here.replace(str(outside), str(tmp_path / "nothing"))) == (
        f"machine node2 (10.0.0.2) lacks lowbit-outside {version}, from which this run's method or optimizer "
        "comes; install it on all machines"
    )
    other = shutil.copytree(outside, tmp_path / "other")
    (other / "lowbit_outside" / "momentum.py").write_text("raise ImportError('of another version')\n")
    said = complaint(content, here.replace(str(outside), str(other)))
    assert said.startswith("machine node2 (10.0.0.2) has lowbit-outside 0.1.0 (")
    assert said.endswith(
        f"), but {version} is where the run was started: install the same packages on all machines"
    )
    package(tmp_path / "rival", "lb-rival", METHOD, methods={"sign": "Thing"})
    said = complaint(content, search_path(tmp_path / "rival"))
    assert said.startswith("machine node2 (10.0.0.2): method.name ('sign') is claimed by ")


STEPS = 12
TRAIN = {
    "steps": STEPS, "batch_tokens": 4 * 64, "micro_batch": 1, "log_every": 1, "eval_every": STEPS,
    "eval_samples": 4, "save_every": 1, "keep_last": 2, "reproducible": True,
}  # fmt: skip


def train_outside(folder, configuration):
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return train(configuration)
    finally:
        sys.path.remove(str(folder))


@pytest.fixture
def undisturbed(ranks, small, outside):
    """What the run gives in processes that nobody stops."""

    numbers = itertools.count(1)

    def digest(world, **sections):
        content = small(run={"name": f"alone-{next(numbers)}"}, **sections)
        return ranks(world).run(train_outside, str(outside), content)[0]["digest"]

    return digest


def rows(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def command(*arguments):
    return [sys.executable, "-m", "lowbit_dist", *map(str, arguments)]


def answer_of(*arguments):
    done = subprocess.run(command(*arguments, "--json"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def linear_weights(checkpoint):
    return {name: checkpoint.tensor(name) for name in checkpoint.names if name.endswith("proj.weight")}


@pytest.mark.slow
def test_it_is_trained_by_two_workers_stopped_resumed_evaluated_and_inspected(
    installed, small, tmp_path, undisturbed, corpus
):
    content = small(run={"name": "signs"}, train=TRAIN, cluster={"workers": 2}, **CHOSEN)
    file, folder = tmp_path / "run.yaml", tmp_path / "signs"
    file.write_text(json.dumps(content))
    process = subprocess.Popen(
        command("train", file), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while len(rows(folder)) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert_stopped_politely(stderr)
    assert 3 <= rows(folder)[-1]["step"] < STEPS, "it must have been stopped before its end"

    summary = answer_of("train", file)
    assert (summary["steps"], summary["skipped_steps"]) == (STEPS, 0)
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
    assert summary["digest"] == undisturbed(2, train=TRAIN, **CHOSEN)
    assert summary["digest"] == undisturbed(1, train=TRAIN, **CHOSEN)

    # Its numbers are counted in its own levels.
    last = rows(folder)[-1]
    assert (last["zero_fraction"], last["saturation"]) == (0.0, 1.0)
    before, after = (
        linear_weights(Checkpoint.open(folder / "checkpoints" / f"step-{step}"))
        for step in (STEPS - 1, STEPS)
    )
    flipped = sum(int(((before[name] < 0) != (after[name] < 0)).sum()) for name in after)
    assert flipped > 0, "the case must flip some signs"
    assert last["flip_rate"] == flipped / sum(weight.numel() for weight in after.values())

    evaluated = answer_of("eval", folder, "--data", corpus)
    assert evaluated["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    assert evaluated["forward"] == "sign"
    inspected = answer_of("inspect", folder, "--verify")
    assert (inspected["method"], inspected["problems"]) == ("sign weights", [])
    assert inspected["digest"] == summary["digest"]
    planned = answer_of("plan", file)
    assert planned["components"]["low_bit_weights"]["bytes"] == 0


def test_without_the_package_its_runs_are_answered_with_what_is_missing(small, undisturbed, lowbit, tmp_path):
    undisturbed(1, train={**TRAIN, "steps": 1}, **CHOSEN)
    missing = f"must be one of {OWN}; write one of them, or install the package that brings it"
    done = lowbit("inspect", tmp_path / "alone-1")
    assert (done.returncode, done.stderr) == (2, f"lowbit: method.name ('sign') {missing}\n")
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(small(run={"name": "alone-1"}, cluster={"workers": 1})))
    done = lowbit("train", file)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"lowbit: run.name (alone-1): {tmp_path}/alone-1/config.yaml: method.name ('sign') {missing}"
    ]


@pytest.mark.parametrize(
    ("sections", "worlds"),
    [
        ({"method": {"name": "dqt"}, "optimizer": {"name": "momentum", "lr": 0.5}}, (1, 2)),
        ({"method": {"name": "sign"}, "optimizer": {"name": "lion", "states": "int8"}}, (1, 2)),
        # DeepSpeed's own sums under stage 2 depend on the number of workers.
        ({"method": {"name": "sign"}, "optimizer": {"name": "momentum"}, "zero": {"stage": 2}}, (2, 2)),
    ],
    ids=["codes", "another rule", "stage 2"],
)
def test_its_rule_moves_codes_and_its_method_is_moved_by_other_rules(sections, worlds, undisturbed):
    steps = {**TRAIN, "steps": 4, "reproducible": "zero" not in sections}
    one, other = (undisturbed(world, train=steps, **sections) for world in worlds)
    lion = sections["optimizer"]["name"] == "lion"
    assert one == other
    # All gradients a thousand times smaller are the same to Lion; without a limit their lengths differ.
    assert one != undisturbed(1, train={**steps, "clip_norm": 1e6 if lion else 1e-3}, **sections)
