"""Runs against a loop that shares nothing with the product but its batches, its first weights and its random
words: transformers' LLaMA, PyTorch's AdamW, and each method's formula written out again.
"""

import json
import math
from itertools import count
from pathlib import Path
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
import transformers
from cases import slow
from torch import nn

from lowbit_dist import configfile, data, model
from lowbit_dist.checkpoint import Checkpoint
from lowbit_dist.ops import rng

STEPS, SAMPLES, EVAL_SAMPLES = 8, 4, 7
SKIPPED = 5  # the step that is left out where one is


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def straight_through(x, value):
    return x + (value - x).detach()


def int8_per_token(x):
    a = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return straight_through(x, (x * a).round().clamp(-128, 127) / a)


class BitLinear(nn.Module):
    """BitNet b1.58 (arXiv 2402.17764): ternary weights, int8 activations, gradients as if neither were."""

    def __init__(self, layer, norm, activation):
        super().__init__()
        self.weight, self.activation = layer.weight, activation
        if norm is not None:
            self.norm = norm

    def forward(self, x):
        x = self.activation(self.norm(x) if hasattr(self, "norm") else x)
        gamma = self.weight.abs().mean().clamp(min=1e-5)
        ternary = (self.weight / gamma).round().clamp(-1, 1) * gamma
        return x @ straight_through(self.weight, ternary).t()


def network(config, vocab_size):
    sizes = config.model.sizes()
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab_size, hidden_size=sizes.hidden_size, num_hidden_layers=sizes.layers,
            intermediate_size=sizes.intermediate_size, num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads, rms_norm_eps=config.model.norm_eps, use_cache=False,
            rope_theta=config.model.rope_theta, max_position_embeddings=config.model.max_seq_len,
            attn_implementation="eager",
        )
    ).float()  # fmt: skip
    widths = {"o_proj": sizes.hidden_size, "down_proj": sizes.intermediate_size}
    if config.method.name != "bitnet":
        return llama
    activation = int8_per_token if config.method.activation_bits else nn.Identity()
    for layer in llama.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    norm = RMSNorm(widths[name], config.model.norm_eps) if name in widths else None
                    setattr(part, name, BitLinear(linear, norm, activation))
    return llama


class Codes:
    """The low-bit weights of DQT: levels and a scale, moved by AdamW's direction, rounded at random."""

    def __init__(self, config, weights):
        self.config, self.moments = config, {name: [0.0, 0.0] for name in weights}
        self.scale, self.levels = {}, {}
        grid = config.method.stored
        for name, p in weights.items():
            # Released code: mean|W| / Qp; a scale is a number that float16 has.
            scale = (p.double().abs().mean() / grid.high).half().float()
            self.scale[name] = scale
            self.levels[name] = (p / scale).round().clamp(grid.low, grid.high)
            p.data.copy_(self.levels[name] * scale)

    def step(self, weights, ids, step, n_updates, lr, decay):
        rule, grid = self.config.optimizer, self.config.method.stored
        beta1, beta2 = rule.betas
        for name, p in weights.items():
            m, v = self.moments[name]
            m = beta1 * m + (1 - beta1) * p.grad
            v = beta2 * v + (1 - beta2) * p.grad**2
            self.moments[name] = [m, v]
            u = (m / (1 - beta1**n_updates)) / ((v / (1 - beta2**n_updates)).sqrt() + rule.eps)
            old = self.levels[name]
            moved = -lr / self.scale[name] * u - lr * decay * old
            words = rng.block_words(
                self.config.run.seed, step=step, tensor=ids[name], first_block=0, n_blocks=p.numel() // 256
            )
            up = words.view(p.shape).double() < (moved.abs() - moved.abs().floor()).double() * 2.0**32
            new = old + moved.sign() * (moved.abs().floor() + up)
            self.levels[name] = new.clamp(grid.low, grid.high)
            p.data.copy_(self.levels[name] * self.scale[name])


def plain_loop(config, skips=()):
    """Loss of each step, the validation loss at the end, and the weights."""
    vocab_size = data.check(config).vocab_size
    net = network(config, vocab_size)
    theirs = model.build(config.model, vocab_size, config.method, torch.float32)
    names = dict(net.named_parameters())
    assert set(names) == {name for name, _ in theirs.named_parameters()}
    first = model.InitialWeights(theirs, config.method, config.run.seed, None)
    with torch.no_grad():
        for name, p in names.items():
            p.copy_(first(name, p.shape))
    low_bit = {name: names[name] for name in model.low_bit_names(theirs, config.method)}
    codes = Codes(config, low_bit) if low_bit else None
    ids = {name: i for i, name in enumerate(sorted(names))}
    others = {name: p for name, p in names.items() if name not in low_bit}
    groups = [
        {"params": [p for p in others.values() if p.ndim > 1], "decays": True},
        {"params": [p for p in others.values() if p.ndim == 1], "decays": False},
    ]
    rule, schedule = config.optimizer, config.schedule
    adamw = torch.optim.AdamW(groups, betas=rule.betas, eps=rule.eps)
    batches = data.Batches(config.data, "train", config.run.seed)

    def loss_of(batches, first, size):
        tokens, labels = batches.micro_batch(first, size), batches.labels(first, size)
        labels = tokens if labels is None else labels
        logits = net(tokens).logits[:, :-1].double()
        return F.cross_entropy(logits.reshape(-1, vocab_size), labels[:, 1:].reshape(-1), ignore_index=-100)

    losses = []
    for step in range(1, STEPS + 1):
        warm = schedule.warmup_steps
        progress = (step - warm) / (STEPS - warm)
        end = schedule.min_lr_ratio
        factor = step / warm if step <= warm else end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2
        net.zero_grad()
        loss = loss_of(batches, (step - 1) * SAMPLES, SAMPLES)
        loss.backward()
        losses.append(loss.item())
        if step in skips:
            continue
        nn.utils.clip_grad_norm_(net.parameters(), config.train.clip_norm)
        for group in adamw.param_groups:
            group["lr"], group["weight_decay"] = rule.lr * factor, rule.weight_decay * group["decays"]
        adamw.step()
        if codes is not None:
            n_updates = step - sum(s < step for s in skips)
            codes.step(low_bit, ids, step, n_updates, rule.lr * factor, rule.weight_decay)
    with torch.no_grad():
        validation = loss_of(data.Batches(config.data, "val", config.run.seed), 0, EVAL_SAMPLES)
        return losses, validation.item(), names


def train_without(configuration, skips):
    """A run in which some steps' gradients are wrong."""
    from lowbit_dist import loop
    from lowbit_dist.zero import Engine

    read, steps = Engine._read, count(1)

    def spoiled(engine, numbers):
        if next(steps) in skips:
            for gradient in engine.gradients():
                gradient.fill_(math.nan)
        return read(engine, numbers)

    Engine._read = spoiled
    try:
        return loop.run(configfile.from_dict(configuration))
    finally:
        Engine._read = read


# -> the section, and how closely losses agree.  A latent weight or an activation that differs in its last bit
# may be rounded up here and down there; where neither is rounded only last bits differ.
METHODS = {
    "dense": ({"name": "dense"}, 2e-6),
    "bitnet": ({"name": "bitnet", "activation_bits": None}, 1e-4),
    "bitnet, 8-bit activations": ({"name": "bitnet"}, 1e-3),
    "dqt int8": ({"name": "dqt", "grid": "int8", "activation_bits": None}, 2e-6),
    "dqt ternary": ({"name": "dqt", "grid": "ternary", "activation_bits": None}, 2e-6),
}


@pytest.mark.parametrize(
    ("method", "skips"),
    [
        *((method, (SKIPPED,)) for method in METHODS),  # of those before it none is
        *slow(*((method, ()) for method in METHODS)),
    ],
)
def test_each_step_is_that_of_a_plain_loop(method, skips, ranks, small):
    section, tolerance = METHODS[method]
    content = small(
        run={"name": "run"}, method=section, optimizer={"lr": 2e-3, "states": "fp32"},
        train={
            "steps": STEPS, "batch_tokens": SAMPLES * 64, "micro_batch": 2, "log_every": 1,
            "eval_every": STEPS, "eval_samples": EVAL_SAMPLES, "save_every": STEPS,
        },
    )  # fmt: skip
    (summary,) = ranks(1).run(train_without, content, skips)
    rows = [
        json.loads(line)
        for line in Path(content["run"]["dir"], "run", "metrics.jsonl").read_text().splitlines()
    ]
    losses, val_loss, weights = plain_loop(configfile.from_dict(content), skips)
    kept = [loss for step, loss in enumerate(losses, 1) if step not in skips]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(kept, rel=tolerance)
    assert summary["train_loss"] == pytest.approx(fmean(kept), rel=tolerance)
    assert summary["val_loss"] == pytest.approx(val_loss, rel=tolerance)
    assert summary["val_samples"] == EVAL_SAMPLES
    checkpoint = Checkpoint.open(summary["checkpoint"])
    for name in checkpoint.names:
        if checkpoint.grid(name) is None:
            # AdamW divides a gradient by its size: one that is last bits alone still moves its element.
            apart = (checkpoint.tensor(name) - weights[name].detach()).abs()
            assert (apart > 100 * tolerance).float().mean() < 5e-5, name
            assert apart.max() < 2 * STEPS * 2e-3, name
        else:  # a random word that lies where the last bits of the two directions differ
            mine = checkpoint.tensor(name).dequantize(torch.float32)
            assert (mine != weights[name].detach()).float().mean() < 5e-3, name
