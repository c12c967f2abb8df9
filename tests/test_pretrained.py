"""A Hugging Face folder is right, its numbers those of transformers, or refused in one line."""

import json
import logging

import pytest
import torch
import transformers
from hf_folders import CONFIGS, in_blocks_of_fp8, in_packed_codes, reconfigure, rewrite, write

import lowbit_dist
from lowbit_dist import configfile, experts, model, pretrained
from lowbit_dist.config import ConfigError
from lowbit_dist.linear import Linear

IDS = torch.tensor([[1, 17, 300, 5, 5, 511, 42, 9, 260, 33, 2, 8]])
EVALUATED = [name for name in CONFIGS if name != "bert"]
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]
TRAINED = [
    "llama", "llama3", "tied", "qwen3", "gemma", "gemma2", "gemma3", "gpt_neox", "opt", "bloom", *MIXTURES,
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder("opt")`: the folder of a small model, made once; `folder("opt", ...)`: one that is changed."""
    made = {}

    def get(name, **changed):
        key = name, *sorted(changed.items())
        if key not in made:
            made[key] = write(tmp_path_factory.mktemp("models") / name, name, **changed)
        return made[key]

    return get


@pytest.fixture
def fresh(tmp_path):
    """`fresh("llama", change)`: a folder that the test has for itself."""

    def get(name, change=lambda at: None, **changed):
        path = write(tmp_path / name, name, **changed)
        change(path)
        return path

    return get


@pytest.fixture
def run(small):
    """`run(folder, name="dqt")`: the configuration of a run that begins with a folder's weights."""

    def configuration(path, *, seq_len=64, **method):
        content = small(
            method={"name": "dqt", **method}, data={"seq_len": seq_len}, train={"batch_tokens": 4 * seq_len}
        )
        return configfile.from_dict({**content, "model": {"pretrained": str(path)}})

    return configuration


def theirs(path):
    """In the attention that transformers writes out: its fused one does less than some models say."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def loaded(config):
    """The model that a run would train, on this one process, in training mode."""
    built = model.build(config.model, 512, config.method, torch.float32)
    initial = model.InitialWeights(built, config.method, 0, config.model.pretrained)
    weights = {name: initial(name, p.shape) for name, p in built.named_parameters()}
    built.load_state_dict(weights, strict=False, assign=True)
    built.tie_weights()
    return built.requires_grad_().train()


def assert_close(ours, expected):
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", EVALUATED)
def test_the_logits_of_a_folder_are_those_of_transformers(name, folder):
    trained = lowbit_dist.open(folder(name))
    with torch.inference_mode():
        assert_close(trained.network()(input_ids=IDS).logits, theirs(folder(name))(input_ids=IDS).logits)


@pytest.mark.parametrize("name", EVALUATED)
def test_a_configuration_is_the_same_when_it_comes_out_of_a_checkpoint(name, folder):
    kept = pretrained.as_mapping(pretrained.configuration(folder(name)))
    again = pretrained.as_mapping(pretrained.of_mapping(kept))
    for mapping in (kept, again):  # what is chosen when a model is built
        mapping.pop("attn_implementation", None)
    assert again == kept


@pytest.mark.parametrize("name", ["bloom", "gpt2"])
def test_a_model_that_was_saved_without_its_head_has_the_names_that_transformers_gives_it(name, fresh, run):
    path = fresh(name, of_base=True)
    with torch.inference_mode():
        expected = theirs(path)(input_ids=IDS).logits
        assert_close(lowbit_dist.open(path).network()(input_ids=IDS).logits, expected)
        assert_close(loaded(run(path, name="dense"))(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("name", [*TRAINED, "gpt2"])
def test_a_run_begins_with_the_loss_of_transformers(name, folder, run):
    """In training mode, so without its configuration's dropout, and with all experts running."""
    with torch.no_grad():
        expected = theirs(folder(name))(input_ids=IDS, labels=IDS).loss
        began = loaded(run(folder(name), name="dense"))
        ours = [began(input_ids=IDS, labels=IDS).loss for _ in range(2)]
    assert torch.equal(*ours)
    assert_close(ours[0], expected)


@pytest.mark.parametrize("name", TRAINED)
def test_the_layers_of_a_pretrained_model_become_low_bit(name, folder, run):
    config = run(folder(name))
    model.check(config, 512)
    built = model.shapes(config, 512)
    low_bit = set(model.low_bit_names(built, config.method))
    n_experts = 3 * experts.number(built) if name in MIXTURES else 0
    assert len([each for each in low_bit if ".experts." in each]) == 2 * n_experts
    rest = {each for each, p in built.named_parameters() if p.dim() > 1} - low_bit
    words = ("embed", "lm_head", "mlp.gate.", "moe.gate.", "shared_expert_gate.")
    assert [each for each in rest if not any(word in each for word in words)] == []


def test_norms_of_the_methods_own_stand_where_it_says_or_are_not_asked_for(folder, run):
    for name, has_norms in (("llama", True), ("gemma2", True), ("olmoe", True), ("phi", False)):
        config = run(folder(name), name="bitnet", sub_norms=has_norms)
        model.check(config, 512)
        layers = model.shapes(config, 512).named_modules()
        normed = {at.rpartition(".")[2] for at, layer in layers if type(layer) is Linear and layer.norm}
        assert normed == ({"o_proj", "down_proj"} if has_norms else set())


REFUSED = {
    # what is in the files
    "weights in blocks of float8": (
        "llama", {}, lambda at: rewrite(at, in_blocks_of_fp8), ("F8_E4M3", "proj.weight", "not quantised")),
    "scales beside weights": (
        "llama", {}, lambda at: rewrite(at, lambda w: w.update({"model.norm.weight_scale": torch.ones(1)})),
        ("model.norm.weight_scale", "no parameter")),
    "a configuration that says so": (
        "llama", {}, lambda at: reconfigure(at, quantization_config={"quant_method": "fp8"}),
        ("quantised already", "fp8")),
    "weights in packed codes": (
        "llama", {}, lambda at: rewrite(at, in_packed_codes), ("qweight", "I32", "not quantised")),
    "int8 weights": (
        "llama", {}, lambda at: rewrite(
            at, lambda w: w.update({"lm_head.weight": torch.zeros(512, 256).char()})),
        ("lm_head.weight", "I8", "not quantised")),
    "a norm that is missing": (
        "llama", {}, lambda at: rewrite(at, lambda w: w.pop("model.norm.weight")),
        ("model.norm.weight", "none of the folder's")),
    "a bias that has no place": (
        "llama", {}, lambda at: rewrite(
            at, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(256)})),
        ("self_attn.q_proj.bias", "no parameter")),
    "a layer more than the configuration says": (
        "llama", {}, lambda at: reconfigure(at, num_hidden_layers=1),
        ("model.layers.1.", "8 more", "no parameter")),
    "norms before layers of other names": (
        "opt", {"name": "bitnet"}, None,
        ("method bitnet", "OPTForCausalLM has no o_proj and no down_proj", "method.sub_norms: false")),
    "norms before some of the layers alone": (
        "mixtral", {"name": "dqt", "sub_norms": True}, None, ("MixtralForCausalLM has no down_proj",)),
    # what transformers builds
    "layers that are no linears": (
        "gpt2", {"name": "dqt"}, None, ("gpt2", "method dqt", "Conv1D", "100%", "method.name: dense")),
    "the same for latent weights": ("gpt2", {"name": "bitnet"}, None, ("method bitnet", "Conv1D")),
    "linears of a class of their own": ("falcon", {"name": "dqt"}, None, ("method dqt", "FalconLinear")),
    "experts in one parameter": ("gpt_oss", {"name": "dqt"}, None, ("GptOssExperts", "experts.gate_up_proj")),
    "experts that are passed over": ("phimoe", {}, None, ("PhimoeForCausalLM", "runs 0 of 4")),
    "a state": ("mamba", {}, None, ("MambaForCausalLM", "recurrent state")),
    "weights that are buffers": (
        "deepseek_v3", {}, None, ("DeepseekV3ForCausalLM", "e_score_correction_bias")),
    "both directions": ("bert", {}, None, ("BertLMHeadModel", "both directions")),
    "both directions, where others of its kind read in one": (
        "gemma3", {}, lambda at: reconfigure(at, use_bidirectional_attention=True),
        ("Gemma3ForCausalLM", "both directions")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_is_refused_in_one_line(case, fresh, run):
    name, method, change, words = REFUSED[case]
    config = run(fresh(name, change or (lambda at: None)), **{"name": "dense", **method})
    with pytest.raises(ConfigError) as error:
        model.check(config, 512)
    line = str(error.value)
    assert line.startswith("model.pretrained (") and "; write " in line
    assert "\n" not in line and len(line) < 600
    for each in words:
        assert each in line


def test_evaluation_refuses_the_same_files(fresh):
    for case in (
        "weights in blocks of float8",
        "a norm that is missing",
        "a bias that has no place",
        "both directions",
        "both directions, where others of its kind read in one",
    ):
        name, _, change, words = REFUSED[case]
        path = fresh(name, change or (lambda at: None))
        with pytest.raises(ConfigError, match="write") as error:
            lowbit_dist.open(path)
        assert all(word in str(error.value) for word in words), error.value


def test_what_transformers_passes_over_is_passed_over(fresh, run):
    """A second copy of a tied head, and what rotary embeddings were computed from in older versions."""

    def add(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)

    path = fresh("tied", lambda at: rewrite(at, add))
    model.check(run(path), 512)
    with torch.inference_mode():
        assert_close(
            lowbit_dist.open(path).network()(input_ids=IDS).logits, theirs(path)(input_ids=IDS).logits
        )


def test_what_a_run_does_otherwise_than_the_folder_says_is_said(folder, run, caplog):
    with caplog.at_level(logging.WARNING):
        model.check(run(folder("opt")), 500)
    (chance, whole, vocabulary) = [record.message for record in caplog.records]
    assert "all logits of a micro-batch are in memory" in whole
    assert "dropout=0.1, layerdrop=0.1" in chance and "trains without" in chance
    assert "a vocabulary of 512, the data's tokenizer 500" in vocabulary and "never generated" in vocabulary
    caplog.clear()
    model.check(run(folder("llama")), 512)
    assert not caplog.records


def test_the_tokens_of_the_data_need_an_embedding_and_others_of_its_tokenizer_do_not(folder, run, caplog):
    config = run(folder("llama"))
    with caplog.at_level(logging.WARNING):
        model.check(config, 513, used=512)
    (record,) = caplog.records
    assert "a vocabulary of 512, the data's tokenizer 513; the rest is not in the data" in record.message
    with pytest.raises(
        ConfigError, match=r"of 512, the data's tokenizer 513, and the data has its token 512;"
    ):
        model.check(config, 513, used=513)
    with pytest.raises(ConfigError, match=r"of 512, the data's tokenizer 513; prepare the data with the"):
        model.check(config, 513)


def test_chance_is_a_kind_of_name():
    config = transformers.DbrxConfig(
        attn_config={"attn_pdrop": 0.1}, ffn_config={"moe_jitter_eps": 0.1}, resid_pdrop=0.1, emb_pdrop=0.1
    )
    config.output_router_logits = True
    assert len(pretrained.without_chance(config)) == 5
    assert pretrained.without_chance(config) == []
    assert (config.resid_pdrop, config.attn_config.attn_pdrop, config.ffn_config.moe_jitter_eps) == (0, 0, 0)


def test_a_sample_is_no_longer_than_the_models_positions(folder, run):
    for name in ("gpt2", "opt"):
        model.check(run(folder(name), name="dense", seq_len=128), 512)
        with pytest.raises(ConfigError, match=r"data.seq_len \(129\) must be at most 128"):
            model.check(run(folder(name), name="dense", seq_len=129), 512)
    model.check(run(folder("bloom"), seq_len=4096), 512)


def test_routers_stay_as_they_are_and_idle_experts_get_a_gradient_of_zero(folder, run):
    network = loaded(run(folder("mixtral")))
    network(input_ids=torch.full((1, 8), 5), labels=torch.full((1, 8), 5)).loss.backward()
    sums = {name: p.grad.abs().sum().item() for name, p in network.named_parameters() if p.grad is not None}
    assert sums.keys() == {name for name, _ in network.named_parameters()}
    of_experts = [total for name, total in sums.items() if ".experts." in name]
    assert len(of_experts) == 24 and of_experts.count(0) == 18, "one token chooses one of four experts"
    assert type(network.model.layers[0].block_sparse_moe.gate) is torch.nn.Linear


def two_micro_batches(configuration):
    """The codes and weights after a step in which the two micro-batches choose different experts."""
    import torch

    from lowbit_dist import configfile, model, ops
    from lowbit_dist.zero import Engine

    config = configfile.from_dict(configuration)
    built = model.build(config.model, 512, config.method, torch.float32)
    chosen = []
    for layer in built.model.layers:
        layer.block_sparse_moe.gate.register_forward_hook(
            lambda _, __, out: chosen.append({*out.argmax(-1).tolist()})
        )
    initial = model.InitialWeights(built, config.method, 0, config.model.pretrained)
    engine = Engine(config, built, initial, model.low_bit_names(built, config.method))
    with engine.step(ops.Now(lr=1e-2, weight_decay=0.0, step=1, seed=0)) as step:
        for i in range(engine.rank, 2, engine.world):
            step.backward(torch.full((2, 64), (5, 7)[i]))
    found = {(s.name, s.start): (s.codes if s.codes is not None else s.weight).clone() for s in engine.shards}
    engine.close()
    return chosen, found, step.done.grad_norm


@pytest.mark.parametrize("stage", [None, 2])
def test_workers_whose_tokens_choose_different_experts_train_them_all(stage, folder, ranks, small):
    method = {"name": "dqt", "grid": "int4"} if stage is None else {"name": "dense"}
    content = small(train={"batch_tokens": 256, "micro_batch": 2})
    content |= {"method": method, "model": {"pretrained": str(folder("mixtral"))}, "zero": {"stage": stage}}
    content["optimizer"] = {"lr": 1e-2, "states": "fp32"}
    ((both, alone, norm),) = ranks(1).run(two_micro_batches, content)
    first, second = ranks(2).run(two_micro_batches, content)
    assert both == first[0] + second[0]
    assert any(a != b for a, b in zip(first[0], second[0], strict=True)), (
        "the case must choose different ones"
    )
    assert first[2] == second[2] == pytest.approx(norm, rel=1e-6)
    if stage is None:
        for name in {name for name, _ in alone}:
            parts = [
                {**first[1], **second[1]}[key] for key in sorted({*first[1], *second[1]}) if key[0] == name
            ]
            whole = alone[name, 0]
            assert torch.equal(torch.cat(parts)[: len(whole)], whole), name


@pytest.mark.parametrize(
    "name",
    [
        "mixtral", "mamba",
        *(pytest.param(each, marks=pytest.mark.slow)
          for each in ("opt", "qwen3_moe", "bloom", "gemma2", "gemma3", "gpt2")),
    ],
)  # fmt: skip
def test_the_plan_of_an_architecture_is_made_or_refused_in_one_line(name, folder, lowbit, tmp_path, corpus):
    (tmp_path / "run.yaml").write_text(
        f"run: {{dir: {tmp_path}}}\ndata: {{path: {corpus}, seq_len: 64}}\n"
        "train: {steps: 2, batch_tokens: 1024}\ncluster: {workers: 1}\n"
    )
    override = f"model={{pretrained: {folder(name)}}}"
    done = lowbit("plan", tmp_path / "run.yaml", override, "--vocab-size", 512, "--json")
    if name in ("mamba", "gpt2"):
        for answer in (done, lowbit("train", tmp_path / "run.yaml", override)):
            assert (answer.returncode, answer.stdout) == (2, "")
            (line,) = answer.stderr.splitlines()
            assert line.startswith(f"lowbit: model.pretrained ({folder(name)}) cannot be trained")
        assert not (tmp_path / "run").exists(), "it was refused before anything was made"
    else:
        assert done.returncode == 0, done.stderr
        plan = json.loads(done.stdout)
        assert plan["peak_bytes_per_worker"] > plan["resident_bytes_per_worker"] > 0


def few_steps(configuration):
    from lowbit_dist import configfile, loop

    return loop.run(configfile.from_dict(configuration))


@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_a_run_has_one_digest_on_any_number_of_workers_and_its_loss_is_that_of_its_checkpoint(
    name, folder, ranks, small, corpus
):
    def content(run):
        shape = small(
            run={"name": run}, train={"steps": 3, "eval_every": 3, "save_every": 3, "reproducible": True}
        )
        return {**shape, "model": {"pretrained": str(folder(name))}}

    (alone,) = ranks(1).run(few_steps, content("alone"))
    (both, _) = ranks(2).run(few_steps, content("both"))
    assert both["digest"] == alone["digest"]
    trained = lowbit_dist.open(both["checkpoint"])
    assert trained.evaluate(str(corpus))["loss"] == pytest.approx(alone["val_loss"], abs=1e-5)
    assert trained.generate("def ", max_new_tokens=5)["tokens"] > 0
