"""A trained model in lm-evaluation-harness (the extra `eval`): tasks by their names, and their metrics.

Texts begin with the token that begins a document in training, contexts of questions too.  Whole texts
(`loglikelihood_rolling`, of which perplexities and bits per byte are made) are measured as by `lowbit eval`:
in samples as long as those of the training, the marks of a document being tokens as others are, and the
first token of a sample, which is predicted from nothing, counting as much as the mean of the others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from lowbit_dist import attention
from lowbit_dist.errors import ConfigError
from lowbit_dist.evaluate import PRODUCTS, loaded, text_loss
from lowbit_dist.trained import TEXT_LENGTH, Trained

NEW_TOKENS = 256  # of an answer, where a task does not say
BATCH = 8  # questions that are read together

Scored = tuple[tuple[str, str], list[int], list[int]]  # texts and ids of a context and its continuation


def run(
    trained: Trained,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    integer: bool = False,
) -> dict[str, Any]:
    """The metrics of each task, the harness's or one whose YAML file lies in `folder`; of its first `limit`
    questions.  `integer`: see `evaluate.loaded`.
    """
    manager = _manager(tasks, folder)
    measured = lm_eval.simple_evaluate(
        model=Backend(trained, integer=integer), tasks=list(tasks), task_manager=manager, limit=limit,
        bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    assert measured is not None, "this process is the first of the harness's"
    numbers = {
        task: {
            metric.removesuffix(",none"): value
            for metric, value in metrics.items()
            if isinstance(value, int | float) and "_stderr," not in metric
        }
        for task, metrics in measured["results"].items()
    }
    return {
        "checkpoint": str(trained.path), "step": trained.step, "products": PRODUCTS[integer], "tasks": numbers
    }  # fmt: skip


def _manager(tasks: Sequence[str], folder: Path | None) -> TaskManager:
    """Knows all the tasks; the harness's own, hundreds of files, are read if one of them is asked for."""
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--task-folder ({folder}) is no folder; write that of the tasks' YAML files")
    path = None if folder is None else str(folder)
    manager = TaskManager(include_path=path, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        place = "" if folder is None else f", nor in {folder}"
        raise ConfigError(
            f"--tasks ({unknown[0]}) is no task of lm-evaluation-harness{place}; write names of its tasks"
        )
    return manager


class Backend(TemplateLM):
    """What the harness asks of a model."""

    def __init__(self, trained: Trained, *, integer: bool = False):
        super().__init__()
        self.trained, self.tokens = trained, trained.tokenizer
        self.network = loaded(trained, integer=integer)
        self.max_length = trained.max_positions or TEXT_LENGTH

    @property
    def eot_token_id(self) -> int:
        ids = (self.tokens.eos_id, self.tokens.bos_id)
        given = next((token for token in ids if token is not None), None)
        if given is None:
            raise ConfigError(
                f"{self.trained.path} has no token that begins or ends a text; a task needs one"
            )
        return given

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokens.bos_id is None else self.tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begin = [] if self.tokens.bos_id is None or add_special_tokens is False else [self.tokens.bos_id]
        ids = [*begin, *self.tokens.encode(string)]
        self.trained.check_tokens(ids, "a task")
        return ids

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation the sum of its log-probabilities, and whether it is the likeliest text.  The
        beginning of what is longer than the model's longest text is left out.
        """
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        scores: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(order), BATCH), desc="Questions", disable=disable_tqdm):
            batch = order[start : start + BATCH]
            scores |= zip(batch, self._scores([requests[i][1:] for i in batch]), strict=True)
        return [scores[i] for i in range(len(requests))]

    def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        texts = [[*context, *continuation][-self.max_length - 1 :] for context, continuation in pairs]
        device = next(self.network.parameters()).device
        read = torch.zeros(len(texts), max(map(len, texts)) - 1, dtype=torch.int64, device=device)
        for row, ids in zip(read, texts, strict=True):
            row[: len(ids) - 1] = torch.tensor(ids[:-1])  # what stands behind it, no token of it sees
        scores = []
        with torch.inference_mode(), attention.causal(self.network):
            logits = self.network(input_ids=read).logits
            for of_text, ids, (_, continuation) in zip(logits, texts, pairs, strict=True):
                n = min(len(continuation), len(ids) - 1)
                end = torch.tensor(ids[-n:] if n else [], dtype=torch.int64, device=device)
                chances = of_text[len(ids) - 1 - n : len(ids) - 1].float().log_softmax(-1)
                score = chances.gather(1, end[:, None]).double().sum().item()
                scores.append((score, bool((chances.argmax(-1) == end).all())))
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        measured = []
        for request in tqdm(requests, desc="Texts", disable=disable_tqdm):
            loss, n_tokens = text_loss(self.trained, self.network, request.args[0])
            measured.append(-loss * n_tokens)
        return measured

    def _end_of(self, text: str, n_most: int) -> str:
        """All of a text of at most so many tokens, or as much of its end."""
        ids = kept = self.tokens.encode(text)
        while len(ids) > n_most:  # half a character, where it was cut, may be more tokens than it was
            kept = kept[len(ids) - n_most :]
            ids = self.tokens.encode(text := self.tokens.decode(kept))
        return text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Of a context that leaves no room for an answer, the beginning is left out."""
        answers = []
        for request in tqdm(requests, desc="Answers", disable=disable_tqdm):
            context, asked = request.args
            until = asked.get("until") or []
            n_new = min(int(asked.get("max_gen_toks", NEW_TOKENS)), self.max_length // 2)
            answer = self.trained.generate(
                self._end_of(context, self.max_length - n_new - 1),
                max_new_tokens=n_new,
                temperature=float(asked.get("temperature", 0)) if asked.get("do_sample") else 0.0,
                top_k=int(asked.get("top_k", 0)),
                top_p=float(asked.get("top_p", 1.0)),
                stop=[until] if isinstance(until, str) else until,
                network=self.network,
            )
            answers.append(answer["text"])
        return answers
