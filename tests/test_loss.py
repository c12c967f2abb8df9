"""The loss in chunks: that of all logits, whatever the chunks, the model and the number of workers."""

import re

import hf_folders
import pytest
import torch
import transformers
from test_train import train
from torch import nn
from toys import DeadZone

from lowbit_dist import data, loss, model
from lowbit_dist.data import IGNORED
from lowbit_dist.linear import linear
from lowbit_dist.methods import Dense

V, K, T = 1000, 48, 101
CHUNKS = (1, 7, 33, T)


def operands(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(T, K, generator=generator), torch.randn(V, K, generator=generator) / 4
    targets = torch.randint(0, V, (T,), generator=generator)
    targets[::7] = IGNORED
    leaves = [each.to(dtype).requires_grad_() for each in (x, w, torch.randn(V, generator=generator))]
    return leaves, targets


def gradients(of, leaves):
    found = torch.autograd.grad(of, leaves)
    return [of.detach(), *found]


def in_double(a, b, *, of_gradient=False):
    """A product whose bits depend on no order of sums."""
    return (a.double() @ b.double().t()).to(a.dtype)


def close(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs.double()).abs().max() <= tolerance * theirs.abs().max()


def capped(y):
    return 5 * torch.tanh(y / 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("between", [None, capped])
def test_the_bits_of_loss_and_input_gradient_are_the_same_for_any_chunks(dtype, between, monkeypatch):
    """But for those of products, which is why chunks are not chosen by anything that may change."""
    (x, w, bias), targets = operands(dtype)
    found = []
    for rows in CHUNKS:
        monkeypatch.setattr(loss, "CHUNK", rows * V)
        of = loss.cross_entropy(x, w, bias, targets=targets, between=between, product=in_double)
        found.append(gradients(of, [x, w]))
    for nats, dx, dw in found[:-1]:
        assert torch.equal(nats, found[-1][0]) and torch.equal(dx, found[-1][1])
        close([dw], [found[-1][2]], 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("rows", CHUNKS)
@pytest.mark.parametrize("view", [None, DeadZone()], ids=["plain", "view"])
@pytest.mark.parametrize("between", [None, capped], ids=["", "capped"])
def test_it_is_the_loss_of_all_logits(rows, view, between, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", rows * V)
    monkeypatch.setattr(loss, "BLOCKS", {"cpu": 5 * V})
    monkeypatch.setattr(loss, "TERM", 300 * K)
    leaves, targets = operands()
    ours = loss.cross_entropy(leaves[0][None], *leaves[1:], targets=targets[None], between=between, view=view)
    x, w, bias = (each.detach().double().requires_grad_() for each in leaves)
    y = linear(x, w, bias, view=view)
    whole = nn.functional.cross_entropy(y if between is None else between(y), targets, ignore_index=IGNORED)
    expected = gradients(0.3 * whole, [x, w, bias])
    close(gradients(0.3 * ours, leaves), expected, 1e-5)
    with torch.no_grad():
        alone = loss.cross_entropy(*leaves, targets=targets, between=between, view=view)
    assert torch.equal(alone, ours) and not alone.requires_grad


def test_tokens_that_do_not_count_have_no_gradient_and_no_target_no_loss():
    (x, w, _), targets = operands()
    dx = torch.autograd.grad(loss.cross_entropy(x, w, targets=targets), x)[0]
    assert not dx[targets == IGNORED].any() and dx[targets != IGNORED].any(1).all()
    assert loss.cross_entropy(x, w, targets=torch.full_like(targets, IGNORED)).isnan()


def test_autocast_multiplies_in_its_precision():
    (x, w, bias), targets = operands()
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss.cross_entropy(x, w, bias, targets=targets)
    found = gradients(ours, [x, w, bias])
    halved = [each.detach().bfloat16().requires_grad_() for each in (x, w, bias)]
    expected = gradients(loss.cross_entropy(*halved, targets=targets), halved)
    assert {each.dtype for each in found} == {torch.float32}
    assert all(torch.equal(a, b.float()) for a, b in zip(found, expected, strict=True))


def test_one_chunk_is_alive():
    """Neither forward nor backward is anything of [T, V] made."""
    from lowbit_dist.memory.live import StorageMeter

    (x, w, _), targets = operands()
    chunk, largest = 10, [0]

    class Largest(StorageMeter):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (V,):
                largest[0] = max(largest[0], out.numel() // V)
            return out

    with pytest.MonkeyPatch.context() as patched, Largest():
        patched.setattr(loss, "CHUNK", chunk * V)
        loss.cross_entropy(x, w, targets=targets).backward()
    assert largest[0] in (chunk, K)  # a weight's transposed view, too


SCALED = {
    "cohere": lambda: transformers.CohereConfig(**hf_folders.SIZES, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**hf_folders.SIZES, logits_scaling=4.0),
    "gemma2": hf_folders.CONFIGS["gemma2"],  # a cap of 30
}
PLAIN = (
    "llama", "tied", "qwen3", "gemma", "gemma3", "phi", "gpt_neox", "bloom", "gpt2", "falcon", "qwen3_moe",
    "gpt_oss", "deepseek_v3",
)  # fmt: skip


def built(config):
    """A model with random weights as a run builds it, and the loss and gradients of its own forward pass."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    ours = model.of_hf_config(config, Dense(), torch.float32).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    if getattr(config, "tie_word_embeddings", False):
        ours.tie_weights()
    for name, buffer in theirs.named_buffers():
        ours.get_buffer(name).copy_(buffer)
    return ours


@pytest.mark.parametrize("name", [*PLAIN, *SCALED])
def test_a_models_loss_is_that_of_its_own_forward_pass(name, monkeypatch):
    ours = built({**hf_folders.CONFIGS, **SCALED}[name]())
    tokens = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :9] = IGNORED
    leaves = [p for p in ours.parameters() if p.requires_grad]

    def of(labels):
        nats = ours(input_ids=tokens, labels=labels).loss
        found = torch.autograd.grad(nats, leaves, allow_unused=True)
        return [nats.detach(), *(each for each in found if each is not None)]

    expected, logits = of(labels), ours(input_ids=tokens).logits
    monkeypatch.setattr(loss, "CHUNK", 7 * 512)
    loss.chunk_loss(ours)
    assert (ours.between is not None) == (name in SCALED)
    close(of(labels), expected, 1e-5)
    with torch.no_grad():
        assert ours(input_ids=tokens, labels=labels).logits is None
        assert torch.equal(ours(input_ids=tokens).logits, logits)


@pytest.mark.parametrize(
    ("name", "why"), [("bert", "cannot be followed"), ("opt", "cannot be followed"), ("mamba", "has more")]
)
def test_a_model_that_does_more_keeps_its_own_forward_pass(name, why):
    kept = model.of_hf_config(hf_folders.CONFIGS[name](), Dense(), torch.float32)
    its_class = type(kept)
    assert loss.why_whole(kept).startswith(why)
    loss.chunk_loss(kept)
    assert type(kept) is its_class


def test_a_model_that_does_more_to_its_logits_keeps_its_own_forward_pass():
    class Sorted(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            return self.loss_function(logits.sort(-1).values, labels, vocab_size=512)

    kept = Sorted(transformers.LlamaConfig(**hf_folders.SIZES))
    model.replace_linears(kept, Dense(), is_head=lambda layer: layer is kept.lm_head)
    assert re.match(r"does more to its logits than scale or cap them \(.*sort", loss.why_whole(kept))


def train_in_chunks(configuration, n):
    """A run whose micro-batches of 2 * 64 tokens are several chunks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loss, "CHUNK", n)
        return train(configuration)


SIX = {"steps": 2, "batch_tokens": 12 * 64, "save_every": 2, "eval_every": 2, "reproducible": True}
TIED = {"model": {"layers": 1, "tie_embeddings": True}, "method": {"tensors": "all"}}


@pytest.mark.parametrize("tied", [{"model": {"layers": 1}}, pytest.param(TIED, marks=pytest.mark.slow)])
def test_runs_of_several_chunks_are_equal_on_any_number_of_workers(tied, ranks, small):
    chunk, found = 2**14, {}
    assert chunk // data.read_manifest(small()["data"]["path"]).vocab_size < 2 * 64 / 2, "several chunks"
    for world, more in ((1, {}), (2, {"activation_checkpointing": True}), (3, {})):
        name = f"{len(found)}"
        content = small(run={"name": name}, train={**SIX, **more}, **tied)
        summary = ranks(world).run(train_in_chunks, content, chunk)[0]
        found[name] = summary["digest"], summary["val_loss"]
    assert len(set(found.values())) == 1, found
    whole = ranks(1).run(train_in_chunks, small(run={"name": "whole"}, train=SIX, **tied), 2**27)[0]
    assert whole["val_loss"] == pytest.approx(found["0"][1], abs=1e-3)
