"""What others wrote is read, never run: no file of a run, of data or of a model executes or escapes."""

import ast
import gzip
import hashlib
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import lowbit_dist
from lowbit_dist import checkpoint, configfile, data, documents
from lowbit_dist.checkpoint import Checkpoint
from lowbit_dist.cli import inspection
from lowbit_dist.config import ConfigError, Data

SEQ = 64
STEAL = "!!python/object/apply:os.system ['touch stolen']"
ESCAPES = (
    "../shard-00000.safetensors",
    "../step-1/shard-00000.safetensors",
    "../../../stolen",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/../shard-00000.safetensors",
    "shard-00000.safetensors/../manifest.json",
    "shard-00000.safetensors\n",
    "shard-00000.pkl",
)


class Bomb:
    """Unpickled, it makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def train(configuration):
    from lowbit_dist import loop as training

    training.run(configfile.from_dict(configuration))


@pytest.fixture(scope="module")
def trained(corpus, ranks, tmp_path_factory):
    """The folder of a run of two workers with checkpoints at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("runs")
    configuration = {
        "run": {"name": "small", "dir": str(folder)},
        "model": {"hidden_size": 256, "intermediate_size": 256, "layers": 1, "heads": 4, "kv_heads": 2},
        "method": {"name": "dqt"},
        "data": {"path": str(corpus), "seq_len": SEQ},
        "precision": "fp32",
        "train": {"steps": 2, "batch_tokens": 256, "micro_batch": 2, "save_every": 1, "eval_samples": 4},
        "tracking": {"mlflow": None},
    }
    ranks(2).run(train, configuration)
    return folder / "small"


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "small"))


@pytest.fixture
def prepared(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(corpus, tmp_path / "data"))


def paths(folder):
    return {path for path in folder.rglob("*") if "cache" not in path.parts}


def payloads(fired):
    """A pickle as it is, and inside PyTorch's own archive."""
    archive = io.BytesIO()
    torch.save(Bomb(fired), archive)
    return pickle.dumps(Bomb(fired)), archive.getvalue()


def hashed_again(folder):
    """Sums that fit, as whoever wrote the files can make them: the readers themselves must refuse."""
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    lines = (f"{digest}  {name}\n" for name, digest in sums.items() if name != checkpoint.SUMS)
    (folder / checkpoint.SUMS).write_text("".join(lines))


# --- checkpoints ------------------------------------------------------------------------------------------


def test_the_payloads_would_execute(tmp_path):
    """What the other tests wait for in vain does happen where pickles are read."""
    for k, payload in enumerate(payloads(tmp_path / "fired")):
        if k:
            torch.load(io.BytesIO(payload), weights_only=False)
        else:
            pickle.loads(payload)
        (tmp_path / "fired").unlink()


def read_all(opened):
    for name in opened.names:
        opened.tensor(name)
    return opened.digest(), opened.components()


READERS = {
    "resume": lambda folder: checkpoint.latest(folder.parent.parent),
    "resolve": lambda folder: checkpoint.resolve(folder.parent.parent),
    "open": Checkpoint.open,
    "load": lambda folder: read_all(Checkpoint.open(folder)),
    "verify": lambda folder: Checkpoint.open(folder).verify(),
    "inspect": lambda folder: inspection.inspect(str(folder), verify=False),
    "inspect --verify": lambda folder: inspection.inspect(str(folder), verify=True),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_in_any_file_of_a_checkpoint_executes_nothing(reader, run, tmp_path):
    folder, fired = run / "checkpoints" / "step-2", tmp_path / "fired"
    names = sorted(file.name for file in folder.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) == 2
    assert {checkpoint.MANIFEST, checkpoint.SUMS} < set(names)
    before = {name: (folder / name).read_bytes() for name in names}
    beside = ["shard-00002.safetensors", "optimizer.pt", "data.pkl", "__init__.py"]
    for name in [*names, *beside]:
        for payload in payloads(fired):
            for sums_fit in (False, True):
                (folder / name).write_bytes(payload)
                if sums_fit and name != checkpoint.SUMS:
                    hashed_again(folder)
                try:
                    READERS[reader](folder)
                except ConfigError as error:
                    assert len(str(error).splitlines()) == 1
                except Exception as error:
                    # Whatever the parser says, as long as it says it of a shard.
                    assert name in shards and reader == "load", error
                for each, content in before.items():
                    (folder / each).write_bytes(content)
                if name not in before:
                    (folder / name).unlink()
                assert not fired.exists(), (name, reader)
    assert checkpoint.latest(run) == folder


@pytest.mark.parametrize("verb", ["eval", "generate", "inspect"])
def test_a_pickle_for_a_shard_is_answered_by_the_verbs_in_one_line(verb, run, corpus, tmp_path, lowbit):
    folder, fired = run / "checkpoints" / "step-2", tmp_path / "fired"
    arguments = {"eval": ["--data", corpus], "generate": ["--prompt", "x"], "inspect": []}[verb]
    for sums_fit in (False, True):
        (folder / "shard-00001.safetensors").write_bytes(pickle.dumps(Bomb(fired)))
        if sums_fit:
            hashed_again(folder)
        done = lowbit(verb, folder, *arguments)
        if verb == "inspect":  # which answers with what is wrong
            assert done.returncode == 1
            assert "shard-00001.safetensors" in " ".join(done.stdout.split())
        else:
            assert done.returncode == 2, done.stderr
            (line,) = done.stderr.splitlines()
            assert "step-2" in line and "name another checkpoint" in line
            assert sums_fit or "shard-00001.safetensors" in line
        assert not fired.exists()


@pytest.mark.parametrize("name", ESCAPES)
def test_a_checkpoint_that_names_files_elsewhere_is_refused(name, run, tmp_path):
    folder = run / "checkpoints" / "step-2"
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    shard = manifest["files"].pop("shard-00001.safetensors")
    manifest["files"][name] = shard
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    hashed_again(folder)
    before = paths(tmp_path)
    for reader in ("open", "load", "verify", "inspect", "inspect --verify"):
        with pytest.raises(ConfigError, match="no shard of a checkpoint") as error:
            READERS[reader](folder)
        assert len(str(error.value).splitlines()) == 1
    assert checkpoint.latest(run).name == "step-1"
    assert paths(tmp_path) == before


MANIFESTS = {
    "a list": lambda content: [],
    "nested": lambda content: None,
    "no position": lambda content: {key: each for key, each in content.items() if key != "step"},
    "words for numbers": lambda content: content | {"step": "two"},
    "files that are a list": lambda content: content | {"files": ["shard-00000.safetensors"]},
    "tensors of no shape": lambda content: content | {"tensors": {"a": {"shape": [-1], "grid": None}}},
    "tensors of no grid": lambda content: content | {"tensors": {"a": {"shape": [1], "grid": "os"}}},
    "no configuration": lambda content: content | {"config": None},
}


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_manifest_that_is_none_is_refused_in_one_line(change, run):
    folder = run / "checkpoints" / "step-2"
    file = folder / checkpoint.MANIFEST
    content = MANIFESTS[change](json.loads(file.read_text()))
    file.write_text("[" * 100_000 if content is None else json.dumps(content))
    hashed_again(folder)
    with pytest.raises(ConfigError, match="name another checkpoint") as error:
        Checkpoint.open(folder)
    assert len(str(error.value).splitlines()) == 1
    assert checkpoint.latest(run).name == "step-1"


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "step-2/../../../x", "\0", "x" * 10_000])
def test_a_latest_that_leads_elsewhere_is_not_followed(name, run, tmp_path):
    from lowbit_dist.cluster.checks import newest_checkpoint

    shutil.copytree(run / "checkpoints" / "step-1", tmp_path / "elsewhere")
    (run / "latest").write_text(name)
    assert newest_checkpoint(run).name == "step-2"
    assert checkpoint.resolve(run).name == "step-2"


# --- configurations ---------------------------------------------------------------------------------------


def test_yaml_that_asks_for_objects_executes_nothing_wherever_it_stands(run, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = paths(tmp_path)
    good = f"run: {{dir: {tmp_path}}}\ndata: {{path: {prepared}, seq_len: {SEQ}}}\n"
    file = tmp_path / "run.yaml"

    def refused(text, *overrides):
        file.write_text(text)
        with pytest.raises(ConfigError) as error:
            configfile.load(file, overrides)
        file.unlink()
        assert len(str(error.value).splitlines()) == 1

    refused(STEAL)
    refused(good + f"train: {STEAL}\n")
    refused(good + f"train: {{steps: {STEAL}}}\n")
    refused(good + f"{STEAL}: 1\n")
    refused(
        f"%TAG !p! tag:yaml.org,2002:python/\n---\n{good}train: !p!object/apply:os.system [touch stolen]\n"
    )
    refused(good, f"train.steps={STEAL}")
    refused(good, f"train={STEAL}")
    # A run's own copy of its configuration.
    (run / "config.yaml").write_text(good + f"train: {STEAL}\n")
    with pytest.raises(ConfigError):
        configfile.load(run / "config.yaml")
    # Metadata of data and tokenizer.
    for name in ("manifest.json", "train/index.json", "tokenizer/tokenizer.model"):
        whole = (prepared / name).read_bytes()
        (prepared / name).write_text(STEAL)
        config = configfile.from_dict({"data": {"path": str(prepared), "seq_len": SEQ}})
        with pytest.raises(ConfigError) as error:
            data.check(config)
        assert len(str(error.value).splitlines()) == 1
        (prepared / name).write_bytes(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # copied, never read here
        (prepared / "tokenizer" / name).write_text(STEAL)
        data.check(config)
    assert paths(tmp_path) == before


# --- prepared data ----------------------------------------------------------------------------------------


def reindexed(folder, change):
    """Another index for the training split, with the manifest that fits it."""
    file = folder / "train" / "index.json"
    index = json.loads(file.read_text())
    for shard in index["shards"]:
        change(shard)
    file.write_text(json.dumps(index))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["index_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused_data(folder, match):
    config = configfile.from_dict({"data": {"path": str(folder), "seq_len": SEQ}})
    for read in (
        lambda: data.check(config),
        lambda: data.Batches(Data(path=str(folder), seq_len=SEQ), "train", 0).micro_batch(0, 1),
        lambda: data.Batches(Data(path=f"file://{folder}", seq_len=SEQ), "train", 0).micro_batch(0, 1),
    ):
        with pytest.raises(ConfigError, match=match) as error:
            read()
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["raw_data", "zip_data"])
@pytest.mark.parametrize(
    "name",
    [
        "../../stolen.mds",
        "/tmp/stolen.mds",
        "..",
        "index.json",
        "shard.00000.mds/../../../stolen",
        ".hidden",
        7,
    ],
)
def test_an_index_that_names_files_elsewhere_is_refused_and_nothing_is_written(
    kind, name, prepared, tmp_path
):
    before = paths(tmp_path)
    reindexed(prepared, lambda shard: shard[kind].update(basename=name))
    refused_data(prepared, "index.json")
    assert paths(tmp_path) == before
    cached = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert cached <= {"index.json", "index.json.lock"}


@pytest.mark.parametrize(
    "change",
    [
        lambda shard: shard.update(column_encodings=["pkl"]),
        lambda shard: shard.update(column_names=["tokens", "more"], column_encodings=["ndarray", "pkl"]),
        lambda shard: shard.update(format="json"),
        lambda shard: shard.update(raw_data=None),
        lambda shard: shard.update(samples="many"),
        lambda shard: shard["raw_data"].update(hashes={}),
        lambda shard: shard.clear(),
    ],
)
def test_an_index_of_other_content_is_refused(change, prepared, tmp_path):
    reindexed(prepared, change)
    refused_data(prepared, "index.json")


@pytest.mark.parametrize("missing", ["column_sizes", "size_limit", "compression", "hashes"])
def test_an_index_that_lacks_what_its_reader_needs_is_refused(missing, prepared):
    reindexed(prepared, lambda shard: shard.pop(missing))
    with pytest.raises(ConfigError, match=r"train/index\.json is damaged"):
        data.Batches(Data(path=str(prepared), seq_len=SEQ), "train", 0)


def test_a_shard_of_pickles_executes_nothing(prepared, tmp_path):
    """Streaming's own encoding `pkl`, in a shard whose hashes are right."""
    from streaming import MDSWriter

    fired = tmp_path / "fired"
    shutil.rmtree(prepared / "train")

    with MDSWriter(
        columns={"tokens": "pkl"},
        out=str(prepared / "train"),
        hashes=["sha256", data.manifest.HASH],
    ) as writer:
        writer.write({"tokens": Bomb(fired)})
    reindexed(prepared, lambda shard: None)
    refused_data(prepared, "pkl")
    assert not fired.exists()


def test_a_manifest_whose_splits_lead_elsewhere_is_refused(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    for name in ("../train", "/etc", "train/../../x"):
        splits = {name: manifest["splits"]["train"], "val": manifest["splits"]["val"]}
        (prepared / "manifest.json").write_text(json.dumps(manifest | {"splits": splits}))
        refused_data(prepared, "splits train, val")


# --- text and models --------------------------------------------------------------------------------------


def test_an_archive_is_no_text_and_its_members_are_not_unpacked(tmp_path):
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        member = tarfile.TarInfo("../../stolen.txt")
        member.size = 6
        archive.addfile(member, io.BytesIO(b"stolen"))
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("../../stolen.txt", "stolen")
    (folder / "a.tar").write_bytes(tar.getvalue())
    (folder / "a.tar.gz").write_bytes(gzip.compress(tar.getvalue()))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(tar.getvalue()))
    before = paths(tmp_path)
    for name in ("a.zip", "a.tar", "a.tar.gz", "b.jsonl.gz"):
        with pytest.raises(ConfigError, match=name) as error:
            list(documents.read(documents.parts([folder / name])))
        assert len(str(error.value).splitlines()) == 1
    assert paths(tmp_path) == before


def test_the_name_that_gzip_keeps_of_a_file_is_not_used(tmp_path):
    file = tmp_path / "in" / "a.jsonl.gz"
    file.parent.mkdir()
    with file.open("wb") as raw, gzip.GzipFile("../../stolen.jsonl", "wb", fileobj=raw) as zipped:
        zipped.write(b'{"text": "words"}\n')
    assert b"stolen" in file.read_bytes()
    assert list(documents.read(documents.parts([file]))) == ["words"]
    assert paths(tmp_path) == {file, file.parent}


def test_the_code_that_a_pretrained_folder_brings_is_not_run(tmp_path, monkeypatch):
    from lowbit_dist import model
    from lowbit_dist.config import Model

    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'stolen')!r}, 'w')\nclass Evil: pass\n")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}})
    )
    with pytest.raises(
        ConfigError, match=r"model\.pretrained .* is not a Hugging Face model folder"
    ) as error:
        model.hf_config(Model(pretrained=folder), 512)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "stolen").exists()


FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "tarfile", "zipfile"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "shutil.unpack_archive",
    "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
}  # fmt: skip


def test_nothing_in_the_package_unpickles_unpacks_or_evaluates():
    sources = list(Path(lowbit_dist.__file__).parent.rglob("*.py"))
    assert len(sources) > 40
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            # A launch talks to the process that it starts through a socket that nobody else has.
            allowed = {"cloudpickle"} if path.parent.name == "cluster" else set()
            assert not {name.split(".")[0] for name in names} & FORBIDDEN_MODULES - allowed, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"{path} line {node.lineno}"
