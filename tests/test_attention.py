"""Attention within documents: two of them in a sample have the logits that each has alone."""

import threading
from contextlib import nullcontext
from dataclasses import replace

import hf_folders
import pytest
import torch
import transformers
from preparing import prepare_alone
from test_train import train

import lowbit_dist
from lowbit_dist import attention, configfile, data, model
from lowbit_dist.config import ConfigError, Data
from lowbit_dist.tokenizer import Marks

SEQ = 64
MARKS = {"both": Marks(1, 2), "a beginning": Marks(1, None), "an end": Marks(None, 2)}
ARCHITECTURES = (
    "llama", "tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "gpt_neox", "gpt2", "mixtral",
    "qwen3_moe",
)  # fmt: skip


def documents(marks: Marks) -> list[list[int]]:
    """The end of one, two whole ones, and the beginning of another."""
    texts = [[7, 8, 9, 300], [40, 41, 42, 43, 44, 45, 46], [50, 51, 52], [60, 61, 62, 63, 64]]
    whole = [marks.around(text) for text in texts]
    first, *others, last = whole
    return [first[2:], *others, last[:4]]


def built(name: str):
    torch.manual_seed(0)
    # In float64, so that what is left of differences is not of sums in another order.
    return transformers.AutoModelForCausalLM.from_config(hf_folders.CONFIGS[name]()).eval().double()


def test_the_mask_is_block_diagonal_and_positions_begin_anew():
    tokens = torch.tensor([[1, 5, 2, 1, 6, 7], [5, 2, 1, 2, 1, 9]])
    for marks in (Marks(1, 2), Marks(1, None), Marks(None, 2)):
        inputs = attention.within_documents(tokens, marks, torch.bfloat16)
        assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 1]]
        mask = inputs["attention_mask"]
        assert (mask.shape, mask.dtype) == ((2, 1, 6, 6), torch.bfloat16)
        of_first = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).tril()
        of_second = torch.block_diag(*[torch.ones(2, 2)] * 3).tril()
        assert torch.equal((mask[:, 0] == 0).float(), torch.stack([of_first, of_second]))
        assert set(mask.flatten().tolist()) == {0.0, torch.finfo(torch.bfloat16).min}


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_documents_in_a_sample_have_the_logits_that_each_has_alone(name, marks):
    marks = MARKS[marks]
    parts = documents(marks)
    tokens = torch.tensor([[token for part in parts for token in part]])
    network = built(name)
    assert attention.why_not_within_documents(network, tokens.shape[1]) is None
    with torch.inference_mode():
        inputs = attention.within_documents(tokens, marks, torch.float64)
        together = network(input_ids=tokens, labels=tokens, **inputs)
        alone = torch.cat([network(input_ids=torch.tensor([part])).logits[0] for part in parts])
        without = network(input_ids=tokens).logits[0]
    assert (together.logits[0] - alone).abs().max() <= 1e-6 * alone.abs().max()
    n = len(parts[0])
    assert (without[n:] - alone[n:]).abs().max() > 1e-3 * alone.abs().max(), "the mask must matter"
    nats = torch.nn.functional.cross_entropy(alone[:-1].double(), tokens[0, 1:])
    assert together.loss.item() == pytest.approx(nats.item(), rel=1e-6)


def test_no_gradient_leaves_a_document():
    marks = MARKS["both"]
    parts = documents(marks)
    tokens = torch.tensor([[token for part in parts for token in part]])
    network = built("llama")
    embedded = network.get_input_embeddings()(tokens).detach().requires_grad_()
    inputs = attention.within_documents(tokens, marks, torch.float64)
    logits = network(inputs_embeds=embedded, **inputs).logits[0]
    begin, end = len(parts[0]), len(parts[0]) + len(parts[1])
    logits[begin:end].sum().backward()
    reached = (embedded.grad[0] != 0).any(1)
    assert reached[begin:end].all()
    assert not reached[:begin].any() and not reached[end:].any()


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_a_model_that_makes_its_own_mask_is_refused(name, tmp_path):
    folder = hf_folders.write(tmp_path / "model", name)
    sections = {
        "model": {"pretrained": str(folder)},
        "method": {"name": "dense"},
        "data": {"path": "data", "seq_len": SEQ, "document_mask": True},
        "train": {"batch_tokens": 16 * SEQ},
    }
    with pytest.raises(
        ConfigError, match=r"data\.document_mask \(true\) must be false.*its own mask"
    ) as error:
        model.check(configfile.from_dict(sections), 512)
    assert "\n" not in str(error.value)
    sections["data"]["document_mask"] = False
    model.check(configfile.from_dict(sections), 512)


def test_a_window_shorter_than_a_sample_is_refused():
    network = built("mistral")
    network.config.sliding_window = 16
    assert attention.why_not_within_documents(network, 16) is None
    assert "looks back 16 tokens" in attention.why_not_within_documents(network, 17)


@pytest.fixture
def short(corpus, tmp_path):
    """Data of short documents, of which a sample holds several."""
    for n in range(300):
        file = tmp_path / "texts" / f"{n:03}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"def add_{n}(self, x):\n    return x + {n * n}\n")
    source = [tmp_path / "texts"]
    prepare_alone(source, corpus.parent / "tokenizer", tmp_path / "short", seq_len=SEQ, val_fraction=0.1)
    return tmp_path / "short"


def test_a_run_trains_validates_and_is_evaluated_within_documents(ranks, small, short, tmp_path):
    sections = {"method": {"name": "dense"}, "optimizer": {"states": "fp32"}}
    masked = {"path": str(short), "document_mask": True}
    summary = ranks(1).run(train, small(run={"name": "masked"}, data=masked, **sections))[0]
    plain = ranks(1).run(train, small(run={"name": "plain"}, data={"path": str(short)}, **sections))[0]
    assert summary["digest"] != plain["digest"], "training has the mask"

    trained = lowbit_dist.open("masked", tmp_path)
    assert trained.evaluate(str(short))["loss"] == pytest.approx(summary["val_loss"], abs=1e-5)
    unmasked = replace(trained, samples=replace(trained.samples, document_mask=False))
    assert abs(unmasked.evaluate(str(short))["loss"] - summary["val_loss"]) > 5e-5

    # Each document alone, in a loop of its own.
    batches = data.Batches(Data(path=str(short), seq_len=SEQ, cache=tmp_path / "cache"), "val", 0)
    samples = batches.micro_batch(0, trained.samples.number)
    network, losses = trained.network(), []
    for sample in samples.tolist():
        starts = sorted({0, *(k for k, token in enumerate(sample) if token == 1)})
        assert len(starts) > 1, "the case must have several documents"
        parts = [sample[begin:end] for begin, end in zip(starts, [*starts[1:], SEQ], strict=True)]
        with torch.inference_mode():
            logits = torch.cat([network(input_ids=torch.tensor([part])).logits[0] for part in parts])
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(sample[1:])).item())
    assert summary["val_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.integration
def test_the_plan_counts_the_mask():
    from lowbit_dist.memory import simulation

    def activations(document_mask):
        sections = {
            "model": {"hidden_size": 256, "intermediate_size": 512, "layers": 2, "heads": 4, "kv_heads": 2},
            "method": {"name": "dense"},
            "data": {"path": "data", "seq_len": 128, "document_mask": document_mask},
            "precision": "fp32",
            "train": {"micro_batch": 2, "batch_tokens": 4 * 128},
            "cluster": {"workers": 1},
        }
        return simulation.simulate_step(configfile.from_dict(sections), 512, 1).activations

    assert activations(True) != activations(False)


def test_data_that_does_not_say_what_separates_documents_is_refused(short):
    import json

    config = configfile.from_dict(
        {
            "data": {"path": str(short), "seq_len": SEQ, "document_mask": True},
            "train": {"batch_tokens": 16 * SEQ},
        }
    )
    data.check(config)
    file = short / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in ("document_begin", "document_end", "tokenizer_files"):  # as an earlier version wrote it
        del manifest[name]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"data\.document_mask \(true\) needs data that says"):
        data.check(config)
    data.check(config.model_copy(update={"data": config.data.model_copy(update={"document_mask": False})}))


def attended(network, tokens, within):
    """Logits and the gradients of parameters, and which keywords attention had in each layer."""
    from torch.nn import functional

    calls, attend = [], functional.scaled_dot_product_attention

    def recorded(*args, **keywords):
        calls.append(keywords)
        return attend(*args, **keywords)

    network.zero_grad()
    with pytest.MonkeyPatch.context() as patch, within(network):
        patch.setattr(functional, "scaled_dot_product_attention", recorded)
        out = network(input_ids=tokens, labels=tokens, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), [p.grad.clone() for p in network.parameters()], calls


@pytest.mark.parametrize("name", ["llama", "tied", "qwen2", "qwen3", "phi", "gpt_neox", "mixtral"])
def test_plain_samples_are_attended_without_a_mask(name):
    network, tokens = built(name), torch.randint(500, (2, 24), generator=torch.Generator().manual_seed(0))
    logits, gradients, calls = attended(network, tokens, attention.causal)
    assert calls and all(call["attn_mask"] is None and call["is_causal"] for call in calls)
    masked_logits, masked_gradients, masked = attended(network, tokens, nullcontext)
    assert all(call["attn_mask"] is not None and not call["is_causal"] for call in masked), "as without"
    assert torch.allclose(logits, masked_logits, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients, masked_gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_layers_that_look_back_less_keep_their_mask():
    config = hf_folders.CONFIGS["mistral"]()
    config.sliding_window = 8
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config).eval().double()
    tokens = torch.randint(500, (2, 24), generator=torch.Generator().manual_seed(0))
    logits, _, calls = attended(network, tokens, attention.causal)
    assert all(call["attn_mask"] is not None for call in calls)
    assert torch.equal(logits, attended(network, tokens, nullcontext)[0])


def test_samples_are_packed_again_outside_and_in_other_threads():
    """What one thread's context lets go of, another's has, however they overlap."""
    network = built("llama")
    tokens = torch.arange(5, 13)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])

    def second_half():
        with torch.inference_mode():
            return network(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 4:]

    with torch.inference_mode():
        alone = network(input_ids=tokens[:, 4:], use_cache=False).logits
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    within = []

    def first():
        with attention.causal(network):
            first_in.set()
            assert second_in.wait(60)
        first_out.set()

    def second():
        assert first_in.wait(60)
        with attention.causal(network):
            second_in.set()
            assert first_out.wait(60)
            within.append(second_half())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    between = second_half()
    for thread in threads:
        thread.join()
    with pytest.raises(KeyError), attention.causal(network):
        raise KeyError
    for packed in (between, second_half()):
        assert torch.allclose(packed, alone, rtol=1e-9, atol=1e-9)
    assert (within[0] - alone).abs().max() > 1e-3, "inside nothing is packed"


DOGE = {**hf_folders.SIZES, "initializer_range": 0.3}


def test_a_model_that_makes_a_mask_of_none_keeps_its_own(tmp_path):
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(transformers.DogeConfig(**DOGE)).eval()
    network.save_pretrained(tmp_path / "doge")
    tokens = torch.arange(5, 37)[None]
    other = tokens.clone()
    other[:, 16:] = 7
    with torch.inference_mode(), attention.causal(network):
        one, two = (network(input_ids=ids, use_cache=False).logits[:, :16] for ids in (tokens, other))
    assert torch.equal(one, two)
    assert lowbit_dist.open(tmp_path / "doge").network()(input_ids=tokens).logits.isfinite().all()


def test_a_model_that_would_attend_to_what_follows_is_refused(tmp_path, monkeypatch):
    """Whatever its name: one more that needs its mask is found by what it does."""
    torch.manual_seed(0)
    config = transformers.DogeConfig(**DOGE)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "doge")
    monkeypatch.setattr(attention, "MASKED", ())
    assert attention.sees_what_follows(config)
    with pytest.raises(ConfigError, match="DogeForCausalLM reads a text in both directions"):
        lowbit_dist.open(tmp_path / "doge")


@pytest.mark.parametrize("name", sorted(set(hf_folders.CONFIGS) - {"bert"}))
def test_models_whose_tokens_see_what_is_before_them(name):
    state = torch.get_rng_state()
    assert attention.sees_what_follows(hf_folders.CONFIGS[name]()) is False
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "config",
    [
        transformers.XLNetConfig(),
        transformers.BertGenerationConfig(),
        transformers.CpmAntConfig(),
        transformers.ProphetNetConfig(),
        transformers.RobertaConfig(),
    ],
    ids=lambda config: config.model_type,
)
def test_models_whose_tokens_see_what_follows(config):
    assert attention.sees_what_follows(config)


def test_of_what_cannot_be_made_small_nothing_is_known():
    assert attention.sees_what_follows(transformers.MusicgenConfig) is None


def test_scores_that_are_divided_by_the_layers_number_are(tmp_path):
    """transformers does that to GPT-2's in its plain way of attention alone."""
    folder = hf_folders.write(
        tmp_path / "gpt2", "gpt2", scale_attn_by_inverse_layer_idx=True, initializer_range=0.2
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = torch.arange(5, 37)[None]
    with torch.inference_mode():
        logits = lowbit_dist.open(folder).network()(input_ids=tokens).logits
        assert torch.allclose(logits, plain(input_ids=tokens).logits, atol=1e-4)
        plain.config._attn_implementation = "sdpa"
        assert (logits - plain(input_ids=tokens).logits).abs().max() > 0.1, "the division must matter"
