"""What a person runs or applies, in launch/ and docker/: each file passes the checker of its kind, and each
checker finds a mistake.
"""

import importlib.resources
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from lowbit_dist import configfile

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/*.sbatch")])
KUBERNETES = "1.37"


def problems_of_script(file):
    syntax = subprocess.run(["bash", "-n", file], capture_output=True, text=True)
    if syntax.returncode:
        return [syntax.stderr]
    command = [TOOLS / "shellcheck", "--external-sources", "--source-path", ROOT / "launch", file]
    style = subprocess.run(command, capture_output=True, text=True)
    return [style.stdout] if style.returncode else []


def problems_of_dockerfile(file):
    done = subprocess.run([TOOLS / "hadolint", "--no-color", file], capture_output=True, text=True)
    return [done.stdout] if done.returncode else []


def problems_by_schema(content, schema):
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(content)]


def problems_of_compose(file):
    vendored = importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    return problems_by_schema(yaml.safe_load(file.read_text()), json.loads(vendored.read_text()))


def pod_templates(content):
    """Every `template` of a pod, wherever it stands."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if key == "template":
            yield value
        elif isinstance(value, dict | list):
            yield from pod_templates(value)


def problems_of_manifest(file):
    problems = []
    for content in yaml.safe_load_all(file.read_text()):
        core = [content]
        if content["apiVersion"].startswith("ray.io/"):
            schema = yaml.safe_load((ROOT / "tests/schemas/kuberay.yaml").read_text())
            problems += problems_by_schema(content, schema)
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}}
            core = [pod | template for template in pod_templates(content)]
            assert len(core) == 2, "a head and workers"
        for each in core:
            try:
                kubernetes_validate.validate(each, KUBERNETES, strict=True)
            except kubernetes_validate.ValidationError as error:
                problems.append(f"{'.'.join(map(str, error.path))}: {error.message}")
    return problems


def problems_of_ray_cluster(file):
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(yaml.safe_load(file.read_text())))
    except (jsonschema.ValidationError, ValueError) as error:
        return [str(error)]
    return []


FILES = {
    **dict.fromkeys(SCRIPTS, problems_of_script),
    ROOT / "docker/Dockerfile": problems_of_dockerfile,
    **dict.fromkeys(sorted(ROOT.glob("docker/compose*.yaml")), problems_of_compose),
    **dict.fromkeys(sorted(ROOT.glob("launch/kuberay/*.yaml")), problems_of_manifest),
    ROOT / "launch/ray-cluster.yaml": problems_of_ray_cluster,
}


def named(file):
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=named)
def test_a_recipe_passes_the_checker_of_its_kind(file):
    assert FILES[file](file) == []


MISTAKES = {
    "a quote that is not closed": ("launch/cluster.sh", 'usage: cluster.sh up [N] | down"', "usage:"),
    "a variable without quotes": ("launch/cluster.sh", 'start head --head --port="$port"', "start $1"),
    "a batch script with a quote too few": ("launch/slurm.sbatch", 'export PATH="$PWD', "export PATH=$PWD"),
    "an image of no version": ("docker/Dockerfile", "FROM python:${PYTHON}-slim-bookworm", "FROM python"),
    "an instruction that is none": ("docker/Dockerfile", "WORKDIR /shared", "WORKDIRECTORY /shared"),
    "a service's unknown field": ("docker/compose.yaml", "init: true", "initt: true"),
    "a port that is no text": ("docker/compose.yaml", 'ports: ["127.0.0.1:5000:5000"]', "ports: {a: 5000}"),
    "a device that is none": ("docker/compose.cuda.yaml", "capabilities: [gpu]", "capabilities: gpu"),
    "a cluster's unknown field": ("launch/kuberay/cluster.yaml", "authOptions", "authOption"),
    "a number of workers in words": ("launch/kuberay/cluster.yaml", "minReplicas: 2", "minReplicas: two"),
    "a start parameter that is no text": ("launch/kuberay/cluster.yaml", 'num-cpus: "0"', "num-cpus: 0"),
    "a probe's unknown field": ("launch/kuberay/cluster.yaml", "failureThreshold: 24", "threshold: 24"),
    "a container without a name": ("launch/kuberay/job.yaml", "name: ray-worker", "imagePullPolicy: Always"),
    "a job's unknown field": ("launch/kuberay/job.yaml", "backoffLimit: 3", "retries: 3"),
    "a claim's unknown field": ("launch/kuberay/storage.yaml", "accessModes", "accessMode"),
    "a number of nodes in words": ("launch/ray-cluster.yaml", "max_workers: 8", "max_workers: eight"),
    "an unknown setting of a cluster": ("launch/ray-cluster.yaml", "idle_timeout_minutes", "idle_minutes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_checker_finds_a_mistake(mistake, tmp_path):
    name, before, after = MISTAKES[mistake]
    content = (ROOT / name).read_text()
    assert before in content, "the mistake must change something"
    broken = tmp_path / Path(name).name
    broken.write_text(content.replace(before, after))
    assert FILES[ROOT / name](broken) != []


def test_no_recipe_publishes_a_port_to_the_network_or_says_a_token():
    for file in (*FILES, *ROOT.glob("launch/*.py")):
        for line in file.read_text().splitlines():
            assert not ("TOKEN=" in line and "$(" not in line and "%" not in line), f"{file}: {line}"
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert len(published) >= 3
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_what_runs_before_a_commit_is_what_the_tests_begin_with():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    script = (ROOT / "launch/test.sh").read_text().splitlines()
    first = script.index("ruff format --check lowbit_dist tests")
    hooks = repository.pop("hooks")
    assert repository == {"repo": "local"}
    commands = [line.removesuffix(" &") for line in script[first : first + len(hooks)]]
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in hooks] == commands
    for hook in hooks:
        assert (TOOLS / hook["entry"].split()[0].removeprefix(".venv/bin/")).is_file()
        assert set(hook) == {"id", "name", "entry", "language", "types", "pass_filenames"}
        assert (hook["language"], hook["types"], hook["pass_filenames"]) == ("system", ["python"], False)


@pytest.mark.parametrize("arguments", [[], ["sideways"], ["up", "none"], ["up", "0"]])
def test_a_cluster_that_is_asked_for_wrongly_is_not_started(arguments):
    # Its set-up is done: the test runs in the environment that it makes.
    script = (
        (ROOT / "launch/cluster.sh")
        .read_text()
        .replace('source "$(dirname "$0")/setup.sh"', "set -euo pipefail")
    )
    done = subprocess.run(
        ["bash", "-c", script, "cluster.sh", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")


def runs_of(file):
    """(configuration, overrides) of each run that a file tells how to start, in a comment or in code."""
    text = re.sub(r"\\\n#?\s*", "", file.read_text())
    for name, rest in re.findall(r"(?:lowbit submit|slurm\.sbatch) \S*?(configs/\S+\.yaml)(.*)", text):
        yield name, re.findall(r"(?<!\S)[a-z_]+\.[a-z_.]+=\S+", rest)


RECIPES = [
    "launch/slurm.sbatch", "launch/ray-cluster.yaml", "launch/kuberay/cluster.yaml", "docker/README.md"
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_runs_that_a_recipe_starts_have_a_configuration(recipe):
    runs = list(runs_of(ROOT / recipe))
    assert runs
    for name, overrides in runs:
        assert overrides, "where the run's data is, and how many workers it has, is another matter there"
        configfile.load(ROOT / name, overrides)
