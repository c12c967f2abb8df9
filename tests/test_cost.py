"""The cost model: what it says of traffic is what an engine moves, of speed what others have published."""

import re
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from rich.console import Console

from lowbit_dist import configfile, cost
from lowbit_dist.cli import predicting
from lowbit_dist.config import ConfigError
from lowbit_dist.shape import PRESETS

VOCAB, SEQ_LEN = 640, 48
H100 = cost.GPUS["H100"]
SMALL = {"hidden_size": 256, "intermediate_size": 512, "layers": 2, "heads": 4, "kv_heads": 2}


def load(preset="1b", method="dqt", gpus=8, micro_batch=8, passes=4, **sections):
    content = {
        "model": {"preset": preset},
        "method": {"name": method},
        "data": {"path": "none", "seq_len": 2048},
        "train": {"micro_batch": micro_batch, "batch_tokens": passes * micro_batch * 2048 * gpus},
        "cluster": {"workers": gpus},
    }
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section if isinstance(section, dict) else section
    return configfile.from_dict(content)


def predicted(gpus=8, gpu=H100, vocab=32_000, execution=None, **options):
    return cost.predict(load(gpus=gpus, **options), vocab, gpus, gpu, execution=execution)


# ------------------------------------------------------------------ speed


@pytest.mark.parametrize(
    ("execution", "precision", "published"),
    [(cost.EAGER, "bf16", 5762), (cost.COMPILED, "bf16", 6667), (cost.COMPILED, "fp8", 8532)],
)
def test_published_speeds_of_others_are_predicted_within_15_percent(execution, precision, published):
    """torchtitan, Llama 3.1 8B on 8 H100 of 500 W with 2.4 TB/s, 2 x 8,192 tokens, a third of the forward
    pass computed again, under FSDP, whose hooks are not DeepSpeed's
    (benchmarks/llama3_h100_202412_torchtitan.md).
    """
    config = configfile.from_dict(
        {
            "model": {
                "hidden_size": 4096, "intermediate_size": 14336, "layers": 32, "heads": 32, "kv_heads": 8,
                "max_seq_len": 8192,
            },
            "method": {"name": "dense"},
            "data": {"path": "none", "seq_len": 8192},
            "optimizer": {"states": "fp32"},
            "precision": precision,
            "train": {"micro_batch": 2, "batch_tokens": 8 * 2 * 8192},
        }
    )  # fmt: skip
    of_500_watts = H100._replace(bandwidth=2.4e12, bf16=0.75 * H100.bf16, fp8=0.75 * H100.fp8)
    execution = execution._replace(hook_seconds=20e-6)
    row = cost.predict(config, 128_256, 8, of_500_watts, execution=execution, recomputed=0.33)
    assert row["tokens_per_second_per_gpu"] == pytest.approx(published, rel=0.15)
    assert row["bound"] == "gpu"


def test_units_fit_each_other():
    row = predicted(gpus=8)
    tokens = 8 * 4 * 8 * 2048
    assert row["micro_batches"] == 4
    assert row["tokens_per_second"] == pytest.approx(tokens / row["step_seconds"])
    assert row["tokens_per_second_per_gpu"] * 8 == pytest.approx(row["tokens_per_second"])
    seconds = row["seconds"]
    assert row["step_seconds"] == pytest.approx(4 * seconds["micro_batch"] + seconds["update"])
    assert seconds["micro_batch"] > max(sum(seconds["gpu"].values()), seconds["host"])
    assert row["wire_bytes_per_gpu"] == sum(row["wire"].values())
    # A copy of all that moves takes at least what the wires allow.
    assert row["wire_bytes_per_gpu"] / H100.nvlink < 4 * seconds["network"]


def test_flops_are_six_for_each_weight_that_multiplies_and_those_of_attention():
    sizes, config = PRESETS["1b"], load()
    work = cost.Work.of(config, 32_000)
    head = 32_000 * sizes.hidden_size
    attention = 12 * sizes.layers * sizes.hidden_size * 2048
    assert work.flops_per_token(2048) == 6 * (sizes.linear_parameters + head) + attention
    norms = (2 * sizes.layers + 1) * sizes.hidden_size
    n = sizes.linear_parameters + 2 * head + norms
    assert work.flops_per_token(2048, with_embedding=True) == 6 * n + attention
    tied = cost.Work.of(load(model={"tie_embeddings": True}), 32_000)
    assert tied.flops_per_token(2048) == work.flops_per_token(2048), "a tied head multiplies as another"
    row = predicted(gpus=1)
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * work.flops_per_token(2048) / H100.bf16)
    assert 0 < row["mfu"] < 0.65


def test_more_of_what_is_slow_is_slower():
    def speed(**options):
        return predicted(**options)["tokens_per_second_per_gpu"]

    checkpointed = {"activation_checkpointing": True}
    assert speed(train=checkpointed) < speed()
    assert speed(method="bitnet") < speed(method="dqt") < speed(method="dense")
    assert speed(execution=cost.EAGER) < speed(execution=cost.COMPILED)
    assert speed(preset="7b", micro_batch=4) < speed(preset="1b", micro_batch=4)
    assert speed(micro_batch=1) < speed(micro_batch=8), "the host and the queue's drain cost a pass the same"
    assert speed(precision="fp32") < speed()
    assert speed(method="dense", execution=cost.COMPILED) < speed(
        method="dense", execution=cost.COMPILED, precision="fp8"
    )
    in_integers = {"matmul": "int8"}
    assert speed() < speed(precision=in_integers) < speed(precision=in_integers | {"grad_input": "int8"})
    names = ("A100", "H100", "H200", "B200")
    speeds = [speed(gpu=cost.GPUS[name]) for name in names]
    assert speeds == sorted(speeds) and len(set(speeds)) == len(names)


def test_more_gpus_make_a_step_of_the_same_batch_shorter_and_move_more_for_each_token():
    config = load(gpus=1024, passes=1)
    rows = cost.plan(config, 32_000, [1024, 8, 64], H100, with_memory=False)["rows"]
    assert [row["gpus"] for row in rows] == [8, 64, 1024]
    assert [row["micro_batches"] for row in rows] == [128, 16, 1]
    seconds = [row["step_seconds"] for row in rows]
    assert seconds == sorted(seconds, reverse=True)
    of_pass = [row["wire_bytes_per_gpu"] / row["micro_batches"] for row in rows]
    assert of_pass == sorted(of_pass)


# ------------------------------------------------------------------ traffic


def moved(content):
    """Bytes that this rank receives in a step's gathers, and in its reductions."""
    import torch.distributed as dist
    from test_memory import Training

    from lowbit_dist.zero import stage3

    training = Training(content)
    sizes = {"gathers": 0.0, "reductions": 0.0}
    share = (training.engine.world - 1) / training.engine.world

    def counting(name, collective):
        def call(out, given, *args, **options):
            whole = max(out.nbytes, given.nbytes)
            sizes[name] += share * whole
            return collective(out, given, *args, **options)

        return call

    for _ in range(2):  # ZeRO-3 knows its order from the second step on
        training.step()
    with (
        patch.object(dist, "all_gather_into_tensor", counting("gathers", dist.all_gather_into_tensor)),
        patch.object(stage3, "EXCHANGED", ()),
        patch.object(dist, "reduce_scatter_tensor", counting("reductions", dist.reduce_scatter_tensor)),
    ):
        training.step()
    training.engine.close()
    return sizes


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"method": {"name": "dqt", "grid": "int8", "forward": "ternary"}},
        {"method": {"name": "dense"}, "precision": "bf16"},
        {"zero": {"residency": "replicated"}},
        {"train": {"activation_checkpointing": True}},
        {"train": {"reproducible": True}},
    ],
    ids=str,
)
def test_the_bytes_on_the_wire_are_those_that_an_engine_moves(sections, ranks):
    from test_memory import VOCAB, configuration
    from test_memory import load as loaded

    content = configuration(**sections)
    config = loaded(content)
    (received, _) = ranks(2).run(moved, content)
    work = cost.Work.of(config, VOCAB)
    wire = cost.wire_bytes(config, work, 2)
    assert wire["codes"] + wire["weights"] == received["gathers"]
    assert wire["gradients"] == received["reductions"]


def test_one_gpu_moves_nothing_and_codes_less_than_weights():
    assert predicted(gpus=1)["wire_bytes_per_gpu"] == 0
    low_bit, dense = predicted(method="dqt")["wire"], predicted(method="dense")["wire"]
    assert low_bit["codes"] == pytest.approx((dense["weights"] - low_bit["weights"]) / 8)
    assert low_bit["gradients"] == dense["gradients"]


# ------------------------------------------------------------------ what is asked and answered


def test_the_page_of_benchmarks_has_what_is_predicted():
    page = (Path(__file__).parents[1] / "lowbit_dist/BENCH.md").read_text()
    rows = re.findall(r"^\| (1b|7b|70b) \| ([\d,]+) \| (.*) \|$", page, flags=re.M)
    assert len(rows) == 14
    for preset, gpus, cells in rows:
        n = int(gpus.replace(",", ""))
        checkpointed = {"activation_checkpointing": preset != "1b"}
        speeds = []
        for method, execution in (
            ("dense", cost.EAGER), ("dqt", cost.EAGER), ("bitnet", cost.EAGER), ("dense", cost.COMPILED),
            ("dqt", cost.COMPILED),
        ):  # fmt: skip
            micro_batch = 4 if preset == "70b" else 8
            config = load(preset, method, gpus=n, micro_batch=micro_batch, train=checkpointed)
            row = cost.predict(config, 32_000, n, H100, execution=execution)
            speeds.append(f"{row['tokens_per_second_per_gpu']:,.0f}")
        assert [cell.split(" ")[0] for cell in cells.split(" | ")][:5] == speeds


def test_a_batch_that_is_not_divided_is_refused_with_what_would_be():
    predicting.check(load(gpus=8), [1, 8, 32], "H100")
    with pytest.raises(ConfigError) as refused:
        predicting.check(load(gpus=8), [8, 24], "H100")
    message = str(refused.value)
    assert message.startswith("--gpus (24) must divide the 32 micro-batches of a step")
    assert message.endswith("write --gpus 32, or train.batch_tokens=393216")
    predicting.check(load(gpus=8, train={"batch_tokens": 393_216}), [24], "H100")
    with pytest.raises(ConfigError, match=r"train.batch_tokens \(524,288\) must be a multiple"):
        cost.plan(load(gpus=8), 32_000, [24], H100)


def test_gpus_that_cannot_multiply_8_bit_floats_are_refused():
    with pytest.raises(ConfigError, match=r"precision \(fp8\).*not A100; write --gpu of H100, H200, B200"):
        cost.plan(load(precision="fp8"), 32_000, [8], cost.GPUS["A100"])


@pytest.mark.parametrize(
    ("name", "kind"),
    {
        "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200", "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA B200": "B200", "NVIDIA H100 PCIe": None, "NVIDIA H100 NVL": None,
        "NVIDIA GH200 480GB": None, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None, "NVIDIA L4": None,
    }.items(),
)  # fmt: skip
def test_a_peak_is_known_of_the_very_product_alone(name, kind):
    gpu = cost.gpu_of(name)
    assert (gpu and gpu.name) == kind


def test_speed_is_of_all_and_of_each_and_mfu_where_the_peak_is_known():
    config = load()
    assert cost.peak_flops(torch.device("cpu")) is None
    assert cost.Speed(config, 32_000, None).metrics(1000.0, 4) == {
        "tokens_per_second": 1000.0, "tokens_per_second_per_worker": 250.0, "mfu": None
    }  # fmt: skip
    flops = cost.Work.of(config, 32_000).flops_per_token(2048)
    metrics = cost.Speed(config, 32_000, H100.bf16).metrics(80_000.0, 2)
    assert metrics["mfu"] == 40_000 * flops / H100.bf16


def test_every_number_says_where_it_comes_from():
    for name, constant in cost.CONSTANTS.items():
        assert constant.source in ("measured", "assumed"), name
        assert constant.why and constant.unit and constant.value > 0, name


@pytest.mark.parametrize("numbers", [[1], [8, 1024, 16_384]])
def test_the_table_fits_80_columns_and_says_what_it_is(numbers):
    config = configfile.from_dict(
        {
            "model": SMALL,
            "method": {"name": "dqt"},
            "data": {"path": "none", "seq_len": SEQ_LEN},
            "train": {"micro_batch": 1, "batch_tokens": SEQ_LEN * numbers[-1]},
            "cluster": {"workers": 1},
        }
    )
    answer = cost.plan(config, VOCAB, numbers, H100)
    assert answer["note"] == "predicted, never measured"
    for row in answer["rows"]:
        assert row["memory_bytes_per_gpu"] > 1.5e9 and row["fits"]
    # The largest numbers that there may be: 70b on many GPUs.
    answer["rows"][-1] |= {
        "step_seconds": 1234.5, "tokens_per_second": 123_456_789.0, "tokens_per_second_per_gpu": 123_456.0,
        "wire_bytes_per_gpu": 12_345e9, "memory_bytes_per_gpu": 1_234e9, "bound": "network", "fits": False,
    }  # fmt: skip
    screen = Console(width=80, file=StringIO())
    predicting.table(screen, answer)
    lines = screen.file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("predicted, never measured: H100")
    text = "\n".join(lines)
    assert "…" not in text
    for words in ("123.5 M", "1,234", "123,456", "12,345 GB", "1,234 GB", "Does not fit"):
        assert words in text, words
