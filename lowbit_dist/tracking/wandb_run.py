"""The run in Weights & Biases (W&B), fed through its package.

Online its server knows which steps it has.  Offline (WANDB_MODE=offline) nothing is there to be resumed: each
start that measures something writes all rows of the run into a folder of its own, and `wandb sync` of the
newest brings the whole run.
"""

import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit_dist import files, runs
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.tracking import content
from lowbit_dist.tracking.feeder import FLUSH_SECONDS
from lowbit_dist.tracking.rows import RowFeeder

RUN = ".wandb_run"  # in the run's folder: its number, and the folder that it is of
PROJECT = r"([^/\\#?%:]+/)?[^/\\#?%:]{1,128}"
EXIT_CODES = {"FINISHED": 0, "FAILED": 1, "KILLED": 255}  # 255 is W&B's own after Ctrl-C
SETTINGS = {  # W&B's own, where the user has set nothing
    "WANDB_SILENT": "true",  # the launcher says where the run is
    "WANDB_CONSOLE": "off",  # the terminal is the launcher's
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_X_DISABLE_META": "true",  # a command line may have a password
}


class WandbRun(RowFeeder):
    """One W&B run, which gets the rows that training writes into the run's folder."""

    service, package = "W&B", "wandb"

    @classmethod
    def check(cls, config: RunConfig) -> None:
        super().check(config)
        project = config.tracking.wandb or ""
        if not re.fullmatch(PROJECT, project):
            raise ConfigError(
                f"tracking.wandb ({project}) must be PROJECT or ENTITY/PROJECT, of at most 128 characters "
                r"other than / \ # ? % :; write such a name, for example lowbit"
            )
        if not _is_online():
            return
        import wandb

        try:
            is_known = wandb.run is not None or wandb.login(prompt=False, verify=False)
        except wandb.Error as error:
            raise ConfigError(f"tracking.wandb ({project}): {error}; mend the key, or write null") from None
        if not is_known:
            raise ConfigError(
                f"tracking.wandb ({project}) needs a key: run `wandb login` once, or set WANDB_API_KEY, or "
                "WANDB_MODE=offline"
            )

    def _open(self) -> int:
        import wandb

        is_online = _is_online()
        entity, _, project = (self.config.tracking.wandb or "").rpartition("/")
        self._run = wandb.init(
            entity=entity or None,
            project=project,
            id=_run_id(self.config.run_dir),
            name=self.config.run.name,
            dir=self.config.run_dir,
            resume="allow" if is_online else None,
            config=content.parameters(self.config, content.known(self.config)[1]),
            settings=wandb.Settings(
                reinit="create_new",  # beside a run that the calling program may have
                allow_val_change=True,
                finish_timeout=FLUSH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        place = self._run.url if is_online else f"offline; wandb sync {Path(self._run.dir).parent}"
        self.say(f"W&B: {place}")
        return self._run.step - 1

    def _log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._run.log(content.numbers(row) | {"_timestamp": row["time"]}, step=row["step"])

    def _end(self, status: str, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(content.conclusion(summary))
        self._run.finish(exit_code=EXIT_CODES[status])


def _is_online() -> bool:
    """Whether W&B is to have a server, as its environment and files say."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import wandb

    return wandb.setup().settings.mode in ("online", "shared", "run")


def _run_id(folder: Path) -> str:
    """The number that is noted in the folder; a new one if there is none, or this is a copy of its folder."""
    noted = runs.content(folder / RUN)
    run_id, original = noted.get("id"), Path(noted.get("folder", folder))
    is_there = runs.content(original / RUN).get("id") == run_id
    if run_id is None or (is_there and not original.samefile(folder)):
        run_id = uuid.uuid4().hex[:8]
    files.keep(folder / RUN, json.dumps({"id": run_id, "folder": str(folder.resolve())}) + "\n")
    return str(run_id)
