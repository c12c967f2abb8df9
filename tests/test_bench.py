import json

import pytest
import torch

from lowbit_dist import bench, bench_training
from lowbit_dist.config import ConfigError
from lowbit_dist.grid import GRIDS
from lowbit_dist.ops import cpu

UPDATE = ("optimizer", "grid", "states", "group")


@pytest.fixture(scope="module")
def result():
    return bench.update(n=256 * 64, repetitions=3, device="cpu")


def test_every_grid_and_state_is_timed_against_the_peer(result):
    assert [tuple(row[key] for key in UPDATE) for row in result["update"]] == [
        *(("adamw", name, "int8", None) for name in GRIDS),
        ("adamw", "ternary", "bf16", None),
        ("adamw", "ternary", "fp32", None),
        ("adamw", "ternary", "int8", 128),
        ("lion", "ternary", "int8", None),
        ("lion", "int8", "int8", None),
    ]
    assert [row["grid"] for row in result["decode"]] == list(GRIDS)
    for row in [result["peer"], *result["update"], *result["decode"]]:
        low, high = row["ns_per_parameter_middle_half"]
        assert 0 < low <= row["ns_per_parameter"] <= high
        low, high = row["ratio_to_peer_middle_half"]
        assert 0 < low <= row["ratio_to_peer"] <= high
        bandwidth = result["copy_gigabytes_per_second"]
        share = row["bytes_moved_per_parameter"] / row["ns_per_parameter"] / bandwidth
        assert row["share_of_copy_bandwidth"] == pytest.approx(share)
        assert row["floor_ns_per_parameter"] == pytest.approx(share * row["ns_per_parameter"])
    assert result["peer"]["ratio_to_peer"] == 1


def test_bytes_are_those_of_the_tensors(result):
    bytes_of = {
        tuple(row[key] for key in UPDATE): (
            row["bytes_resident_per_parameter"],
            row["bytes_moved_per_parameter"],
        )
        for row in result["update"]
    }
    # Codes, slots with 4 bytes of scale for 256 elements, a bfloat16 gradient; all but that move twice.
    assert bytes_of["adamw", "ternary", "int8", None] == (4.28125, 6.5625)
    assert bytes_of["adamw", "int3", "int8", None] == (4.40625, 6.8125)
    assert bytes_of["adamw", "int8", "int8", None] == (5.03125, 8.0625)
    assert bytes_of["adamw", "ternary", "fp32", None] == (10.25, 18.5)
    assert bytes_of["lion", "ternary", "int8", None] == (3.265625, 4.53125)
    # A group's scale is read, and stays.
    assert bytes_of["adamw", "ternary", "int8", 128] == (4.28125 + 4 / 128, 6.5625 + 4 / 128)
    assert result["peer"]["bytes_resident_per_parameter"] == 16


def test_the_result_is_plain_data_and_says_what_was_measured(result):
    assert json.loads(json.dumps(result)) == result
    assert (result["device"], result["threads"], result["clock"]) == ("cpu", 1, "process time")
    assert (result["parameters"], result["repetitions"]) == (256 * 64, 3)


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    other = before + 1
    assert bench.update(n=256, threads=other, repetitions=1, device="cpu")["clock"] == "wall time"
    assert torch.get_num_threads() == before


def test_a_size_that_is_not_whole_blocks_is_refused():
    with pytest.raises(ValueError, match="n is 1000; it must be a multiple of 256"):
        bench.update(n=1000, device="cpu")


@pytest.fixture(scope="module")
def inferred():
    return bench.infer("tiny", repetitions=3, grids=("ternary", "int8"))


def test_models_that_do_not_fit_are_refused_before_any_is_made():
    words = r"--preset \(70b\) needs 1\d\d GB for a dense model and 1 low-bit ones"
    with pytest.raises(ConfigError, match=words):
        bench.infer("70b", grids=("ternary",))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it measures the GPU, where codes are decoded")
@pytest.mark.skipif(not cpu.available(), reason="there is no C compiler")
def test_a_low_bit_model_is_timed_against_the_dense_one(inferred):
    assert json.loads(json.dumps(inferred)) == inferred
    assert [row["grid"] for row in inferred["infer"]] == ["ternary", "int8"]
    assert (inferred["products"], inferred["clock"]) == ("integers", "process time")
    for row in [inferred["peer"], *inferred["infer"]]:
        for tokens in ("tokens_1", "tokens_512"):
            for name in ("tokens_per_second", "speed_to_peer"):
                low, high = row[tokens][f"{name}_middle_half"]
                assert 0 < low <= row[tokens][name] <= high
        assert row["tokens_512"]["tokens_per_second"] > row["tokens_1"]["tokens_per_second"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it measures the GPU, where codes are decoded")
@pytest.mark.skipif(not cpu.available(), reason="there is no C compiler")
def test_resident_bytes_are_those_of_codes_scales_and_what_is_dense(inferred):
    linears = 4 * 256 * (4 * 256 + 3 * 768)
    others = 2 * 32_000 * 256 + 9 * 256  # embedding, head and gains of norms
    assert inferred["parameters"] == linears
    assert inferred["peer"]["resident_bytes_per_weight"] == 2
    assert inferred["peer"]["resident_bytes"] == pytest.approx(2 * (linears + others), rel=1e-4)
    for row, size in zip(inferred["infer"], (0.25, 1), strict=True):
        # 28 matrices have a scale of 4 bytes and a stub of 2.
        assert row["resident_bytes_per_weight"] == pytest.approx(size + 28 * 6 / linears)
        assert row["resident_bytes"] == pytest.approx(size * linears + 2 * others, rel=1e-4)
    assert inferred["infer"][0]["resident_bytes_per_weight"] <= 0.3


# ------------------------------------------------------------------ layers, gathers and steps


def check_rows(measured, names):
    assert json.loads(json.dumps(measured)) == measured
    assert [row["name"] for row in measured["rows"]] == names
    for row in measured["rows"]:
        low, high = row["seconds_middle_half"]
        assert 0 < row["seconds_least"] <= low <= row["seconds"] <= high
        low, high = row["speed_to_peer_middle_half"]
        assert 0 < low <= row["speed_to_peer"] <= high
    (peer,) = (row for row in measured["rows"] if row["name"] == measured["peer"])
    assert peer["speed_to_peer"] == 1


def test_a_layer_takes_turns_with_pytorchs():
    measured = bench_training.linear(tokens=64, preset="tiny", repetitions=3)
    ours = ["nn.Linear", "dqt ternary", "dqt int8", "bitnet"]
    if "torchao" not in measured["not_installed"]:
        ours.append("torchao int8")
    check_rows(measured, [*ours, "floor: the products"])
    for row in measured["rows"]:
        assert row["tokens_per_second"] == 64 / row["seconds"]


def test_gathers_and_steps_take_turns_on_two_workers(ranks):
    times = ranks(2).run(bench_training._gathers, device="cpu", numel=256 * 10, repetitions=2)[0]
    assert list(times) == [
        "bf16 weights", *(f"{name} codes, decoded" for name in GRIDS), "floor: a copy"
    ]  # fmt: skip
    sizes = {"hidden_size": 256, "intermediate_size": 256, "layers": 1, "heads": 4, "kv_heads": 4}
    contents = {
        name: {
            "model": sizes,
            "data": {"path": "none", "seq_len": 16},
            "train": {"micro_batch": 1, "batch_tokens": 64},
            "cluster": {"workers": 2},
            **sections,
        }
        for name, sections in bench_training.CANDIDATES.items()
    }
    steps = ranks(2).run(bench_training._train, device="cpu", contents=contents, repetitions=2)[0]
    assert list(steps) == list(bench_training.CANDIDATES)
    for of_one in (*times.values(), *steps.values()):
        assert len(of_one) == 2 and min(of_one) > 0


def test_gathered_codes_are_decoded_to_what_each_worker_packed(ranks):
    assert ranks(2).run(decoded_gather) == [True, True]


def decoded_gather():
    out = torch.full((256 * 4,), torch.nan, dtype=torch.bfloat16)
    bench_training._decoded(GRIDS["ternary"], 256 * 4, "cpu", out)()
    return bool((out == torch.tensor(-0.02).bfloat16()).all())  # a byte of zeros is four lowest levels


@pytest.mark.slow
def test_a_benchmark_starts_workers_of_its_own():
    measured = bench_training.gather("tiny", repetitions=2)
    check_rows(measured, ["bf16 weights", *(f"{name} codes, decoded" for name in GRIDS), "floor: a copy"])
    received = {row["name"]: row["bytes_received"] for row in measured["rows"]}
    assert received["bf16 weights"] == 8 * received["ternary codes, decoded"]


def test_models_that_have_no_room_together_are_refused_before_a_worker_starts():
    with pytest.raises(ConfigError, match=r"--preset \(70b\) needs more than .* of 8 candidates"):
        bench_training.train(preset="70b")
    with pytest.raises(ConfigError, match=r"--preset \(70b\) needs more than .* of 2 candidates"):
        bench_training.step(preset="70b", only=["flip"])


@pytest.mark.slow
def test_what_is_asked_for_is_timed_beside_the_dense_step():
    measured = bench_training.step(preset="tiny", repetitions=1, only=["flip"], seq_len=16, micro_batch=1)
    check_rows(measured, ["dense", "flip"])
