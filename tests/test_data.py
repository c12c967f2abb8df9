"""Token data: the same bytes for any number of workers, an order that is a pure function, mistakes named."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit_dist import configfile, data, documents, tokenizer
from lowbit_dist.config import ConfigError, Data, RunConfig
from lowbit_dist.data import reading, shards, tokenizing, writing

SEQ = 32  # tokens of a sample
SHARD = 8192  # bytes: small, so that there are many


def config(path, **train) -> RunConfig:
    sections = {
        "method": {"name": "dense"},
        "data": {"path": str(path), "seq_len": SEQ},
        "train": {"batch_tokens": 16 * SEQ, **train},
    }
    return configfile.from_dict(sections)


def texts() -> list[str]:
    """400 documents of awkward lengths, with some that are equal, empty, or of several bytes a character."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(1, 9))) for _ in range(300)] + [
        "ß漢👍",
        "\n",
        "\t",
    ]
    made = [" ".join(draw.choices(words, k=draw.randrange(1, 400))) for _ in range(380)]
    return [*made, *made[:18], "", ""]


@pytest.fixture(scope="module")
def small():
    """Parts and shards so small that a small corpus has many of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents.text, "PART", 1 << 16)
        patch.setattr(shards, "SHARD_BYTES", SHARD)
        yield


@pytest.fixture(scope="module")
def ray(small):
    import ray

    with contextlib.ExitStack() as session:
        if not ray.is_initialized():
            session.enter_context(tokenizing._started_ray(None, 2))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return file


@pytest.fixture(scope="module")
def words(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "out"
    tokenizer.train([corpus], 500, folder)
    return folder


@pytest.fixture(scope="module")
def prepared(ray, corpus, words, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "two"
    data.prepare([corpus], words, out, seq_len=SEQ, workers=2, val_fraction=0.1)
    return out


@pytest.fixture
def copied(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "copied"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reading, "BACKOFF", 0.0)


def everything(path, split: str) -> torch.Tensor:
    """All samples in the order of the data."""
    batches = data.Batches(Data(path=str(path), seq_len=SEQ), split, 0)
    batches.order = data.Order(batches.order.sizes, None)
    return batches.micro_batch(0, batches.n_samples)


# --- the order of samples ---------------------------------------------------------------------------------

SIZES = [37, 40, 40, 5, 40, 1, 40, 40, 40, 40, 13]
PINNED = [[152, 271, 157, 147, 66, 73, 58, 264], [97, 88, 107, 24, 3, 29, 6, 15]]


def test_each_epoch_is_a_permutation_of_its_own():
    order = data.Order(SIZES, seed=7, window=3)
    n = sum(SIZES)
    epochs = [order.indices(epoch * n, n) for epoch in range(4)]
    for indices in epochs:
        assert np.array_equal(np.sort(indices), np.arange(n))
    epochs += [np.arange(n), data.Order(SIZES, seed=8, window=3).indices(0, n)]
    for k, indices in enumerate(epochs):
        for other in epochs[:k]:
            assert (indices == other).mean() < 0.1, "each epoch and each seed has its own order"


def test_the_order_is_the_same_for_any_number_of_workers_and_after_any_restart():
    n = 3 * sum(SIZES)
    whole = data.Order(SIZES, seed=7, window=3).indices(0, n)
    for n_workers in (1, 2, 3, 5):
        orders = [data.Order(SIZES, seed=7, window=3) for _ in range(n_workers)]
        found = np.concatenate([orders[s // 4 % n_workers].indices(s, min(4, n - s)) for s in range(0, n, 4)])
        assert np.array_equal(found, whole)
    draw = random.Random(0)
    order = data.Order(SIZES, seed=7, window=3)
    for _ in range(100):
        first = draw.randrange(n - 50)
        assert np.array_equal(order.indices(first, 50), whole[first : first + 50])


def test_samples_are_shuffled_inside_a_window_of_shards():
    order = data.Order(SIZES, seed=7, window=3)
    n, ends = sum(SIZES), np.cumsum(SIZES)
    shards = np.searchsorted(ends, order.indices(0, n), side="right")
    permuted, borders = order.shards(0)
    assert sorted(permuted) == list(range(len(SIZES)))
    assert len(borders) == 4
    for k, (begin, end) in enumerate(zip(borders, [*borders[1:], n], strict=True)):
        assert set(shards[begin:end]) == set(permuted[3 * k : 3 * k + 3])
        assert (np.diff(shards[begin:end]) != 0).sum() > 10, "the shards of a window must be mixed"


def test_the_order_never_changes_between_versions():
    """A run that goes on with a newer version must read on where it stopped."""
    order = data.Order(SIZES, seed=7, window=3)
    assert order.indices(0, 8).tolist() == PINNED[0]
    assert order.indices(10_000, 8).tolist() == PINNED[1]


def test_validation_has_the_natural_order():
    n = sum(SIZES)
    assert np.array_equal(data.Order(SIZES, seed=None).indices(n - 3, 6), [n - 3, n - 2, n - 1, 0, 1, 2])


# --- preparing and reading --------------------------------------------------------------------------------


def test_one_worker_writes_the_bytes_that_two_write_and_says_nothing_on_stdout(
    prepared, corpus, words, tmp_path, capfd
):
    manifest = data.prepare([corpus], words, tmp_path / "one", seq_len=SEQ, workers=1, val_fraction=0.1)
    assert capfd.readouterr().out == ""
    files = sorted(file.relative_to(prepared) for file in prepared.rglob("*") if file.is_file())
    assert len(files) > 20, "the case must have many shards"
    assert files == sorted(
        file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file()
    )
    for file in files:
        assert (prepared / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file
    assert data.read_manifest(prepared) == data.Manifest.model_validate(manifest)


def test_samples_are_the_documents_between_marks_and_equal_documents_are_on_one_side(prepared, words):
    code = tokenizer.load(words)
    expected = {"train": [], "val": []}
    for text in filter(None, texts()):
        place = hashlib.blake2b(text.encode(), digest_size=8, key=(0).to_bytes(8, "little")).digest()
        expected["val" if int.from_bytes(place, "little") < 0.1 * 2**64 else "train"].append(text)
    manifest = data.read_manifest(prepared)
    counts = {}
    for split, chosen in expected.items():
        stream = [token for text in chosen for token in (1, *code.encode(text), 2)]
        n = len(stream) // SEQ
        found = everything(prepared, split)
        assert found.dtype == torch.int64
        assert torch.equal(found, torch.tensor(stream[: n * SEQ]).reshape(n, SEQ))
        said = manifest.splits[split]
        assert (said.samples, said.tokens, said.dropped_tokens) == (n, n * SEQ, len(stream) - n * SEQ)
        assert (said.documents, said.bytes) == (len(chosen), sum(len(text.encode()) for text in chosen))
        counts[split] = np.bincount(found.ravel(), minlength=code.vocab_size)
    assert not set(expected["train"]) & set(expected["val"])
    assert min(map(len, expected.values())) > 20, "the case must have documents on both sides"
    chance = (counts["train"] + 1) / (counts["train"] + 1).sum()
    entropy = -(counts["val"] * np.log(chance)).sum() / counts["val"].sum()
    assert manifest.unigram_entropy == pytest.approx(entropy, rel=1e-12)
    assert (manifest.empty_documents, manifest.dtype, manifest.vocab_size) == (2, "uint16", 500)
    assert manifest.used == np.flatnonzero(counts["train"] + counts["val"])[-1] + 1
    older = manifest.model_copy(update={"largest_token": None})
    assert older.used == 500


def test_a_micro_batch_is_the_samples_that_the_order_names(prepared):
    whole = everything(prepared, "train")
    batches = data.Batches(Data(path=str(prepared), seq_len=SEQ), "train", 5)
    n = batches.n_samples
    assert n == data.read_manifest(prepared).splits["train"].samples
    assert len(batches.order.sizes) > 2 * reading.WINDOW, "the case must have several windows"
    for first in (0, 13, n - 3, 2 * n + 100):
        expected = whole[torch.from_numpy(batches.order.indices(first, 7))]
        assert torch.equal(batches.micro_batch(first, 7), expected)
    assert not torch.equal(batches.micro_batch(0, 7), whole[:7])
    with pytest.raises(ValueError, match="first_sample"):
        batches.micro_batch(-1, 7)


def test_vocabularies_beyond_16_bits_are_written_in_32(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 70_000, 50 * SEQ, np.int32)
    writer = shards.Writer(tmp_path, 70_000, SEQ, 0.5)
    places = np.array([0, 1 << 63], np.uint64)
    lengths = np.array([20 * SEQ, 30 * SEQ], np.int32)
    sizes, prompts = np.array([100, 200]), np.array([0, 0], np.int32)
    row = {"tokens": tokens, "lengths": lengths, "prompts": prompts, "sizes": sizes, "places": places}
    writer.add({name: each.tobytes() for name, each in row.items()} | {"n_empty": 0})
    said = writer.finish()
    assert said["dtype"] == "uint32"
    from streaming.base.format.mds.reader import MDSReader

    shard = json.loads((tmp_path / "train" / "index.json").read_bytes())["shards"][0]
    assert shard["column_encodings"] == [f"ndarray:uint32:{SEQ}"]
    zipped = (tmp_path / "train" / shard["zip_data"]["basename"]).read_bytes()
    from streaming.base.compression import decompress

    (tmp_path / "train" / shard["raw_data"]["basename"]).write_bytes(decompress("zstd", zipped))
    reader = MDSReader.from_json(str(tmp_path), "train", shard)
    found = np.concatenate([reader[k]["tokens"] for k in range(reader.samples)])
    assert np.array_equal(found, tokens[20 * SEQ :])


def test_few_documents_are_divided_by_their_lowest_places(ray, words, tmp_path):
    """Of three documents, two per cent is none; but a run needs something to validate on."""
    for k in range(3):
        (tmp_path / f"{k}.txt").write_text(texts()[3 * k + 1] + " and more" * 40)
    manifest = data.prepare([tmp_path / f"{k}.txt" for k in range(3)], words, tmp_path / "out", seq_len=SEQ)
    assert (manifest["splits"]["train"]["documents"], manifest["splits"]["val"]["documents"]) == (2, 1)
    (tmp_path / "short.txt").write_text("some words, and no more")
    with pytest.raises(ConfigError, match="too few"):
        data.prepare([tmp_path / "short.txt"], words, tmp_path / "other", seq_len=SEQ)
    assert not (tmp_path / "other").exists()


def test_the_same_preparation_is_not_repeated_and_another_is_not_written_over_it(
    prepared, corpus, words, tmp_path, monkeypatch
):
    def must_not_run(*_):
        raise AssertionError("prepared twice")

    monkeypatch.setattr(tokenizing, "tokenised", must_not_run)
    before = data.read_manifest(prepared)
    again = data.prepare([corpus], words, prepared, seq_len=SEQ, workers=1, val_fraction=0.1)
    assert data.Manifest.model_validate(again) == before
    for changed in ({"seq_len": 64}, {"val_fraction": 0.2}, {"seed": 1}):
        with pytest.raises(ConfigError, match=f"prepared otherwise .{next(iter(changed))}"):
            data.prepare([corpus], words, prepared, **{"seq_len": SEQ, "val_fraction": 0.1} | changed)
    same_path = tmp_path / "folder"
    same_path.mkdir()
    (same_path / "keep.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not prepared data"):
        data.prepare([corpus], words, same_path, seq_len=SEQ)
    assert (same_path / "keep.txt").read_text() == "mine"
    assert data.read_manifest(prepared) == before


@pytest.mark.parametrize(
    ("failure", "seen"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), RuntimeError),
        (ConfigError("a mistake"), ConfigError),
    ],
)
def test_an_interrupted_preparation_leaves_nothing(ray, corpus, words, tmp_path, monkeypatch, failure, seen):
    n_chunks = 0
    add = shards.Writer.add

    def interrupted(self, row):
        nonlocal n_chunks
        n_chunks += 1
        add(self, row)
        if n_chunks == 3:
            raise failure

    monkeypatch.setattr(shards, "HELD_TOKENS", 100)  # so that shards are written before the failure
    monkeypatch.setattr(shards.Writer, "add", interrupted)
    with pytest.raises(seen):
        data.prepare([corpus], words, tmp_path / "out", seq_len=SEQ)
    assert n_chunks == 3
    assert not [left for left in tmp_path.iterdir() if left.name != "cache"]


def test_what_a_killed_preparation_left_is_not_read_and_is_cleared(ray, corpus, words, prepared, tmp_path):
    left = Path(shutil.copytree(prepared, tmp_path / ".out.partial"))
    (left / "manifest.json").unlink()
    (left / "train" / "shard.09999.mds.zstd").write_bytes(b"half")
    with pytest.raises(ConfigError, match="incomplete"):
        data.read_manifest(left)
    with pytest.raises(ConfigError, match="does not exist"):
        data.read_manifest(tmp_path / "out")
    descriptor = os.open(left, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process"):
        data.prepare([corpus], words, tmp_path / "out", seq_len=SEQ)
    assert (left / "train" / "shard.09999.mds.zstd").exists(), "a living process's files are not touched"
    os.close(descriptor)
    data.prepare([corpus], words, tmp_path / "out", seq_len=SEQ, val_fraction=0.1)
    assert not left.exists()
    assert not (tmp_path / "out" / "train" / "shard.09999.mds.zstd").exists()
    assert torch.equal(everything(tmp_path / "out", "train"), everything(prepared, "train"))


KILLS = """
import os, shutil, signal, sys
from pathlib import Path
import streaming
from lowbit_dist import data, documents, files, tokenizer
from lowbit_dist.config import ConfigError
from lowbit_dist.data import shards, tokenizing

corpus, words, out, reference = map(Path, sys.argv[1:])
documents.text.PART, shards.SHARD_BYTES, shards.HELD_TOKENS = 1 << 16, 8192, 50_000
loaded = tokenizer.load(words)
tokenizing._loaded[loaded.sha256] = loaded
rows = [
    {name: column[0] for name, column in row.items()}
    for bundle in tokenizing._bundles(documents.parts([corpus]))
    for row in tokenizing._tokenise({"parts": [bundle]}, None, loaded.sha256, 0)
]
tokenizing.tokenised = lambda *_: iter(rows)  # without Ray, whose start takes seconds
files.sync = lambda path: None  # a killed process loses nothing that it wrote; this is for speed
counted = out.parent.with_name("counted")


def prepare(last):
    "In a process that kills itself before its `last`-th change in the folder; how it ended."
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    n = 0

    def watch(event, about):
        nonlocal n
        writes = event == "open" and (about[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")) and str(
            out.parent
        ) in str(about[0]):
            n += 1
            if n == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    data.prepare([corpus], words, out, seq_len=32, val_fraction=0.1)
    counted.write_text(str(n))
    os._exit(0)


def content(folder):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def is_half(folder):
    try:
        data.read_manifest(folder)
    except ConfigError:
        return False
    return content(folder) != expected


expected = content(reference)
assert prepare(0) == 0
n = int(counted.read_text())
moments = sorted({*range(1, n, max(1, n // 6)), *range(n - 5, n + 1)})
for moment in moments:
    shutil.rmtree(out)
    assert prepare(moment) == signal.SIGKILL, moment
    assert not is_half(out) and not is_half(out.with_name(".out.partial")), moment
    assert not out.exists(), moment
    assert prepare(0) == 0, moment
    assert content(out) == expected, moment
    assert os.listdir(out.parent) == ["out"], moment
print(n, len(moments))
"""


@pytest.mark.slow
def test_a_preparation_killed_at_any_moment_is_never_read_and_started_again_cleanly(
    prepared, corpus, words, tmp_path
):
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, "-c", KILLS, corpus, words, folder / "out", prepared]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    n_changes, n_moments = map(int, done.stdout.split())
    assert n_changes > 40, "the case must have many moments"
    assert n_moments > 10


def test_nothing_of_a_killed_preparation_goes_on_and_nothing_of_it_blocks_the_next(
    ray, corpus, words, prepared, tmp_path
):
    """With Ray's real processes, at the moment that one of them works."""
    import psutil

    arguments = ["--input", corpus, "--tokenizer", words, "--out", tmp_path / "out", "--seq-len", SEQ]
    lowbit = Path(sys.executable).with_name("lowbit")
    killed = subprocess.Popen(
        list(map(str, [lowbit, "data", "prepare", *arguments, "--workers", 1])),
        env={**os.environ, "RAY_ADDRESS": ""},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def is_alive(process):
        try:
            return process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    started: dict[int, psutil.Process] = {}
    try:
        for _ in range(1200):
            for child in psutil.Process(killed.pid).children(recursive=True):
                started[child.pid] = child
            names = []
            for child in started.values():
                with contextlib.suppress(psutil.Error):
                    names.append(" ".join(child.cmdline()))
            if any(name.startswith("ray::") and "IDLE" not in name for name in names):
                break
            assert killed.poll() is None, "the preparation must be killed before its end"
            time.sleep(0.05)
        assert any("raylet" in name for name in names)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    with pytest.raises(ConfigError, match="does not exist"):
        data.read_manifest(tmp_path / "out")
    data.prepare([corpus], words, tmp_path / "out", seq_len=SEQ, val_fraction=0.1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]
    for file in (file for file in prepared.rglob("*") if file.is_file()):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(prepared)).read_bytes(), file
    deadline = time.monotonic() + 30
    while left := [child for child in started.values() if is_alive(child)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_mistake_in_the_inputs_is_one_line_from_any_worker(ray, words, tmp_path, monkeypatch):
    for module, name in ((documents, "_probe"), (writing, "_longest_document")):
        monkeypatch.setattr(module, name, lambda *_: None)  # it would find the mistake first
    lines = [json.dumps({"text": text}) for text in texts()]
    lines[333] = '{"txt": "misspelt"}'
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"bad\.jsonl line 334 has no text in a field 'text'.*txt") as error:
        data.prepare([tmp_path / "bad.jsonl"], words, tmp_path / "out", seq_len=SEQ)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# --- several processes, damage, remote folders ------------------------------------------------------------

READER = """
import hashlib, sys
from lowbit_dist.config import Data
from lowbit_dist.data import Batches
batches = Batches(Data(path=sys.argv[1], seq_len=32), "train", 5)
digest = hashlib.sha256()
for first in range(0, batches.n_samples, 64):
    digest.update(batches.micro_batch(first, 64).numpy().tobytes())
print(digest.hexdigest())
"""


def test_processes_of_a_host_read_the_same_from_one_cold_cache(prepared, tmp_path):
    """Under a launcher's variables, and with what a killed process left in the cache."""
    from lowbit_dist.data.manifest import MANIFEST

    batches = data.Batches(Data(path=str(prepared), seq_len=SEQ, cache=tmp_path / "own"), "train", 5)
    digest = hashlib.sha256()
    for first in range(0, batches.n_samples, 64):
        digest.update(batches.micro_batch(first, 64).numpy().tobytes())
    name = hashlib.sha256((prepared / MANIFEST).read_bytes()).hexdigest()[:16]
    folder = tmp_path / "cache" / "lowbit-dist" / "data" / name / "train"
    folder.mkdir(parents=True)
    (folder / ".draft.shard.00000.mds").write_bytes(b"half")
    (folder / "shard.00001.mds").write_bytes(b"damaged")
    (folder / "shard.00002.mds.lock").touch()
    shared_memory = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    launcher = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(prepared)],
            env={**os.environ, **launcher, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for reader in readers:
        assert reader.communicate(timeout=200)[0].strip() == digest.hexdigest()
    assert not [file for file in folder.iterdir() if file.suffix not in (".mds", ".lock")]
    assert not list(folder.glob(".draft*"))
    if shared_memory:
        assert not {name for name in set(os.listdir("/dev/shm")) - shared_memory if name.startswith("0")}


DIES = """
import fcntl, os, signal, sys
for name in sys.argv[1:]:
    lock = open(name, "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    globals()[name] = lock
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_shared_memory_and_locks_of_a_dead_run_disturb_neither_preparing_nor_reading(
    ray, prepared, corpus, words, tmp_path
):
    """Blocks by the names that MosaicML Streaming gives its own, of another size and with other content."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm to leave anything in")
    from streaming.base import constant

    kinds = [*constant.SHM_TO_CLEAN, constant.BARRIER_FILELOCK, constant.CACHE_FILELOCK]
    names = [f"{number:06}_{kind}" for number in range(3) for kind in kinds] + ["sem.mp-stale"]
    stale = [Path("/dev/shm", name) for name in names]
    stale = [file for file in stale if not file.exists()]
    cache = tmp_path / "cache" / "lowbit-dist" / "data"
    cache /= hashlib.sha256((prepared / "manifest.json").read_bytes()).hexdigest()[:16]
    folders = [cache / split for split in ("train", "val")] + [tmp_path / ".out.partial"]
    locks = []
    for folder in folders:
        folder.mkdir(parents=True)
        locks += [folder / "index.json.lock", folder / "shard.00000.mds.lock"]
    died = subprocess.run([sys.executable, "-c", DIES, *map(str, locks)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert all(lock.exists() for lock in locks)
    try:
        for file in stale:
            file.write_bytes(b"of a dead run")
        data.prepare([corpus], words, tmp_path / "out", seq_len=SEQ, val_fraction=0.1)
        for split in ("train", "val"):
            assert torch.equal(everything(tmp_path / "out", split), everything(prepared, split))
        batches = data.Batches(Data(path=f"file://{prepared}", seq_len=SEQ), "train", 5)
        assert batches.micro_batch(0, 20).shape == (20, SEQ)
        assert all(file.read_bytes() == b"of a dead run" for file in stale)
    finally:
        for file in stale:
            file.unlink(missing_ok=True)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_shard_is_named_and_never_read(copied):
    damage(copied / "train" / "shard.00003.mds.zstd")
    data.check(config(copied))
    for path, fetches in ((str(copied), ""), (f"file://{copied}", "after 4 fetches")):
        with pytest.raises(RuntimeError, match=rf"train/shard\.00003\.mds\.zstd is damaged.*{fetches}"):
            everything(path, "train")
        assert everything(path, "val").numel()


def test_a_remote_folder_is_read_through_the_cache_and_a_damaged_fetch_is_repeated(
    prepared, copied, tmp_path, monkeypatch
):
    """The third repetition helps; a fourth is not made."""
    fetches: dict[str, int] = {}
    download = reading.download

    def unreliable(url, file):
        fetches[url] = fetches.get(url, 0) + 1
        download(url, file)
        if url.endswith("shard.00002.mds.zstd") and fetches[url] < 4:
            damage(file)

    expected = everything(prepared, "train")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(reading, "download", unreliable)
    monkeypatch.setattr(reading._Shards, "fetch_ahead", lambda *_: None)  # it would fetch, too
    assert torch.equal(everything(f"file://{copied}", "train"), expected)
    damaged = f"file://{copied}/train/shard.00002.mds.zstd"
    assert fetches[damaged] == 4
    assert all(n == 1 for url, n in fetches.items() if url != damaged)
    shutil.rmtree(copied / "train")
    (copied / "train").mkdir()
    shutil.copy(prepared / "train" / "index.json", copied / "train")
    assert torch.equal(everything(f"file://{copied}", "train"), expected), (
        "the second reading is from the cache"
    )
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(RuntimeError, match=r"train/shard\.00000\.mds\.zstd cannot be read"):
        everything(str(copied), "train")
    with pytest.raises(ConfigError, match="must be a folder, file:// or one of"):
        data.read_manifest("gopher://host/data")


def test_the_shards_of_this_window_and_the_next_are_fetched_ahead(prepared, tmp_path):
    batches = data.Batches(Data(path=f"file://{prepared}", seq_len=SEQ), "train", 5)
    batches.micro_batch(0, 1)
    folder = batches._shards.folder
    wanted = {f"shard.{k:05}.mds" for k in batches.order.shards(0)[0][: 2 * reading.WINDOW]}
    for _ in range(300):
        if wanted <= {file.name for file in folder.iterdir()}:
            break
        time.sleep(0.1)
    assert {file.name for file in folder.glob("*.mds")} == wanted
    assert len(wanted) < len(batches.order.sizes)


def test_reading_goes_on_when_the_cache_is_cleared(prepared, tmp_path):
    batches = data.Batches(Data(path=str(prepared), seq_len=SEQ), "train", 5)
    before = batches.micro_batch(0, 50)
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(batches.micro_batch(0, 50), before)


# --- mistakes ---------------------------------------------------------------------------------------------


def rewrite(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def other_tokenizer(folder: Path) -> None:
    (folder / "text.txt").write_text("other words " * 50)
    tokenizer.train([folder / "text.txt"], 270, folder / "new")
    shutil.copy(folder / "new" / "tokenizer.model", folder / "tokenizer" / "tokenizer.model")


MISTAKES = {
    "is missing": (shutil.rmtree, "does not exist"),
    "is empty": (lambda at: [shutil.rmtree(at), at.mkdir()], "has no manifest.json"),
    "is a file": (lambda at: [shutil.rmtree(at), at.write_text("")], "is a file"),
    "is incomplete": (lambda at: (at / "manifest.json").unlink(), "incomplete"),
    "manifest is empty": (lambda at: (at / "manifest.json").write_text(""), "damaged"),
    "manifest is cut": (lambda at: os.truncate(at / "manifest.json", 100), "damaged"),
    "manifest is binary": (lambda at: (at / "manifest.json").write_bytes(b"\xff\0"), "damaged"),
    "manifest is a list": (lambda at: (at / "manifest.json").write_text("[]"), "damaged"),
    "manifest is nested": (lambda at: (at / "manifest.json").write_text("[" * 100_000), "damaged"),
    "manifest lacks fields": (lambda at: (at / "manifest.json").write_text('{"format": 1}'), "damaged"),
    "manifest lacks a split": (lambda at: rewrite(at / "manifest.json", splits={}), "splits train, val"),
    "manifest is of the future": (lambda at: rewrite(at / "manifest.json", format=2), "format 2"),
    "samples are longer": (lambda at: rewrite(at / "manifest.json", seq_len=64), r"\(32\) must be 64"),
    "shard is missing": (lambda at: (at / "train/shard.00001.mds.zstd").unlink(), "lacks train/shard.00001"),
    "shard is cut": (lambda at: os.truncate(at / "val/shard.00000.mds.zstd", 100), "has 100 bytes and must"),
    "index is missing": (lambda at: (at / "val/index.json").unlink(), "lacks val/index.json"),
    "index is damaged": (lambda at: damage(at / "train/index.json"), "train/index.json is damaged"),
    "tokenizer is missing": (lambda at: shutil.rmtree(at / "tokenizer"), "tokenizer"),
    "tokenizer is another": (other_tokenizer, "not the one its shards"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_prepared_data_that_is_wrong_is_refused_before_a_worker_starts(copied, mistake):
    make, answer = MISTAKES[mistake]
    data.check(config(copied))
    make(copied)
    with pytest.raises(ConfigError, match=answer) as error:
        data.check(config(copied))
    assert "\n" not in str(error.value)


def test_another_tokenizer_and_a_batch_larger_than_the_data_are_refused(prepared, words, tmp_path):
    asked = config(prepared)
    assert data.check(asked.model_copy(update={"data": asked.data.model_copy(update={"tokenizer": words})}))
    (tmp_path / "text.txt").write_text("other words " * 50)
    tokenizer.train([tmp_path / "text.txt"], 270, tmp_path / "other")
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"tokenizer": tmp_path / "other"})})
    with pytest.raises(ConfigError, match="is not the one that"):
        data.check(asked)
    n = data.read_manifest(prepared).splits["train"].samples
    with pytest.raises(ConfigError, match=f"write at most {n * SEQ:,}"):
        data.check(config(prepared, batch_tokens=(n // 16 + 1) * 16 * SEQ))


@pytest.mark.parametrize(
    ("changed", "answer"),
    [
        ({"seq_len": 1}, "--seq-len"),
        ({"val_fraction": 0.0}, "--val-fraction"),
        ({"val_fraction": float("nan")}, "--val-fraction"),
        ({"workers": 0}, "--workers"),
        ({"seed": -1}, "--seed"),
        ({"out_dir": "s3://bucket/data"}, "folder on this machine"),
        ({"tokenizer_dir": "nowhere"}, "tokenizer .nowhere. does not exist"),
        ({"inputs": []}, "--input is required"),
        ({"inputs": ["nowhere.txt"]}, "does not exist"),
        ({"inputs": ["s3://bucket/text"]}, "must be on this machine"),
        ({"inputs": ["hf:"]}, "hf:NAME"),
    ],
)
def test_wrong_arguments_of_prepare_are_refused(corpus, words, tmp_path, changed, answer):
    arguments = {"inputs": [corpus], "tokenizer_dir": words, "out_dir": tmp_path / "out"} | changed
    with pytest.raises(ConfigError, match=answer) as error:
        data.prepare(**arguments)
    assert "\n" not in str(error.value)
