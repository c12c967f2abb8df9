import json

import pytest
import torch

from lowbit_dist import bench
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
