"""Packed ZeRO-3 below the training loop: DeepSpeed's contract, the exact norm, pretrained weights."""

import json

import pytest
import torch


def test_a_moved_deepspeed_name_is_reported(monkeypatch):
    from lowbit_dist.zero import check_deepspeed, contract

    check_deepspeed()
    monkeypatch.setattr(contract, "CONTRACT", (*contract.CONTRACT, (contract.Init, "_vanished", "self")))
    with pytest.raises(RuntimeError, match=r"Init\._vanished takes \(None\)"):
        check_deepspeed()


def test_another_deepspeed_version_is_refused(monkeypatch):
    from lowbit_dist.zero import check_deepspeed, contract

    monkeypatch.setattr(contract.deepspeed, "__version__", "0.20.0")
    with pytest.raises(RuntimeError, match=r"pip install deepspeed==0\.19\.8"):
        check_deepspeed()


def norm_of_part(values, cuts):
    """The global norm when this rank holds the elements between its two cuts, in pieces."""
    import torch.distributed as dist

    from lowbit_dist.optim.clipping import global_norm

    first, last = cuts[dist.get_rank()], cuts[dist.get_rank() + 1]
    mine = values[first:last]
    return global_norm([mine[: len(mine) // 3], mine[len(mine) // 3 :], mine[:0]], len(values)).item()


def test_the_norm_has_the_same_bits_for_any_split(ranks):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(99_999, generator=generator) * torch.rand(99_999, generator=generator) ** 8
    whole = ranks(1).run(norm_of_part, values, [0, 99_999])[0]
    for cut in (0, 1, 256, 33_333, 99_999):
        assert ranks(2).run(norm_of_part, values, [0, cut, 99_999]) == [whole, whole]
    assert whole == pytest.approx(values.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_norm_of_what_is_not_finite_is_not_finite_on_every_worker(bad, ranks):
    values = torch.ones(1000)
    values[700] = bad
    assert not any(
        torch.isfinite(torch.tensor(n)) for n in ranks(2).run(norm_of_part, values, [0, 500, 1000])
    )


def pretrained_weights(configuration, folder):
    """This rank's codes and weights of a model initialised from `folder`, by name and start."""
    import torch

    from lowbit_dist import configfile, model
    from lowbit_dist.zero import Engine

    config = configfile.from_dict(configuration)
    built = model.build(config.model, 512, config.method, torch.float32)
    initial = model.InitialWeights(built, config.method, 0, folder)
    engine = Engine(config, built, initial, model.low_bit_names(built, config.method))
    found = {(s.name, s.start): (s.codes if s.codes is not None else s.weight).clone() for s in engine.shards}
    engine.close()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_pretrained_model_is_rounded_to_the_grid_once(world, ranks, small, tmp_path):
    import transformers

    from lowbit_dist.methods.dqt import DQT

    torch.manual_seed(0)
    folder = tmp_path / "pretrained"
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        )
    )  # fmt: skip
    llama.save_pretrained(folder)
    configuration = small(method={"grid": "int4", "scale": "absmax"})
    configuration["model"] = {"pretrained": str(folder)}
    found = {
        k: v
        for part in ranks(world).run(pretrained_weights, configuration, str(folder))
        for k, v in part.items()
    }
    for name, value in llama.state_dict().items():
        parts = torch.cat([found[key] for key in sorted(found) if key[0] == name])
        if name.endswith("proj.weight"):
            assert torch.equal(parts, DQT(grid="int4", scale="absmax").quantize(value).codes), name
        else:
            assert torch.equal(parts, value.flatten()), name


def test_a_pretrained_folder_of_pickles_is_refused(tmp_path, small):
    from lowbit_dist import model
    from lowbit_dist.config import ConfigError
    from lowbit_dist.methods import Dense

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        model.InitialWeights(torch.nn.Linear(2, 2), Dense(), 0, tmp_path)


def engine_of(configuration, dtype=torch.float32):
    """With the first weights of seed 0."""
    from lowbit_dist import configfile, model
    from lowbit_dist.zero import Engine

    config = configfile.from_dict(configuration)
    built = model.build(config.model, 512, config.method, dtype)
    initial = model.InitialWeights(built, config.method, 0, None)
    return Engine(config, built, initial, model.low_bit_names(built, config.method))


def flips_of_one_step(configuration):
    """What a step says of its flips, and the codes of this rank's shards that it changed."""
    from lowbit_dist import ops

    engine = engine_of(configuration)
    tokens = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(engine.rank))
    packed = [shard for shard in engine.shards if shard.codes is not None]
    before = [ops.unpack(shard.codes, grid=shard.grid) for shard in packed]
    with engine.step(ops.Now(lr=5e-3, weight_decay=0.0, step=1, seed=0), details=True) as step:
        for _ in range(engine.micro_batches // engine.world):
            step.backward(tokens)
    update = step.done
    after = [ops.unpack(shard.codes, grid=shard.grid) for shard in packed]
    changed = {s.name: int((a != b).sum()) for s, a, b in zip(packed, after, before, strict=True)}
    engine.close()
    return update, changed


def gradients_of_many_passes(configuration):
    """Mean gradients of a step, by parameter: as the engine has them, and, under stage 2, those of each pass
    added up here, in float32.
    """
    from lowbit_dist import configfile, model, ops
    from lowbit_dist.zero import Engine

    config = configfile.from_dict(configuration)
    built = model.build(config.model, 512, config.method, torch.bfloat16)
    engine = Engine(config, built, model.InitialWeights(built, config.method, 0, None), [])
    of_passes = {}

    def remember(p):
        total = of_passes[p.lowbit_name] = torch.zeros(p.shape)

        def add(gradient):
            total.add_(gradient)

        p.register_hook(add)

    if config.zero.stage == 2:  # there, DeepSpeed has divided the loss by the number of passes
        for p in engine.module.parameters():
            remember(p)
    generator = torch.Generator().manual_seed(0)
    with engine.step(ops.Now(lr=0.0, weight_decay=0.0, step=1, seed=0)) as step:
        for _ in range(engine.micro_batches):
            step.backward(torch.randint(512, (1, 64), generator=generator))
        zero = engine._engine.optimizer
        if config.zero.stage == 2:
            params = [p for group in zero.round_robin_bit16_groups for p in group]
            sums = [g for group in zero.averaged_gradients.values() for g in group]  # and some padding
            found = {p.lowbit_name: g.clone().view(p.shape) for p, g in zip(params, sums, strict=False)}
        else:
            found = {
                shard.name: g.view(shard.shape) / engine.micro_batches
                for shard, g in zip(engine.shards, zero._gradients(), strict=True)
            }
    engine.close()
    return found, of_passes


def test_gradients_of_many_micro_batches_are_added_up_in_float32(ranks, small):
    """Added up in bf16, those of 64 are 0.8 % off, and those of 1,024 more than 5 %."""

    def run(stage):
        content = small(
            method={"name": "dense"}, precision="bf16", optimizer={"states": "fp32"}, zero={"stage": stage},
            train={"micro_batch": 1, "batch_tokens": 64 * 64}, cluster={"workers": 1},
        )  # fmt: skip
        return ranks(1).run(gradients_of_many_passes, content)[0]

    (of_stage_2, expected), (of_stage_3, _) = run(2), run(3)
    assert of_stage_2.keys() == of_stage_3.keys() == expected.keys()
    for name, mean in expected.items():
        for gradient in (of_stage_2[name], of_stage_3[name]):
            assert gradient.dtype == torch.float32
            assert (gradient - mean).norm() <= 1e-5 * mean.norm(), name


@pytest.mark.parametrize("world", [1, 2])
def test_the_flips_of_each_parameter_are_counted_over_all_workers(world, ranks, small):
    found = ranks(world).run(flips_of_one_step, small(method={"grid": "int4"}))
    counted = {name: sum(changed[name] for _, changed in found) for name in found[0][1]}
    assert len(counted) == 14 and all(counted.values()), "the case must move codes of every layer"
    for update, _ in found:
        assert update.flips_of == counted
        assert update.flips == sum(counted.values())


def gathers_of_passes(configuration):
    """What is gathered, in which order, and what is there after each pass; of an engine's training passes,
    evaluations and a forward pass that was left in the middle.
    """
    from lowbit_dist import model, ops

    engine = engine_of(configuration)
    coordinator = engine._engine.optimizer.parameter_offload.param_coordinator
    tokens = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(engine.rank))
    gather, units, left = coordinator._gather, [], []
    names = [id(unit) for unit in {id(p.unit): p.unit for p in engine.module.parameters()}.values()]

    def noted(params):
        before = set(coordinator._inflight)
        gather(params)
        units.extend(dict.fromkeys(names.index(id(p.unit)) for p in coordinator._inflight if p not in before))

    coordinator._gather = noted

    def ended():
        left.append((coordinator.there, len(coordinator._inflight)))
        units.append("|")

    def train(n):
        with engine.step(ops.Now(lr=5e-3, weight_decay=0.0, step=n, seed=0)) as step:
            for _ in range(engine.micro_batches // engine.world):
                step.backward(tokens)
        ended()

    train(1)
    train(2)
    for _ in range(2):
        engine.forward(tokens)
        ended()
    block = model.blocks_of(engine.module)[1]
    stop = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.forward(tokens)
    stop.remove()
    units.append("|")
    train(3)
    train(4)
    engine.close()
    return " ".join(map(str, units)), left


@pytest.mark.parametrize("residency", ["sharded", "replicated"])
def test_a_block_is_gathered_once_a_pass_while_the_one_before_it_works(residency, ranks, small):
    """Units of a model of three blocks: 0 embeddings, 1 to 3 the blocks, 4 norm and head."""
    sections = {
        "zero": {"residency": residency},
        "train": {"micro_batch": 2, "batch_tokens": 256},
        "model": {"layers": 3, "tie_embeddings": False},
    }
    of_two = ranks(2).run(gathers_of_passes, small(**sections, cluster={"workers": 2}))
    (order, left), (other, _) = of_two
    assert order == other, "collectives match only if all workers begin them in one order"
    passes = order.removesuffix(" |").split(" | ")
    new, known = "0 1 2 3 4 4 3 2 1 0", "0 1 2 3 4 3 4 2 1 0"  # the last block before norm and head work
    assert passes == [new, known, "0 1 2 3 4", "0 1 2 3 4", "0 1 2 3", known, known]
    assert left == [(0, 0)] * 6, "nothing stays, whatever the pass before did"


def losses_of_steps(configuration, reads):
    """Of two steps and an evaluation.  `reads`: the model asks for the embeddings before they run, as some do
    for their device; DeepSpeed then gathers them at once.
    """
    from lowbit_dist import ops

    engine = engine_of(configuration)
    if reads:
        engine.module.model.register_forward_pre_hook(
            lambda model, _: model.embed_tokens.weight.device and None
        )
    tokens = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(engine.rank))
    losses = []
    for n in (1, 2):
        with engine.step(ops.Now(lr=5e-3, weight_decay=0.0, step=n, seed=0)) as step:
            for _ in range(engine.micro_batches // engine.world):
                losses.append(step.backward(tokens).item())
    losses.append(engine.forward(tokens).item())
    coordinator = engine._engine.optimizer.parameter_offload.param_coordinator
    left = coordinator.there, len(coordinator._inflight)
    engine.close()
    return losses, left


def test_a_weight_that_is_asked_for_before_it_runs_is_released(ranks, small):
    plain = ranks(2).run(losses_of_steps, small(cluster={"workers": 2}), False)
    asked = ranks(2).run(losses_of_steps, small(cluster={"workers": 2}), True)
    assert asked == plain
    assert [left for _, left in asked] == [(0, 0)] * 2


def summed(wire, sums, exchanged):
    """This worker's row of what all workers have, summed over them; and what it must be."""
    from types import SimpleNamespace
    from unittest.mock import patch

    import torch.distributed as dist

    from lowbit_dist.zero import stage3

    world, rank = dist.get_world_size(), dist.get_rank()
    of_workers = [
        torch.randn(world, 1000, generator=torch.Generator().manual_seed(n)).to(wire) for n in range(world)
    ]
    with patch.object(stage3, "EXCHANGED", exchanged):
        found = stage3.PackedZero3._sum_of_rows(
            SimpleNamespace(gradient_accumulation_dtype=sums), of_workers[rank].clone()
        )
    return found, sum(rows[rank].to(torch.float64) for rows in of_workers)


@pytest.mark.parametrize(
    ("wire", "sums", "tolerance"),
    [
        (torch.bfloat16, torch.float32, 2**-20),
        (torch.float32, torch.float32, 2**-20),
        (torch.float64, torch.float64, 2**-50),
    ],
    ids=str,
)
def test_parts_of_gradients_are_summed_over_workers_in_the_precision_of_sums(wire, sums, tolerance, ranks):
    for found, exact in ranks(3).run(summed, wire, sums, ("cpu",)):
        assert found.dtype == sums
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance * exact.abs().max().item())
    for found, exact in ranks(3).run(summed, wire, sums, ()):  # as on a GPU: in what travels
        assert found.dtype == wire
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.05 * exact.abs().max().item())
