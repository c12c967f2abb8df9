"""Verbs for runs on a cluster: submit, status, logs, stop."""

import sys
import time
from typing import Annotated, Any

import typer

from lowbit_dist.cli import console
from lowbit_dist.cli.arguments import Config, Json, Overrides, load, pairs

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Ask this dashboard, http://HOST:8265; by default RAY_API_SERVER_ADDRESS, or this machine.",
        show_default=False,
    ),
]
JOB = "A job as `lowbit status` lists it, or a run's name: its newest job."
Job = Annotated[str, typer.Argument(metavar="JOB", help=JOB, show_default=False)]


def submit(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Print the job's progress until its end; its exit code is this one's."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train on a cluster, as a Ray job; a run of the same name resumes from its newest checkpoint.

    Example: lowbit submit configs/dqt-ternary.yaml run.name=night --address http://10.0.0.1:8265 --follow
    """
    with console.answering(as_json) as answer:
        loaded = load(config, overrides)
        from lowbit_dist.cluster.jobs import Jobs

        jobs = Jobs(address)
        job = jobs.submit(loaded, say=_say)
        if follow:
            _follow(jobs, job)
        job_status = {**jobs.status(job), "address": jobs.address}
        answer(job_status, lambda terminal: pairs(_in_words(job_status))(terminal))
    if follow and (code := jobs.exit_code(job)):
        raise typer.Exit(code)


def status(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help=f"{JOB} All if not given.", show_default=False)
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """List the jobs of a cluster, or show one of them with its progress.

    Example: lowbit status night-1 --address http://10.0.0.1:8265
    """
    with console.answering(as_json) as answer:
        from lowbit_dist.cli import tables
        from lowbit_dist.cluster.jobs import Jobs

        jobs = Jobs(address)
        if job is not None:
            job_status = jobs.status(jobs.newest(job))
            answer(job_status, pairs(_in_words(job_status)))
            return
        everything = jobs.list()
        answer(
            {"jobs": everything},
            lambda terminal: tables.jobs(terminal, [_in_words(one) for one in everything]),
        )


def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Follow it until the job ends.")] = False,
) -> None:
    """Print what a job has printed.

    Example: lowbit logs night-1 --follow
    """
    from lowbit_dist.cluster.jobs import Jobs

    jobs = Jobs(address)
    for piece in jobs.logs(jobs.newest(job), follow=follow):
        print(piece, end="", flush=True)


def stop(job: Job, address: Address = None, as_json: Json = False) -> None:
    """Have a job save a checkpoint and end; submitting the run again resumes from there.

    Example: lowbit stop night-1
    """
    with console.answering(as_json) as answer:
        from lowbit_dist.cluster.jobs import Jobs

        jobs = Jobs(address)
        job_status = jobs.stop(jobs.newest(job))
        answer(job_status, pairs(_in_words(job_status)))


def _follow(jobs: Any, job: str) -> None:
    try:
        for piece in jobs.logs(job, follow=True):
            print(piece, end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(
            f"\nlowbit: {job} still runs; `lowbit logs {job} --follow` follows it, `lowbit stop {job}` "
            "stops it",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None


def _say(text: str) -> None:
    print(f"lowbit: {text}", file=sys.stderr, flush=True)


def _in_words(job_status: dict[str, Any]) -> dict[str, Any]:
    """Times as people read them."""
    words = dict(job_status)
    if job_status["started"]:
        words["started"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job_status["started"]))
        words["ended"] = None
        words["took"] = console.duration((job_status["ended"] or time.time()) - job_status["started"])
    return words
