"""What is seen while something goes on: bars and waits in a terminal of 80 columns, plain lines elsewhere."""

import fcntl
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from io import StringIO

import pytest
from rich.console import Console
from terminals import Screen

from lowbit_dist import compare, configfile
from lowbit_dist.cli import comparing, console, lines, progress, tables
from lowbit_dist.memory import report

ROW = {
    "loss": 4.6, "val_loss": 3.5, "tokens_per_second": 12345.0, "flip_rate": 0.0125,
    "tokens_per_second_per_worker": 6172.5, "mfu": 0.3125,
    "resident_bytes": 17_000_000, "skipped_steps": 1, "rollbacks": 2, "restarts": 3, "resumes": 1,
}  # fmt: skip


def run(small, name, steps):
    return configfile.from_dict(small(run={"name": name}, train={"steps": steps}))


def terminal(width=80):
    return Console(width=width, file=StringIO(), force_terminal=True, color_system=None)


def shown(bars, screen):
    """The lines of bars as they are now."""
    before = screen.file.tell()
    screen.print(bars.get_renderable())
    return screen.file.getvalue()[before:].splitlines()


# ------------------------------------------------------------------ a line with a bar


@pytest.mark.parametrize("width", [12, 20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("name", ["a", "quickstart", "n" * 100])
@pytest.mark.parametrize("step", ["3/40", "123456/1000000"])
def test_a_line_fits_and_keeps_its_bar_and_step(width, name, step):
    words = {"loss": "loss 4.600", "val": "val 3.500", "rate": "12,345 tokens/s", "left": "1:00:52 left"}
    text = "".join(piece for piece, _ in lines.with_bar(name, 0.5, step, words, width))
    least = 1 + 1 + lines.LEAST_BAR + 1 + len(step)
    assert len(text) <= max(width, least)
    assert f" {step}" in text
    assert text.count("━") == lines.BAR if width >= 60 else text.count("━") >= lines.LEAST_BAR


def test_words_are_left_out_in_their_order_of_importance(small):
    words = progress.in_words({"step": 20, **ROW}, run(small, "quickstart", 40))
    assert list(words.values()) == [
        "loss 4.600", "val 3.500", "12,345 tokens/s", "0:00 left", "6,172/worker", "MFU 31.2%",
        "flips 1.25%", "state 17 MB/worker", "1 skipped", "2 rollbacks", "3 restarts", "1 resume",
    ]  # fmt: skip
    assert set(words) <= set(lines.WORDS)
    seen = []
    for width in range(200, 40, -1):
        text = "".join(piece for piece, _ in lines.with_bar("quickstart", 0.5, "20/40", words, width))
        kept = [key for key, word in words.items() if word in text]
        if not seen or kept != seen[-1]:
            seen.append(kept)
    assert [len(kept) for kept in seen] == list(range(len(words), -1, -1)), "one after another"
    gone = [*({*before} - {*after} for before, after in itertools.pairwise(seen))]
    order = [key for (key,) in gone]
    assert order == [key for key in reversed(lines.WORDS) if key in words]
    assert order[-3:] == ["rate", "left", "loss"]


def test_a_wait_is_cut_and_not_left_out():
    pieces = lines.with_bar("quickstart", 0, "0/300", {}, 60, wait="⠋ 0:12 starting Ray on this machine")
    text = "".join(piece for piece, _ in pieces)
    assert len(text) <= 60
    assert text.endswith(" 0/300  ⠋ 0:12 starting …")


# ------------------------------------------------------------------ a run's bar


def test_a_bar_in_eighty_columns_keeps_step_loss_and_time_left(small):
    screen = terminal()
    bar = progress.Bar(run(small, "quickstart", 300), screen)
    bar.row({"step": 120, **ROW})
    (line,) = shown(bar.progress, screen)
    assert len(line) < 80
    assert line.startswith("quickstart ━━━━━━━━━━━━━━━━━━━━━━━━ 120/300  loss 4.600")
    assert " left" in line
    assert "MB" not in line, "it does not fit"
    wide = terminal(200)
    bar = progress.Bar(run(small, "quickstart", 300), wide)
    bar.row({"step": 120, **ROW})
    assert "state 17 MB/worker" in shown(bar.progress, wide)[0]


def test_a_bar_says_what_is_waited_for_until_the_first_row(small, monkeypatch):
    seconds = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds)
    screen = terminal()
    bar = progress.Bar(run(small, "quickstart", 40), screen)

    def line():
        (last,) = shown(bar.progress, screen)
        assert len(last) < 80
        assert " ━━━━━━━━━━━━━━━━━━━━━━━━ " in last
        return last

    assert "0:00 checking" in line()
    for event, word in (
        ("starting Ray on this machine, in /tmp/x: /dev/shm is small", "starting Ray on this machine"),
        ("Ray's dashboard: http://127.0.0.1:8265 (its token: ~/.ray/auth_token)", "starting Ray on this"),
        ("joining Ray at 10.0.0.1:6379", "joining Ray at 10.0.0.1"),
        ("asking 2 machines for packages, data and folders", "asking 2 machines for packages"),
        ("waiting up to 60 s for machines: there are slots for 1 of 2 workers", "waiting up to 60 s"),
        ("starting 2 workers", "starting 2 workers"),
        ("worker 0: resumes from step 20", "making the first steps"),
    ):
        bar.say(event)
        seconds += 12
        assert word in line()
    assert line().startswith("quickstart ━")
    assert "0:12 making" in line()
    bar.row({"step": 22, **ROW})
    assert "22/40  loss 4.600" in line()
    bar.say("worker 1 died (SIGKILL): restart 1 of at most 10")
    assert "loss 4.600" in line()
    bar.say("starting 2 workers")
    assert "starting 2 workers" in line() and "loss" not in line()
    bar.row({"step": 23, **ROW})
    bar.say("SIGINT: stopping after this step, with a checkpoint; again stops at once")
    bar.row({"step": 24, **ROW})
    assert "stopping after this step" in line(), "a checkpoint is being saved"
    bar.row({"step": 40, **ROW})
    assert "finishing" in line()
    bar.close()
    assert "40/40  loss 4.600" in line()


def test_the_bar_of_a_run_that_resumes_begins_at_its_checkpoint(small):
    config = run(small, "quickstart", 40)
    config.run_dir.mkdir()
    (config.run_dir / "latest").write_text("step-20")
    screen = terminal()
    bar = progress.Bar(config, screen)
    assert " 20/40  " in shown(bar.progress, screen)[0]


def test_each_run_of_a_sweep_has_a_line_of_eighty_columns(small):
    class Child:
        name, config = "dqt-ternary-seed0", run(small, "dqt-ternary-seed0", 40)

    class Sweep:
        name, children = "methods", [Child, Child]

    screen = terminal()
    bars = comparing.Bars(Sweep, screen)
    assert "checking" in shown(bars.progress, screen)[0]
    bars.say("methods: 2 runs to do")
    bars.begins(Child)
    whole, child = shown(bars.progress, screen)
    assert "checking" not in whole and "starting" in child
    bars.row(Child, {"step": 20, **ROW})
    whole, child = shown(bars.progress, screen)
    assert max(len(whole), len(child)) < 80
    assert "20/40  loss 4.600" in child
    bars.ends(Child, "finished", "")
    assert shown(bars.progress, screen)[-1].endswith("1/2  1 finished")


# ------------------------------------------------------------------ waits of other verbs


def test_a_wait_has_its_word_its_time_and_where_it_is_known_its_bar(monkeypatch):
    seconds = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: seconds)
    waiting = console.Waiting("preparing")
    seconds += 65
    assert waiting.line(79)[1:] == " 1:05 preparing"
    assert len(waiting.line(8)) == 8
    with waiting.bar(80_000_000) as advance:
        assert "0 B/80 MB" in waiting.line(79)
        seconds += 30
        advance(20_000_000)
        assert waiting.line(79) == f"preparing {'━' * 24} 20 MB/80 MB  1:30 left"
        assert waiting.plain() == "preparing: 25%"
    assert waiting.line(79)[1:] == " 1:35 preparing"
    assert waiting.plain() == "preparing"


def test_where_nobody_watches_a_long_wait_is_one_line_and_a_short_one_none(capsys, monkeypatch):
    monkeypatch.setattr(console, "QUIET", 0.2)
    with console.Waiting("learning"):
        time.sleep(0.7)
    assert capsys.readouterr().err == "lowbit: learning\n"
    with console.Waiting("learning"):
        pass
    with console.Waiting(None):
        time.sleep(0.4)
    assert capsys.readouterr().err == ""


def test_the_lines_of_a_run_take_over_from_the_wait_before_them(small, capsys, monkeypatch):
    monkeypatch.setattr(console, "QUIET", 0.1)
    config = run(small, "quickstart", 40)
    with console.Waiting("loading") as waiting, progress.following(config, waiting) as told:
        time.sleep(0.5)
        told.say("starting Ray on this machine")
        assert not waiting._thread.is_alive()
    assert capsys.readouterr().err == "lowbit: loading\nlowbit: starting Ray on this machine\n"


CODE = """
import sys, time
from lowbit_dist.cli import console
console.SOON = 0.2
with console.answering(False, "loading the model") as answer:
    time.sleep(1.0)
    answer.write("def main():")
    time.sleep(0.5)
    answer.end_line()
"""


def test_in_a_terminal_a_wait_turns_and_is_gone_when_the_answer_comes():
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdin=subprocess.DEVNULL, stdout=far, stderr=far,
        env={**{k: v for k, v in os.environ.items() if k != "COLUMNS"}, "TERM": "xterm"},
    )  # fmt: skip
    os.close(far)
    screen = Screen(near)
    assert process.wait(60) == 0
    screen.join(10)
    os.close(near)
    text = screen.shown.decode()
    turns = re.findall(r"\r(.) 0:0\d loading the model\x1b\[K", text)
    assert len(set(turns)) > 2, text
    assert text.endswith("\r\x1b[Kdef main():\r\n"), "the line is cleared once, before the answer"


# ------------------------------------------------------------------ memory


def memory(workers):
    """Ternary codes of 4,000 weights and 1,000 others, shared among workers."""
    parts = {
        "low_bit_weights": 1000, "scales": 16 * workers, "other_weights": 4000, "gradients": 10_000,
        "optimizer_states": 10_000, "buffers": 80 * workers,
    }  # fmt: skip
    counts = report.Parameters(low_bit=4000, other=1000)
    sizes = {name: n // workers for name, n in parts.items()}
    peak = report.Peak(transient=5000 // workers, activations=10_000 // workers)
    own = report.report(sizes, peak, parameters=counts, workers=workers) | {"states": "int8"}
    saved = ("dense_same_states", "bitnet_ste", "adamw_fp32")
    baselines = {"plan_dense_same_states": own, "plan_bitnet": own}
    return own | baselines | {f"saved_vs_{name}": 0.5 for name in saved}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_bytes_per_parameter_are_those_of_all_workers_on_every_screen(workers):
    from lowbit_dist import charts

    known = memory(workers)
    assert known["components"]["low_bit_weights"]["bytes_per_parameter"] == 0.25
    assert known["components"]["optimizer_states"]["bytes_per_parameter"] == 2.0
    screen = terminal()
    tables.memory_table(screen, known)
    text = screen.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text

    def per_parameter(name):
        cells = re.search(rf"^ ?{name} +" + r"\S+ k?B +(\S+) +" * 2 + r"\S+ k?B +(\S+) *$", text, re.M)
        assert cells, f"{name} is not on one line in:\n{text}"
        return set(cells.groups())

    assert per_parameter("low bit weights") == {"0.250"}
    assert per_parameter("optimizer states") == {"2.000"}
    whole = known["resident_bytes_per_worker"] * workers / 5000
    assert per_parameter("state") == {f"{whole:.3f}"}
    assert per_parameter("peak") == {f"{whole + 3:.3f}"}
    assert sum(charts.of_report(known).values()) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (3.0, ("3.0000 on 24 samples (25.0% below the corpus's unigram entropy)", "perplexity 20.0855")),
        (5.0, ("5.0000 on 24 samples (25.0% above the corpus's unigram entropy)", "perplexity 148.4132")),
        (30.0, ("650.0% above", "perplexity 1.07e+13")),
        (900.0, ("22400.0% above", "perplexity 1.01e+304")),
    ],
)
def test_a_summary_says_on_which_side_of_the_entropy_a_loss_is_and_any_perplexity(loss, words):
    from lowbit_dist.evaluate import quality

    result = {
        "run": "a", "steps": 10, "tokens": 100, "val_loss": loss, "unigram_entropy": 4.0, "val_samples": 24,
        **quality(loss, 4.0),
    }  # fmt: skip
    screen = terminal(120)
    tables.summary(screen, result, None)
    text = " ".join(screen.file.getvalue().split())
    for word in words:
        assert word in text


def test_brackets_in_names_and_paths_are_shown_as_they_are():
    """Rich takes them for its markup: some vanish, others end in an error."""
    screen = terminal(200)
    words = ("data/[v2]/a.jsonl", "[/home]", "pip install 'ray[default]'")
    tables.pairs(screen, dict.fromkeys(("a", "b"), words[0]) | {"c": words[1]})
    tables.jobs(screen, [{"job": words[0], "run": words[1]}])
    finding = {"name": "ray", "status": "error", "found": words[1], "advice": words[2]}
    tables.health(screen, {"checks": [finding], "ok": False})
    text = screen.file.getvalue()
    assert [text.count(each) for each in words] == [3, 3, 1]


def test_a_comparison_is_as_many_tables_as_the_width_asks_for():
    def spread(mean, spread=None):
        return {"mean": mean, "spread": spread, "n": 2}

    groups = [
        {"group": name, "runs": [{"diverged": False, "state": "finished", "repeats": None}] * 2,
         "finished": 2, "lr": 0.006, "linear_lr": linear,
         **{measure: spread(1.25, 0.5) for measure in compare.MEASURES},
         "bytes_per_parameter": spread(6.1, 0.0)}
        for name, linear in (("flip", 0.000375), ("dqt-ternary", 0.006))
    ]  # fmt: skip
    texts = {}
    for width in (80, *range(100, 130), 400):
        screen = terminal(width)
        comparing.draw_comparison(screen, {"groups": groups, "files": []})
        texts[width] = screen.file.getvalue()
        assert "…" not in texts[width] and max(map(len, texts[width].splitlines())) <= width
        words = [cell for line in texts[width].splitlines() for cell in re.split("  +", line.strip())]
        assert all(words.count(head) == 1 for head, _ in compare.MEASURES.values())
        assert words.count("group") == words.count("dqt-ternary"), "no name is broken"
        assert "0.006 (0.000375)" in words and words.count("6.100") == 2  # equal in all runs: no spread
    assert texts[80].count("dqt-ternary") > 1 and texts[400].count("dqt-ternary") == 1


def test_runs_are_listed_in_eighty_columns():
    one = {
        "run": "dqt-ternary-seed0", "state": "finished", "step": 300, "steps": 300, "loss": 4.25,
        "val_loss": 4.3, "method": "dqt ternary", "seed": 0, "age_seconds": 4000.0, "diverged": False,
        "from": None, "why": None,
    }  # fmt: skip
    screen = terminal()
    comparing.draw_runs(
        screen, [one, one | {"run": "b", "state": "starting", "loss": None, "val_loss": None}]
    )
    text = screen.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("finished  300/300  4.2500  4.3000  dqt ternary", "starting  300/300", "1:06:40"):
        assert words in text
