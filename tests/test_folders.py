"""Folders that can be written, whoever the user is: for caches without a home, for Ray without /tmp."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from lowbit_dist import folders
from lowbit_dist.config import ConfigError

USER = (*folders.NAMES, "HOME", *folders.ELSEWHERE, "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR")
PROVIDED = "import json, os; from lowbit_dist import folders; provided = folders.provide_home(); "
NOWHERE = "/proc"  # where root, too, can make nothing


def without_user(**variables):
    """The environment of a process that is told nothing of its user but `variables`."""
    return {name: value for name, value in os.environ.items() if name not in USER} | variables


def told(code, *before, **variables):
    """What a process prints as JSON, in the environment `without_user`."""
    command = [*before, sys.executable, "-c", f"{PROVIDED}{code}"]
    done = subprocess.run(command, env=without_user(**variables), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def stranger():
    """Words before a command that run it as a user without an entry in the password database."""
    words = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("no user can be made here")
    return words


@pytest.fixture
def short():
    """A folder with a short path, as sockets need it."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def environment(monkeypatch):
    """Nothing is said of folders yet."""
    for name in (*USER, "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("home", [{}, {"HOME": ""}], ids=["absent", "empty"])
def test_a_user_without_name_and_home_gets_both(home, tmp_path):
    code = (
        "import getpass; from pathlib import Path; "
        "print(json.dumps([getpass.getuser(), str(Path.home()), str(folders.cache()), sorted(provided)]))"
    )
    name, place, cache, provided = told(code, *stranger(), TMPDIR=str(tmp_path), **home)
    assert name == "12345"
    assert place == f"{tmp_path}/lowbit-12345"
    assert cache == f"{place}/.cache/lowbit-dist"
    assert provided == ["HOME", "USER"]
    assert stat.S_IMODE(os.stat(place).st_mode) == 0o700


def test_an_unset_home_is_that_of_the_database():
    import pwd

    code = "print(json.dumps([os.environ['HOME'], 'USER' in provided]))"
    assert told(code) == [pwd.getpwuid(os.getuid()).pw_dir, False]


def test_caches_go_elsewhere_when_the_home_cannot_be_written(tmp_path):
    code = "print(json.dumps([os.environ['HOME'], str(folders.cache()), provided]))"
    home, cache, provided = told(code, HOME=NOWHERE, TMPDIR=str(tmp_path), MPLCONFIGDIR="mine")
    assert home == NOWHERE  # what can be read there still is
    private = f"{tmp_path}/lowbit-{os.getuid()}"
    assert cache == f"{private}/.cache/lowbit-dist"
    assert told(code, HOME=NOWHERE, XDG_CACHE_HOME=str(tmp_path), MPLCONFIGDIR="mine")[2].keys() == {
        "TRITON_CACHE_DIR"
    }
    assert provided == {
        "XDG_CACHE_HOME": f"{private}/.cache",
        "HF_HOME": f"{private}/.cache/huggingface",
        "TRITON_CACHE_DIR": f"{private}/.triton/cache",
    }


def test_only_what_cannot_be_written_goes_elsewhere(tmp_path, environment):
    environment.setattr(tempfile, "tempdir", str(tmp_path))
    environment.setenv("HOME", str(tmp_path))
    environment.setenv("USER", "me")
    assert folders._lacking() == {}
    (tmp_path / ".config").write_text("no folder")
    assert folders._lacking() == {"MPLCONFIGDIR": f"{tmp_path}/lowbit-{os.getuid()}/.config/matplotlib"}
    environment.setenv("MPLCONFIGDIR", "mine")
    assert folders._lacking() == {}


def test_a_cache_of_models_beside_a_cache_that_cannot_be_written_stays(tmp_path, environment):
    environment.setattr(tempfile, "tempdir", str(tmp_path))
    environment.setenv("HOME", str(tmp_path))
    own = folders.why_not_writable
    cache = tmp_path / ".cache"
    environment.setattr(folders, "why_not_writable", lambda path: "no" if path == cache else own(path))
    lacking = folders._lacking()
    assert lacking["XDG_CACHE_HOME"] == f"{tmp_path}/lowbit-{os.getuid()}/.cache"
    assert lacking["HF_HOME"] == f"{tmp_path}/.cache/huggingface"


def test_a_folder_that_others_can_write_is_not_taken_for_ones_own(tmp_path, environment):
    environment.setattr(tempfile, "tempdir", str(tmp_path))
    taken = tmp_path / f"lowbit-{os.getuid()}"
    taken.mkdir()
    taken.chmod(0o777)
    private = folders._private()
    assert private != taken and private.parent == tmp_path
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    taken.chmod(0o700)
    assert folders._private() == taken


def test_without_any_folder_that_can_be_written_nothing_is_made_up(environment):
    def none():
        raise FileNotFoundError("No usable temporary directory found")

    environment.setattr(tempfile, "gettempdir", none)
    environment.setenv("HOME", NOWHERE)
    assert folders._lacking() == {}


def test_the_longest_path_that_is_allowed_takes_rays_longest_socket(short):
    owner = 1234567
    most = folders._longest(owner)
    for size, fits in ((most, True), (most + 1, False)):
        place = short / ("x" * (size - len(f"{short}/")))
        path = Path(f"{place}/{folders.SESSIONS}{owner}-1{folders.LONGEST}")
        path.parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as listening:
            if fits:
                listening.bind(str(path))
            else:
                with pytest.raises(OSError, match="too long"):
                    listening.bind(str(path))
        why = folders._why_no_session(str(place), owner)
        assert (why is None) == fits, why


def test_what_is_asked_for_is_used_or_refused(short, environment):
    environment.setenv("TMPDIR", NOWHERE)
    for place, why in (
        (f"{short}/{'x' * 40}", r"is too long for the sockets of Ray \(55 bytes, at most 17\)"),
        (NOWHERE, r"cannot be written \("),
        (f"{short}/a", "is no folder"),
        ("here", "is no absolute path"),
    ):
        environment.setenv("RAY_TMPDIR", place)
        with pytest.raises(
            ConfigError, match=rf"^RAY_TMPDIR \({place}\) {why}.*; set RAY_TMPDIR to a folder"
        ):
            folders.for_sessions(12345)
    environment.setenv("RAY_TMPDIR", str(short))
    assert folders.for_sessions(12345) == (short, "")


def test_a_tmpdir_counts_and_one_that_cannot_be_used_is_passed_over_with_a_word(short, environment):
    environment.setenv("TMPDIR", str(short))
    assert folders.for_sessions(1) == (short, "")
    for place, why in ((f"/tmp/{'x' * 40}", "is too long"), (NOWHERE, "cannot be written")):
        environment.setenv("TMPDIR", place)
        folder, remark = folders.for_sessions(1)
        assert folder == Path("/tmp")
        assert remark.startswith(f"TMPDIR ({place}) {why}")


def test_a_full_tmp_is_passed_over_and_without_any_other_the_remedy_is_said(environment):
    usage = namedtuple("usage", "free")
    free = {"/tmp": 1_000_000, "/var/tmp": 10**9}
    environment.setattr(shutil, "disk_usage", lambda place: usage(free[str(place)]))
    assert folders.for_sessions(1) == (Path("/var/tmp"), "/tmp is full (1 MB free, 67.1 MB are needed)")
    free["/var/tmp"] = 0
    with pytest.raises(ConfigError) as error:
        folders.for_sessions(1)
    for words in ("/tmp is full (1 MB free", "/var/tmp is full (0 B free", "; set RAY_TMPDIR to a folder"):
        assert words in str(error.value)


def test_a_launch_and_data_are_refused_before_ray_is_started(small, tmp_path, environment):
    from lowbit_dist import configfile
    from lowbit_dist.cluster import checks

    environment.setenv("RAY_TMPDIR", NOWHERE)
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    environment.delenv("RAY_ADDRESS", raising=False)
    config = configfile.from_dict(small(cluster={"workers": 1}))
    with pytest.raises(ConfigError, match=r"RAY_TMPDIR \(/proc\) cannot be written"):
        checks.check(config)
    assert not config.run_dir.exists()
    with pytest.raises(ConfigError, match=r"RAY_TMPDIR \(/proc\)"), folders.session_folder(1):
        pass


def test_a_session_has_a_folder_rays_files_beside_it_and_a_token(short):
    code = """
with folders.session_folder(77) as folder:
    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    of_token = [token, len(open(token).read()), os.stat(token).st_mode & 0o777]
    inside = [str(folder), os.environ["RAY_TMPDIR"]]
print(json.dumps([*inside, *of_token, os.path.exists(folder), os.environ.get("RAY_TMPDIR")]))
"""
    folder, beside, token, n_token, mode, is_left, after = told(code, HOME=NOWHERE, TMPDIR=str(short))
    assert (folder, beside) == (f"{short}/lowbit-ray-77", str(short))
    assert token == f"{short}/lowbit-{os.getuid()}/.ray/auth_token"
    assert (n_token, mode) == (64, 0o600)
    assert (is_left, after) == (False, None)


def test_a_token_that_is_there_or_can_be_made_at_home_is_rays_own(tmp_path, short):
    code = "\nwith folders.session_folder(77):\n    print(json.dumps(os.environ.get('RAY_AUTH_TOKEN_PATH')))"
    assert told(code, HOME=str(tmp_path), TMPDIR=str(short)) is None
    assert told(code, HOME=NOWHERE, TMPDIR=str(short), RAY_AUTH_TOKEN_PATH="mine") == "mine"
    assert told(code, HOME=NOWHERE, TMPDIR=str(short), RAY_AUTH_TOKEN="x") is None


@pytest.mark.integration
def test_without_a_user_and_a_home_the_doctor_and_what_is_called_work(tmp_path):
    code = """
import mlflow.environment_variables
import matplotlib.pyplot
from lowbit_dist import doctor
print(json.dumps(doctor.examine()["checks"]))
"""
    checks = told(code, *stranger(), TMPDIR=str(tmp_path))
    (caches,) = [check for check in checks if check["name"] == "caches"]
    assert caches["status"] == "warning"
    assert f"{tmp_path}/lowbit-12345/.cache/lowbit-dist" in caches["found"]
    assert caches["advice"] == "set HOME to a folder that can be written"
