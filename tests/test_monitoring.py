"""What a run tells Ray arrives in Prometheus, and the dashboard asks for nothing else."""

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from lowbit_dist import configfile, heartbeat
from lowbit_dist.memory import COMPONENTS
from lowbit_dist.record import Record
from lowbit_dist.runs import BASELINES
from lowbit_dist.tracking import gauges

MONITORING = Path(__file__).parent.parent / "launch" / "monitoring"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "lowbit.json"
PANELS = {"barchart", "gauge", "stat", "table", "timeseries"}
# Before the first restart, resume or rollback there is none to mark.
MARKS = ("Restarts", "Resumes", "Rollbacks")


def dashboard():
    return json.loads(DASHBOARD.read_text())


def queries(board):
    """(title, PromQL) of every panel and annotation."""
    panels = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]
    return panels + [(each["name"], each["expr"]) for each in board["annotations"]["list"]]


def faults(board):
    """What is wrong with a dashboard, in words."""
    found = []
    variables = {each["name"] for each in board["templating"]["list"]}
    source = {"type": "prometheus", "uid": "${datasource}"}
    taken = set()
    for panel in board["panels"]:
        name, place = panel["title"], panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        found += [f"{name}: no panel of type {panel['type']}"] * (panel["type"] not in PANELS)
        found += [f"{name}: lies on another panel"] * bool(cells & taken)
        found += [f"{name}: is wider than the page"] * any(x >= 24 for x, _ in cells)
        found += [f"{name}: asks nothing"] * (not panel["targets"])
        found += [f"{name}: another source"] * any(
            each["datasource"] != source for each in [panel, *panel["targets"]]
        )
        found += [f"{name}: two queries of one letter"] * (
            len({each["refId"] for each in panel["targets"]}) < len(panel["targets"])
        )
        taken |= cells
    if len({panel["id"] for panel in board["panels"]}) < len(board["panels"]):
        found.append("two panels have one id")
    for name, query in queries(board):
        found += [f"{name}: not of one run"] * ('run="$run"' not in query)
        found += [
            f"{name}: ${each} is no variable"
            for each in re.findall(r"\$(\w+)", query)
            if each not in variables
        ]
        for metric, labels in re.findall(r"ray_(\w+)\{([^}]*)\}", query):
            if metric not in gauges.GAUGES:
                found.append(f"{name}: nothing exports {metric}")
                continue
            tags = {"run", *gauges.GAUGES[metric][1]}
            used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", labels))
            found += [f"{name}: {metric} has no tag {tag}" for tag in used - tags]
    return found


def test_the_dashboard_is_whole():
    board = dashboard()
    assert faults(board) == []
    assert board["uid"] == "lowbit-run"
    assert [each["query"]["query"] for each in board["templating"]["list"][1:]] == [
        "label_values(ray_lowbit_step, run)"
    ]


def test_every_gauge_is_on_the_dashboard():
    asked = {name for _, query in queries(dashboard()) for name in re.findall(r"ray_(lowbit_\w+)", query)}
    assert asked == set(gauges.GAUGES)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda board: board["panels"][3].update(type="graph"), "no panel of type graph"),
        (lambda board: board["panels"][3]["gridPos"].update(x=0), "lies on another panel"),
        (lambda board: board["panels"][7]["gridPos"].update(w=9), "is wider than the page"),
        (lambda board: board["panels"][3].update(targets=[]), "asks nothing"),
        (lambda board: board["panels"][3]["targets"][0].update(datasource={"uid": "x"}), "another source"),
        (lambda board: board["panels"][3]["targets"][0].update(expr="ray_lowbit_loss"), "not of one run"),
        (
            lambda board: board["panels"][3]["targets"][0].update(expr='ray_lowbit_lost{run="$run"}'),
            "nothing exports lowbit_lost",
        ),
        (
            lambda board: board["panels"][3]["targets"][0].update(
                expr='ray_lowbit_loss{run="$run", rank="0"}'
            ),
            "lowbit_loss has no tag rank",
        ),
        (
            lambda board: board["annotations"]["list"][0].update(expr='ray_lowbit_step{run="$run"} > $limit'),
            "$limit is no variable",
        ),
        (lambda board: board["panels"][3].update(id=1), "two panels have one id"),
    ],
)
def test_a_broken_dashboard_is_found_out(change, fault):
    board = copy.deepcopy(dashboard())
    change(board)
    assert any(fault in each for each in faults(board)), faults(board)


def test_the_memory_panels_tell_resident_components_from_others():
    inside = set(re.findall(r'component!~"([^"]*)"', DASHBOARD.read_text().replace('\\"', '"')))
    assert inside == {"transient|activations"}
    assert set(COMPONENTS) >= {"transient", "activations"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("broken", [False, True])
def test_promtool_understands_every_query(broken, tmp_path):
    rules = [
        {"record": f"query:{i}", "expr": query.replace("$run", "some-run")}
        for i, (_, query) in enumerate(queries(dashboard()))
    ]
    if broken:
        rules[3]["expr"] = rules[3]["expr"].replace("max by (run) (", "max by (run (")
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True)
    assert (checked.returncode != 0) == broken, checked.stdout + checked.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_configuration_of_prometheus():
    command = ["promtool", "check", "config", str(MONITORING / "prometheus.yml")]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_provisioning_names_what_is_there():
    source = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    provider = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/lowbit.yaml").read_text())
    assert [each["type"] for each in source["datasources"]] == ["prometheus"]
    assert [each["type"] for each in provider["providers"]] == ["file"]
    assert os.access(MONITORING / "up.sh", os.X_OK)


# ------------------------------------------------------------------ with Ray


def fill(config):
    """A run's folder as its workers write it."""
    config.run_dir.mkdir(exist_ok=True)
    (config.run_dir / "latest").write_text("step-20")
    pen = Record(config.run_dir, step=0, writes=True)
    pen.log(10, {"loss": 99.0, "val_loss": 99.0}, {})
    numbers = {key: 10.0 + i for i, key in enumerate(gauges.ROW)}
    pen.log(20, numbers, {"model.layers.0.mlp.up_proj.weight": {"flip_rate": 0.125, "entropy": 1.5}})
    components = {name: 1000 + i for i, name in enumerate(COMPONENTS)}
    plan = {"components": {name: {"bytes": n_bytes} for name, n_bytes in components.items()}}
    (config.run_dir / BASELINES).write_text(json.dumps({"plan_dense": plan, "plan_bitnet": plan}))
    for reason in ("begin", "resume", "restart", "restart"):
        heartbeat.note_start(config.run_dir, reason)
    (config.run_dir / heartbeat.FOLDER).mkdir(exist_ok=True)
    for rank in (0, 1, 2):  # the last one was killed in the start before, and went further
        start, step = (4, 25 - rank) if rank < 2 else (3, 57)
        worker = {
            "rank": rank, "host": f"host{rank}", "start": start, "step": step, "step_seconds": 0.25,
            "time": time.time(), "memory": components,
        }  # fmt: skip
        (config.run_dir / heartbeat.FOLDER / f"{rank}.json").write_text(json.dumps(worker))


def test_a_worker_that_has_measured_nothing_yet_has_its_step_alone(tmp_path):
    config = configfile.from_dict({"run": {"name": "told", "dir": str(tmp_path)}, "data": {"path": "data"}})
    assert gauges.Gauges(config).read() == {
        ("lowbit_steps", ()): 300, ("lowbit_restarts", ()): 0, ("lowbit_resumes", ()): 0,
    }  # fmt: skip
    beats = heartbeat.Heartbeat(config.run_dir, rank=0, start=1)
    host = socket.gethostname()
    values = gauges.Gauges(config).read()
    beats.close()
    assert values == {
        ("lowbit_steps", ()): 300, ("lowbit_restarts", ()): 0, ("lowbit_resumes", ()): 0,
        ("lowbit_workers", ()): 1, ("lowbit_step", ()): 0, ("lowbit_worker_step", ("0", host)): 0,
    }  # fmt: skip


def fetch(url):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


def exported(port):
    """`ray_lowbit_*` at a metrics port: (name, our tags) -> value."""
    found = {}
    for line in fetch(f"http://127.0.0.1:{port}/metrics").splitlines():
        if match := re.fullmatch(r"ray_(lowbit_\w+)\{(.*)\} (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            tags = tuple(labels[tag] for tag in ("run", *gauges.GAUGES[match[1]][1]))
            found[match[1], *tags] = float(match[3])
    return found


def waited_for(look, *, seconds=40.0, otherwise=lambda: None):
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"it did not come in time: {otherwise()}"
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def ray_port():
    """The metrics port of a Ray session that exports each second."""
    from lowbit_dist.cluster import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        patch.delenv("RAY_ADDRESS", raising=False)
        # Not this process's own, whose folders a launch removes.
        with session.ray_session(os.getppid(), print):
            import ray

            yield ray.nodes()[0]["MetricsExportPort"]


@pytest.fixture(scope="module")
def process(ray_port, tmp_path_factory):
    """A process of Ray that exports the gauges of a run."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # it cannot import this file

    class Process:
        """As the process that talks to Ray does, all the time that a run is launched."""

        def begin(self, configuration):
            gauges.SECONDS = 0.3
            self.exported = gauges.exported(configfile.from_dict(configuration))
            self.exported.__enter__()

        def end(self):
            self.exported.__exit__(None, None, None)

    folder = tmp_path_factory.mktemp("runs")
    configuration = {"run": {"name": "told", "dir": str(folder)}, "data": {"path": "data"}}
    fill(configfile.from_dict(configuration))
    actor = ray.remote(num_cpus=0)(Process).remote()
    ray.get(actor.begin.remote(configuration))
    return actor


def test_every_gauge_is_exported_with_its_value(ray_port, process):
    found = waited_for(lambda: len(exported(ray_port)) >= 36 and exported(ray_port))
    assert {name for name, *_ in found} == set(gauges.GAUGES), "each gauge is told of by a file"
    for i, name in enumerate(gauges.ROW.values()):
        assert found[name, "told"] == 10.0 + i
    expected = {
        ("lowbit_step", "told"): 25.0,
        ("lowbit_steps", "told"): 300.0,
        ("lowbit_workers", "told"): 2.0,
        ("lowbit_restarts", "told"): 2.0,
        ("lowbit_resumes", "told"): 1.0,
        ("lowbit_checkpoint_step", "told"): 20.0,
        ("lowbit_worker_step", "told", "0", "host0"): 25.0,
        ("lowbit_worker_step", "told", "1", "host1"): 24.0,
        ("lowbit_worker_step_seconds", "told", "1", "host1"): 0.25,
        ("lowbit_layer_flip_rate", "told", "layers.0.mlp.up_proj"): 0.125,
        ("lowbit_memory_bytes", "told", "1", "gradients"): 1003.0,
        ("lowbit_baseline_bytes", "told", "AdamW fp32", "buffers"): 1005.0,
    }
    assert {key: found.get(key) for key in expected} == expected


def test_an_age_grows_and_nothing_is_forgotten_between_log_steps(ray_port, process):
    key = ("lowbit_checkpoint_age_seconds", "told")
    first = waited_for(lambda: exported(ray_port).get(key))
    time.sleep(5)  # more than the two intervals after which Ray forgets
    later = exported(ray_port)
    assert later[key] > first + 3
    assert later["lowbit_loss", "told"] == 11.0


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_every_query_of_the_dashboard_finds_its_data(ray_port, process, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    configuration = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (job,) = configuration["scrape_configs"]
    targets = tmp_path / "targets.json"
    targets.write_text(json.dumps([{"targets": [f"127.0.0.1:{ray_port}"]}]))
    job["file_sd_configs"][0]["files"] = [str(targets)]
    configuration["global"]["scrape_interval"] = "1s"
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    process = subprocess.Popen(
        ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
         f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"],
    )  # fmt: skip

    def ask(query):
        words = urllib.parse.quote(query.replace("$run", "told"))
        try:
            return json.loads(fetch(f"http://127.0.0.1:{port}/api/v1/query?query={words}"))["data"]["result"]
        except OSError:  # it is starting
            return []

    def without_data():
        return [name for name, query in queries(dashboard()) if not ask(query)]

    try:
        waited_for(lambda: without_data() == [*MARKS], otherwise=without_data)
    finally:
        process.terminate()
        process.wait()


def test_what_has_ended_is_forgotten(ray_port, process):
    import ray

    ray.get(process.end.remote())
    waited_for(lambda: not exported(ray_port))
