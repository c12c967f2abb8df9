"""A trained model in lm-evaluation-harness: what it says of texts and questions, and `lowbit eval`."""

import json
import math

import pytest
import torch
from cases import slow
from hf_folders import rewrite, write

pytest.importorskip("lm_eval", reason="lm-evaluation-harness, the extra `eval`, is not installed")

from lm_eval.api.instance import Instance

import lowbit_dist
from lowbit_dist import harness
from lowbit_dist.config import ConfigError
from lowbit_dist.evaluate import loaded

TEXT = "def main():\n    return [os.getcwd(), 42]\n" * 12  # several samples of 128 tokens
QUESTIONS = [
    {"q": "def main", "choices": ["():", " and"], "a": 0},
    {"q": "import ", "choices": ["os", "def", "x = 1"], "a": 1},
    {"q": "for i in ", "choices": ["range(3):", "x"], "a": 0},
]
TASKS = {
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "choices": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{a}}"
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    """`folder(change)`: a small model with the corpus's tokenizer."""

    def get(name, change=lambda weights: None, **changed):
        path = write(tmp_path_factory.mktemp("models") / name, "llama", **changed)
        rewrite(path, change)
        for file in (corpus.parent / "tokenizer").iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        return path

    return get


@pytest.fixture(scope="module")
def model(folder):
    return lowbit_dist.open(folder("random"))


@pytest.fixture(scope="module")
def uniform(folder):
    return lowbit_dist.open(folder("uniform", lambda weights: weights["lm_head.weight"].zero_()))


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder of TASKS, of one text and of QUESTIONS."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"texts": [{"page": TEXT}], "choices": QUESTIONS, "answers": [{"q": "def ", "a": "x"}]}
    for name, content in TASKS.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows[name])))
        head = f"task: {name}\ndataset_path: json\ntest_split: test\nmetadata: {{version: 1.0}}\n"
        source = f"dataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(head + source + content)
    return tmp_path


def asked(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def test_a_uniform_model_needs_the_vocabularys_bits_for_each_token(uniform, tasks):
    found = harness.run(uniform, ["texts", "choices"], folder=tasks)["tasks"]
    n = len(uniform.tokenizer.encode(TEXT)) + 2  # with the document's marks, as `lowbit eval` counts
    bits = math.log2(512)
    assert found["texts"]["bits_per_byte"] == pytest.approx(bits * n / len(TEXT.encode()), rel=1e-6)
    backend = harness.Backend(uniform)
    ((score, _),) = backend.loglikelihood(asked("loglikelihood", ("def main", "():")), disable_tqdm=True)
    n = len(uniform.tokenizer.encode("def main():")) - len(uniform.tokenizer.encode("def main"))
    assert score == pytest.approx(-n * math.log(512), rel=1e-6) and n > 1


@pytest.mark.parametrize("text", [TEXT, "a few words"])
def test_bits_per_byte_of_a_text_are_those_of_lowbit_eval(text, model, tasks):
    (tasks / "texts.jsonl").write_text(json.dumps({"page": text}))
    (tasks / "text.txt").write_text(text)
    expected = model.evaluate(str(tasks / "text.txt"))["bits_per_byte"]
    found = harness.run(model, ["texts"], folder=tasks)["tasks"]["texts"]
    assert found["bits_per_byte"] == pytest.approx(expected, abs=1e-6)
    assert found["byte_perplexity"] == pytest.approx(2**expected, rel=1e-6)


def test_a_continuation_has_the_sum_of_its_tokens_log_probabilities(model):
    backend, network = harness.Backend(model), loaded(model)
    pairs = [(row["q"], choice) for row in QUESTIONS for choice in row["choices"]] + [("", "def main():")]
    scores = backend.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (score, is_likeliest) in zip(pairs, scores, strict=True):
        begun, whole = ([1, *model.tokenizer.encode(text)] for text in (context, context + continuation))
        kept = context.rstrip()  # a space at the end belongs to what follows
        begun = [1, *model.tokenizer.encode(kept)]
        with torch.inference_mode():
            logits = network(input_ids=torch.tensor([whole])).logits[0].double()
        chances = logits.log_softmax(-1)[len(begun) - 1 : -1]
        expected = chances.gather(1, torch.tensor(whole[len(begun) :])[:, None]).sum().item()
        assert score == pytest.approx(expected, abs=1e-4)
        assert is_likeliest == bool((chances.argmax(-1) == torch.tensor(whole[len(begun) :])).all())


def test_the_likeliest_continuation_is_said_to_be_so(model):
    text = model.generate("def ", max_new_tokens=3, temperature=0)["text"]
    ids = [1, *model.tokenizer.encode("def")], model.tokenizer.encode("def " + text)[1:]
    backend = harness.Backend(model)
    likely = [tuple(ids[0] + ids[1])]
    with torch.inference_mode():
        best = loaded(model)(input_ids=torch.tensor(likely)).logits[0].argmax(-1).tolist()
    pairs = [(("", ""), list(likely[0]), [best[-1]]), (("", ""), list(likely[0]), [best[-1] ^ 1])]
    assert [flag for _, flag in backend._loglikelihood_tokens(pairs, disable_tqdm=True)] == [True, False]


def test_what_is_too_long_loses_its_beginning(model):
    backend, ids = harness.Backend(model), list(range(3, 203))
    assert backend.max_length == 128
    short, long = (
        backend._loglikelihood_tokens([(("", ""), context, [5, 6])])[0] for context in (ids[-127:], ids)
    )
    assert long == short
    answers = backend.generate_until(
        asked("generate_until", ("word " * 300, {"until": ["zzz"]})), disable_tqdm=True
    )
    assert answers[0]


def test_a_context_that_is_cut_inside_a_character_still_fits(model):
    backend, text = harness.Backend(model), "x" + "\U00010348" * 100
    encode = model.tokenizer.encode
    assert len(encode(text)) > 300, "each character is spelled in bytes"
    for n_most in range(60, 68):
        end = backend._end_of(text, n_most)
        assert n_most - 16 < len(encode(end)) <= n_most and end.endswith("\U00010348" * 8)
    assert backend._end_of("def main", 100) == "def main"


def test_answers_are_the_generated_text_up_to_a_stop(model, tasks):
    text = model.generate("def ", max_new_tokens=20, temperature=0)["text"]
    backend = harness.Backend(model)
    requests = [("def ", {"until": [text[5:8]], "max_gen_toks": 20}), ("def ", {"max_gen_toks": 20})]
    found = backend.generate_until(asked("generate_until", *requests), disable_tqdm=True)
    assert found == [text[: text.find(text[5:8])], text]


def test_the_verb_prints_each_tasks_metrics(model, tasks, lowbit):
    done = lowbit("eval", model.path, "--tasks", "choices, answers", "--task-folder", tasks, "--json")
    answer = json.loads(done.stdout)
    assert set(answer["tasks"]) == {"choices", "answers"}
    assert answer["tasks"]["choices"]["acc"] in (pytest.approx(i / 3) for i in range(4))
    one = lowbit("eval", model.path, "--tasks", "choices", "--task-folder", tasks, "--samples", 1, "--json")
    assert json.loads(one.stdout)["tasks"]["choices"]["acc"] in (0, 1)
    assert "exact_match" in lowbit("eval", model.path, "--tasks", "answers", "--task-folder", tasks).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # Hundreds of files say so.
        *slow((["--tasks", "absent"], "--tasks (absent) is no task of lm-evaluation-harness, nor in")),
        (["--tasks", ","], "--tasks (,) must be names with commas between them"),
        (["--tasks", "texts", "--data", "x"], "--data does not go with --tasks"),
        (["--tasks", "texts", "--field", "x"], "--field does not go with --tasks"),
        *slow((["--tasks", "texts", "--on-bad-row", "skip"], "--on-bad-row does not go with --tasks")),
        ([], "--task-folder needs --tasks; write --data PATH, or --tasks NAME"),
    ],
)
def test_tasks_that_are_not_there_are_refused(arguments, words, model, tasks, lowbit):
    data = [] if "--tasks" in arguments else ["--data", "x"]
    done = lowbit("eval", model.path, *arguments, *data, "--task-folder", tasks)
    assert done.returncode == 2 and words in done.stderr


def test_a_task_folder_that_is_none_is_named(model, tmp_path):
    with pytest.raises(ConfigError, match=r"--task-folder .* is no folder"):
        harness.run(model, ["x"], folder=tmp_path / "absent")
