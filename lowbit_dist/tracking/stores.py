"""Stores that MLflow writes to: which can be used, and how an SQLite one is made."""

import contextlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.files import locked

DRIVERS = {  # database -> the Python package that SQLAlchemy reaches it through
    "postgresql": "psycopg2",
    "postgresql+psycopg2": "psycopg2",
    "postgresql+psycopg": "psycopg",
    "mysql": "MySQLdb",
    "mysql+mysqldb": "MySQLdb",
    "mysql+pymysql": "pymysql",
    "mssql": "pyodbc",
    "mssql+pyodbc": "pyodbc",
    "mssql+pymssql": "pymssql",
}


class Unusable(Exception):
    """A store that answers and takes nothing, in words that follow its name: why, and what to do."""


def check(config: RunConfig) -> None:
    """ConfigError unless `tracking.mlflow` names a store that can be used; quick, opens no database."""
    uri = config.tracking.mlflow
    if uri is None:
        return
    shown = without_password(uri)
    rule = "write sqlite:///FILE, a tracking server's http(s)://HOST:PORT, or null for files alone"
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018 (read for its ValueError)
    except ValueError as error:
        raise ConfigError(f"tracking.mlflow ({shown}) is not a URI ({error}); {rule}") from None
    if parts.scheme in ("sqlite", "sqlite+pysqlite"):
        _check_sqlite(uri, rule)
    elif parts.scheme in ("http", "https"):
        if not parts.hostname:
            raise ConfigError(f"tracking.mlflow ({shown}) names no host; {rule}")
    elif parts.scheme in DRIVERS:
        package = DRIVERS[parts.scheme]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracking.mlflow ({shown}) needs the Python package {package}, which is not installed; "
                f"install it, or {rule}"
            )
    elif "databricks" not in (uri, parts.scheme):
        raise ConfigError(f"tracking.mlflow ({shown}) is not a store that MLflow 3 writes to; {rule}")


def _check_sqlite(uri: str, rule: str) -> None:
    name = uri.removeprefix("sqlite:///")
    if not uri.startswith("sqlite:///") or name in ("", ":memory:"):
        raise ConfigError(f"tracking.mlflow ({uri}) names no file; {rule}")
    file = sqlite_file(uri)
    folder = file.parent
    try:
        if not folder.is_dir():
            raise ConfigError(
                f"tracking.mlflow ({uri}): the folder {folder} does not exist; make it, or {rule}"
            )
        if file.is_dir():
            raise ConfigError(f"tracking.mlflow ({uri}): {file} is a folder; {rule}")
        if not os.access(folder, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
            raise ConfigError(f"tracking.mlflow ({uri}): {file} cannot be written; {rule}")
        if file.exists() and file.stat().st_size:
            with file.open("rb") as opened:
                if opened.read(16) != b"SQLite format 3\0":
                    raise ConfigError(f"tracking.mlflow ({uri}): {file} is not an SQLite database; {rule}")
    except OSError as error:
        raise ConfigError(f"tracking.mlflow ({uri}) cannot be used: {error.strerror}; {rule}") from None


def resolve(uri: str) -> str:
    """`uri` with a relative SQLite file made absolute, so that it means the same in every process."""
    if not uri.startswith("sqlite:///"):
        return uri
    _, question, query = uri.partition("?")
    return f"sqlite:///{sqlite_file(uri)}{question}{query}"


def sqlite_file(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


def sqlite_lock(uri: str) -> contextlib.AbstractContextManager[Any]:
    """While it is held, no other process of this machine opens the same SQLite store; of others, nothing.

    Two that make a new database at the same moment break each other's migrations.
    """
    if not uri.startswith("sqlite:"):
        return contextlib.nullcontext()
    file = sqlite_file(uri)
    return locked(file.with_name(f"{file.name}.lock"))


def make_database(file: Path) -> None:
    """A new store gets its name when it is complete.

    MLflow cannot use one whose making was cut short by a full disk or a kill.
    """
    if file.exists() and file.stat().st_size:
        return
    from mlflow.store.db import utils

    draft = file.with_name(f"{file.name}.draft")
    leftovers = (draft, draft.with_name(f"{draft.name}-journal"))
    for file_left in leftovers:
        file_left.unlink(missing_ok=True)
    engine = utils.create_sqlalchemy_engine(f"sqlite:///{draft}")
    try:
        utils._initialize_tables(engine)
        engine.dispose()
        draft.rename(file)
    finally:
        engine.dispose()
        for file_left in leftovers:
            file_left.unlink(missing_ok=True)


def without_password(uri: str) -> str:
    """Text as it may be shown: of a URI, without the user and the password that it may have."""
    return re.sub(r"(?<=://)[^/?#\s]*@", "", uri)
