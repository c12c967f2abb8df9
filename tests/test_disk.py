"""Full disks: a small tmpfs that fills up and is freed again.  Nothing is lost, and the words are clear."""

import contextlib
import json
import logging
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from preparing import prepare_alone
from tracked import Tracked, configuration

from lowbit_dist import data, tokenizer, tracking
from lowbit_dist.cluster.following import Follower
from lowbit_dist.config import Data, RunConfig
from lowbit_dist.data import reading, shards
from lowbit_dist.record import METRICS
from lowbit_dist.tracking import feeder


class Disk:
    """A file system of its own, of a given size."""

    def __init__(self, folder: Path):
        self.folder = folder

    def fill(self) -> None:
        with (self.folder / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            for size in (1 << 16, 1 << 12):
                with contextlib.suppress(OSError):
                    while filler.write(bytes(size)) == size:
                        pass
        assert shutil.disk_usage(self.folder).free == 0, "the disk must be full"

    def free(self) -> None:
        (self.folder / "filler").unlink()

    def grow(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    """`disk("2m")`: a new disk of that size."""
    made: list[Path] = []

    def make(size: str) -> Disk:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a tmpfs cannot be mounted here: {getattr(error, 'stderr', None) or error}")
        made.append(folder)
        return Disk(folder)

    yield make
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def until(condition, what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


# --- tracking ---------------------------------------------------------------------------------------------

WIDE = {f"train/part{i}": 1.0 for i in range(60)}  # makes a row longer than a kilobyte


def config(folder: Path, uri: str | None = None) -> RunConfig:
    return configuration(uri, folder, "full")


def log(tracker: Tracked, steps) -> None:
    """As the loop does; a step of the loop waits for none of it."""
    for step in steps:
        began = time.monotonic()
        tracker.log(step, {"loss": 1.0 / step, "tokens": 10 * step, **WIDE})
        assert time.monotonic() - began < 1.0, "training must not wait for a full disk"


def written(folder: Path) -> list[int]:
    """The steps of the file, every line of which must be whole."""
    content = (folder / "full" / METRICS).read_text()
    assert content == "" or content.endswith("\n")
    return [json.loads(line)["step"] for line in content.splitlines()]


class Told:
    def __init__(self):
        self.steps = []

    def say(self, text):
        pass

    def row(self, row):
        self.steps.append(row["step"])


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(autouse=True)
def listening(caplog):
    with caplog.at_level(logging.WARNING, logger="lowbit_dist"):
        yield


def test_rows_wait_in_memory_while_the_disk_is_full_and_are_then_written_once_and_in_order(disk, caplog):
    small = disk("256k")
    run = config(small.folder)
    told = Told()
    tracker = Tracked(run)
    follower = Follower(run.run_dir, told)
    log(tracker, range(1, 10))
    follower.read()
    small.fill()
    for step in range(10, 40):
        log(tracker, [step])
        follower.read()
        assert written(small.folder) == list(range(1, len(written(small.folder)) + 1))
    assert 9 <= len(written(small.folder)) < 20, "the case must leave rows in memory"
    assert len(warnings(caplog)) == 1
    assert f"{run.run_dir}/metrics.jsonl cannot be written (No space left on device)" in warnings(caplog)[0]
    small.free()
    log(tracker, [40])
    follower.read()
    assert written(small.folder) == told.steps == list(range(1, 41))
    assert warnings(caplog)[1:] == [
        f"{run.run_dir}/metrics.jsonl is written again, with every row that waited"
    ]
    tracker.finish("FINISHED")
    assert len(warnings(caplog)) == 2
    assert (run.run_dir / "loss.png").stat().st_size > 1000
    assert not list(run.run_dir.glob(".draft*"))


def test_a_run_that_ends_on_a_full_disk_says_what_its_file_lacks_and_goes_on_later(disk, caplog):
    small = disk("256k")
    run = config(small.folder)
    (run.run_dir / "loss.png").write_bytes(b"an earlier picture")
    tracker = Tracked(run)
    log(tracker, range(1, 10))
    small.fill()
    log(tracker, range(10, 20))
    tracker.finish("FAILED")
    n = len(written(small.folder))
    assert n < 19, "the case must leave rows in memory"
    assert (run.run_dir / "loss.png").read_bytes() == b"an earlier picture"
    assert not list(run.run_dir.glob(".draft*"))
    assert warnings(caplog)[1:] == [
        f"{run.run_dir}/metrics.jsonl lacks the last {19 - n} rows, from step {n + 1} on: it could not be "
        "written (No space left on device); they are lost",
        f"{run.run_dir}/loss.png is not drawn (No space left on device)",
    ]
    # The disk is still full: what is measured again is cut all the same.
    again = Tracked(run, 5)
    assert written(small.folder) == [1, 2, 3, 4, 5]
    small.free()
    log(again, range(6, 20))
    again.finish("FINISHED")
    assert written(small.folder) == list(range(1, 20))


def test_a_run_that_goes_back_on_a_full_disk_keeps_the_rows_before(disk, caplog):
    small = disk("256k")
    tracker = Tracked(config(small.folder))
    log(tracker, range(1, 10))
    small.fill()
    log(tracker, range(10, 30))
    assert len(written(small.folder)) < 25, "the case must leave rows in memory, before and after step 25"
    tracker.rewind(25)
    small.free()
    log(tracker, [26, 27])
    assert written(small.folder) == list(range(1, 28))
    small.fill()
    log(tracker, range(28, 50))
    tracker.rewind(5)
    assert written(small.folder) == [1, 2, 3, 4, 5]
    small.free()
    log(tracker, [6])
    tracker.close()
    assert written(small.folder) == [1, 2, 3, 4, 5, 6]
    assert not any("lacks" in words for words in warnings(caplog))


@pytest.fixture(scope="module")
def new_store(tmp_path_factory):
    """A database of MLflow's without runs: its migrations take long."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracker = Tracked(config(file.parent, f"sqlite:///{file}"))
    log(tracker, [1])
    tracker.finish("FINISHED")
    return file


def sent(file: Path, run_id: str, key: str = "train/loss") -> list[int]:
    """The steps that MLflow has, read without MLflow; the database must be sound."""
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
        rows = database.execute("select step from metrics where run_uuid = ? and key = ?", (run_id, key))
        return sorted(step for (step,) in rows)


def test_mlflows_database_on_a_full_disk_stops_nothing_and_gets_every_row_when_there_is_room(
    disk, new_store, tmp_path, caplog, capfd
):
    small = disk("4m")
    file = shutil.copy(new_store, small.folder)
    run = config(tmp_path, f"sqlite:///{file}")
    tracker = Tracked(run)
    log(tracker, range(1, 4))
    run_id = tracker.began()
    until(lambda: sent(file, run_id) == [1, 2, 3], "the first rows never arrived")
    small.fill()
    log(tracker, range(4, 60))
    until(lambda: warnings(caplog), "the full disk was never reported")
    log(tracker, range(60, 100))
    assert written(tmp_path) == list(range(1, 100))
    assert len(sent(file, run_id)) < 99, "the case must leave rows unsent"
    small.free()
    until(lambda: sent(file, run_id) == list(range(1, 100)), "the rows never arrived")
    tracker.finish("FINISHED")
    assert sent(file, run_id, "train/part59") == list(range(1, 100))
    assert len(warnings(caplog)) == 1
    assert "database or disk is full" in warnings(caplog)[0]
    assert "\n" not in warnings(caplog)[0]
    assert "Traceback" not in capfd.readouterr().err
    from mlflow.tracking import MlflowClient

    assert MlflowClient(f"sqlite:///{file}").get_run(run_id).info.status == "FINISHED"


def test_rows_that_mlflows_full_disk_never_took_are_sent_when_the_run_is_resumed(
    disk, new_store, tmp_path, caplog
):
    small = disk("4m")
    file = shutil.copy(new_store, small.folder)
    run = config(tmp_path, f"sqlite:///{file}")
    first = Tracked(run)
    log(first, [1])
    run_id = first.began()
    small.fill()
    log(first, range(2, 100))
    began = time.monotonic()
    first.finish("FINISHED")
    assert time.monotonic() - began < feeder.FLUSH_SECONDS, "the end must not wait for a full disk"
    assert written(tmp_path) == list(range(1, 100))
    assert sent(file, run_id) != written(tmp_path), "the case must leave rows unsent"
    assert "did not get all of the run; when the run is started again, it gets" in warnings(caplog)[-1]
    small.free()
    second = Tracked(run, 99)
    second.finish("FINISHED")
    assert second.run_id == run_id
    assert sent(file, run_id) == list(range(1, 100))


def test_room_that_comes_back_just_before_the_end_is_used(disk, new_store, tmp_path, caplog):
    small = disk("4m")
    file = shutil.copy(new_store, small.folder)
    tracker = Tracked(config(tmp_path, f"sqlite:///{file}"))
    log(tracker, [1])
    run_id = tracker.began()
    small.fill()
    log(tracker, range(2, 100))
    until(lambda: warnings(caplog), "the full disk was never reported")
    time.sleep(1.5)  # the thread now pauses for seconds before it tries again
    small.free()
    tracker.finish("FINISHED")
    assert sent(file, run_id) == list(range(1, 100))
    assert len(warnings(caplog)) == 1


def test_rows_that_a_full_folder_holds_up_reach_mlflow_when_there_is_room(disk, new_store, tmp_path, caplog):
    small = disk("256k")
    file = shutil.copy(new_store, tmp_path)
    run = config(small.folder, f"sqlite:///{file}")
    tracker = Tracked(run)
    log(tracker, range(1, 5))
    small.fill()
    log(tracker, range(5, 20))
    n = len(written(small.folder))
    assert n < 19, "the case must leave rows in memory"
    run_id = tracker.began()
    until(lambda: sent(file, run_id) == list(range(1, n + 1)), "the rows of the file never arrived")
    assert any(".mlflow_run_id cannot be written yet" in words for words in warnings(caplog))
    small.free()
    log(tracker, [20])
    until(lambda: sent(file, run_id) == list(range(1, 21)), "the rows never arrived")
    tracker.finish("FINISHED")
    assert (run.run_dir / tracking.RUN_ID).read_text() == run_id
    again = Tracked(run, 20)
    assert again.run_id == run_id
    again.finish("FINISHED")


@pytest.mark.parametrize("size", ["100k", "500k"])
def test_a_new_database_that_found_no_room_is_made_when_there_is_some(disk, tmp_path, caplog, size):
    small = disk(size)
    file = small.folder / "mlflow.db"
    tracker = Tracked(config(tmp_path, f"sqlite:///{file}"))
    log(tracker, [1, 2])
    until(lambda: warnings(caplog), "the full disk was never reported")
    assert tracker.run_id is None
    assert len(warnings(caplog)) == 1
    until(lambda: os.listdir(small.folder) == ["mlflow.db.lock"], "a half-made database must go")
    assert shutil.disk_usage(small.folder).used == 0, "no file that was given up holds on to space"
    small.grow("8m")
    until(lambda: tracker.run_id and sent(file, tracker.run_id) == [1, 2], "the rows never arrived")
    tracker.finish("FINISHED")
    assert sorted(os.listdir(small.folder)) == ["mlartifacts", "mlflow.db", "mlflow.db.lock"]


def test_a_database_whose_making_was_killed_does_not_block_the_next_run(tmp_path):
    for name in ("mlflow.db.draft", "mlflow.db.draft-journal"):
        (tmp_path / name).write_bytes(b"half")
    file = tmp_path / "mlflow.db"
    tracker = Tracked(config(tmp_path, f"sqlite:///{file}"))
    log(tracker, [1])
    tracker.finish("FINISHED")
    assert sent(file, tracker.run_id) == [1]
    assert not list(tmp_path.glob("*draft*"))


# --- data -------------------------------------------------------------------------------------------------

SEQ = 32


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    file = tmp_path_factory.mktemp("documents") / "corpus.jsonl"
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(1, 9))) for _ in range(300)]
    texts = (" ".join(draw.choices(words, k=draw.randrange(1, 200))) for _ in range(100))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="module")
def words(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "out"
    tokenizer.train([documents], 300, folder)
    return folder


@pytest.fixture(scope="module")
def prepare(documents, words):
    """`prepare(out)`: in shards of 4 kB, without Ray's processes: they write nothing to the disk of `out`."""

    def prepare(out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "SHARD_BYTES", 4096)
            return prepare_alone([documents], words, out, seq_len=SEQ, val_fraction=0.1)

    return prepare


@pytest.fixture(scope="module")
def prepared(prepare, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(out)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def pages(*folders: Path) -> int:
    """The pages of a tmpfs that the files take."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return sum(-(-file.stat().st_size // 4096) for file in files)


def test_a_preparation_that_fills_the_disk_at_any_place_leaves_it_empty_and_says_what_it_needs(
    disk, prepare, prepared
):
    small = disk("4k")
    out = small.folder / "out"
    places, needs = set(), set()
    n_pages = pages(prepared)
    for size in range(1, n_pages + 1):
        small.grow(f"{4 * size}k")
        try:
            prepare(out)
            break
        except RuntimeError as error:
            places |= {frame.name for frame in traceback.extract_tb(error.__cause__.__traceback__)}
            words = str(error)
        assert words.startswith(
            f"the disk of {small.folder} is full, and what was written of {out} is removed"
        )
        assert words.endswith("MB are free; free space there, or write another --out, and start again") or (
            "it needs more space than there is" in words
        )
        needs |= {float(number[1]) for number in re.finditer(r"needs about ([\d.]+) MB", words)}
        assert os.listdir(small.folder) == []
        assert shutil.disk_usage(small.folder).used == 0
    assert size >= n_pages - 2, "the case must fail in the last phase"
    assert places >= {"_copy_tokenizer", "add", "finish", "_write_manifest"}
    assert content(out) == content(prepared)
    assert os.listdir(small.folder) == ["out"]
    tokens = sum(
        split["tokens"] for split in json.loads((out / "manifest.json").read_text())["splits"].values()
    )
    assert needs and all(2 * tokens / 1e6 - 0.05 <= number <= 4 * tokens / 1e6 + 0.05 for number in needs)


def test_a_tokenizer_that_fills_the_disk_at_any_place_leaves_it_empty(disk, documents, words, monkeypatch):
    model = tokenizer.load(words).files["tokenizer.model"]
    monkeypatch.setattr(tokenizer, "_learn", lambda *_: model)
    small = disk("4k")
    out = small.folder / "out"
    n_pages = pages(words)
    for size in range(1, n_pages + 1):
        small.grow(f"{4 * size}k")
        try:
            tokenizer.train([documents], 300, out)
            break
        except RuntimeError as error:
            assert str(error).startswith(f"the disk of {small.folder} is full, and what was written of {out}")
        assert os.listdir(small.folder) == []
    assert n_pages - 2 <= size > 4, "the case must fail in each file"
    assert content(out) == content(words)


def test_a_full_disk_is_one_line_and_exit_code_1(disk, documents, words):
    small = disk("16k")
    command = ["data", "prepare", "--input", documents, "--tokenizer", words, "--out", small.folder / "out"]
    lowbit = Path(sys.executable).with_name("lowbit")
    done = subprocess.run([lowbit, *map(str, command)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert f"the disk of {small.folder} is full" in done.stderr
    assert os.listdir(small.folder) == []


@pytest.mark.parametrize("remote", [False, True])
def test_a_cache_without_room_is_named_and_used_again_when_there_is_some(
    disk, prepared, tmp_path, monkeypatch, remote
):
    monkeypatch.setattr(reading, "BACKOFF", 0.0)
    monkeypatch.setattr(reading._Shards, "fetch_ahead", lambda *_: None)  # it would write, too

    def read(cache):
        path = f"file://{prepared}" if remote else str(prepared)
        batches = data.Batches(Data(path=path, seq_len=SEQ, cache=cache), "train", 0)
        return batches.micro_batch(0, batches.n_samples)

    expected = read(tmp_path / "cache")
    small = disk("4k")
    n_pages = pages(tmp_path / "cache")
    for size in range(1, n_pages + 2):
        small.grow(f"{4 * size}k")
        try:
            found = read(small.folder)
            break
        except RuntimeError as error:
            words = str(error)
        assert re.fullmatch(
            rf"the cache {small.folder}/\S+ cannot be written: No space left on device; free space there, or "
            r"write another folder as data\.cache", words,
        ), words  # fmt: skip
        left = {file.suffix for file in small.folder.rglob("*") if file.is_file()}
        assert left <= {".mds", ".lock", ".json"}, "nothing half-made may stay"
    assert size > 5, "the case must fail at several shards"
    assert torch.equal(found, expected)


# --- checkpoints ------------------------------------------------------------------------------------------


def train_while_the_disk_is_full(configuration, folder, *, first, last):
    """`train`, with a full disk under the saves of steps `first` to `last`.

    On worker 0: the summary, the checkpoints that were there in the worst moment, and what was warned of.
    """
    from test_train import train

    from lowbit_dist import checkpoint

    disk, warned, seen = Disk(Path(folder)), [], []
    save = checkpoint.Saver.save
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())

    def save_on_full_disk(saver, shards, position):
        if saver.rank == 0 and position.step == first:
            saver.wait()
            disk.fill()
        save(saver, shards, position)
        if saver.rank == 0 and position.step == last:
            saver.wait()
            run_dir = saver.config.run_dir
            seen.extend(sorted(path.name for path in (run_dir / "checkpoints").iterdir()))
            seen.append(checkpoint.latest(run_dir).name)
            disk.free()

    checkpoint.Saver.save = save_on_full_disk
    logging.getLogger("lowbit_dist.checkpoint").addHandler(handler)
    try:
        return train(configuration), seen, warned
    except RuntimeError as error:
        return str(error), seen, warned
    finally:
        checkpoint.Saver.save = save
        logging.getLogger("lowbit_dist.checkpoint").removeHandler(handler)


def test_a_save_on_a_full_disk_costs_that_checkpoint_alone(ranks, small, disk):
    full = disk("64m")
    sections = {"train": {"steps": 12, "save_every": 2, "eval_every": 12, "keep_last": 2}}
    healthy = ranks(2).run(_train, small(run={"name": "healthy"}, **sections))[0]
    run = {"name": "full", "dir": str(full.folder)}
    found, seen, warned = ranks(2).run(
        train_while_the_disk_is_full, small(run=run, **sections), str(full.folder), first=6, last=8
    )[0]
    assert seen == ["step-2", "step-4", "step-4"]
    assert [text.split(";")[0] for text in warned if "CHECKPOINT" in text] == [
        f"CHECKPOINT NOT SAVED: step {step} (worker 0: No space left on device)" for step in (6, 8)
    ]
    assert found["digest"] == healthy["digest"]
    assert sorted(path.name for path in (full.folder / "full" / "checkpoints").iterdir()) == [
        "step-10", "step-12"
    ]  # fmt: skip


def test_a_last_checkpoint_that_cannot_be_saved_is_an_error_and_the_run_goes_on_later(ranks, small, disk):
    full = disk("64m")
    sections = {"train": {"steps": 8, "save_every": 2, "eval_every": 8, "keep_last": 2}}
    healthy = ranks(1).run(_train, small(run={"name": "healthy"}, **sections))[0]
    configuration = small(run={"name": "full", "dir": str(full.folder)}, **sections)
    answer, seen, _ = ranks(1).run(
        train_while_the_disk_is_full, configuration, str(full.folder), first=8, last=8
    )[0]
    assert answer.startswith(
        "the checkpoint of step 8 could not be saved (worker 0: No space left on device)"
    )
    assert seen == ["step-4", "step-6", "step-6"]
    assert ranks(1).run(_train, configuration)[0]["digest"] == healthy["digest"]


def _train(configuration):
    from test_train import train

    return train(configuration)
