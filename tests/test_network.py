"""Addresses of Ray clusters: what is no head is named, with what to write instead, and in time."""

import contextlib
import http.server
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from lowbit_dist import network
from lowbit_dist.config import ConfigError


@pytest.mark.parametrize("value", [None, "", " ", "local"])
def test_rays_words_for_this_machine(value, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert network.ray_address() is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert network.ray_address() == "10.0.0.1:6379"


@pytest.mark.parametrize(
    ("address", "wrong", "instead"),
    [
        ("http://10.0.0.1:8265", "is the address of Ray's dashboard",
         "write 10.0.0.1:6379, or what `ray start --head` printed there, or send the run there as a job: "
         "lowbit submit CONFIG --address http://10.0.0.1:8265"),
        ("https://head/", "dashboard", "lowbit submit CONFIG --address https://head/"),
        ("http://", "dashboard", "write HOST:6379"),
        ("ray://10.0.0.1:10001", "is an address of Ray's client",
         "write 10.0.0.1:6379, or what `ray start --head` printed there, or send the run there as a job: "
         "lowbit submit CONFIG --address http://10.0.0.1:8265"),
        ("ray://[::1]:10001", "client", "write [::1]:6379"),
        ("10.0.0.1", "is not of the form HOST:PORT", "write 10.0.0.1:6379"),
        ("redis://10.0.0.1:6379", "is not of the form HOST:PORT", "write 10.0.0.1:6379"),
        ("10.0.0.1:6379/x", "is not of the form HOST:PORT", "write 10.0.0.1:6379"),
        ("10.0.0.1:port", "is no address", "write HOST:PORT"),
        ("[::1", "is no address", "write HOST:PORT"),
    ],
)  # fmt: skip
def test_an_address_of_another_form_is_answered_with_what_to_write(address, wrong, instead):
    with pytest.raises(ConfigError) as error:
        network.check_ray_head(address)
    start, _, advice = str(error.value).partition("; ")
    assert start.startswith(f"RAY_ADDRESS ({address}) ") and wrong in start
    assert advice.startswith(instead) or instead in advice


def test_the_cluster_of_this_machine_is_rays_to_find():
    network.check_ray_head("auto")


def test_an_address_where_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(ConfigError, match=r"does not answer \(.*refused.*\); write HOST:PORT of a Ray head"):
        network.check_ray_head(f"127.0.0.1:{port}")


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def silent():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@contextlib.contextmanager
def another_service():
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield port
        finally:
            server.stop(None).wait()


@pytest.mark.parametrize(
    ("service", "why"),
    [
        (web, "it does not speak its protocol"),
        (silent, "it said nothing for 3 s"),
        (another_service, "another service listens there"),
    ],
    ids=["web", "silent", "grpc"],
)
def test_what_answers_but_is_no_ray_head_is_named_soon(service, why, monkeypatch, capfd):
    assert network.CONNECT + network.ANSWER <= 30
    monkeypatch.setattr(network, "ANSWER", 3.0)
    with service() as port:
        began = time.monotonic()
        with pytest.raises(ConfigError) as error:
            network.check_ray_head(f"127.0.0.1:{port}")
        assert time.monotonic() - began < 10
    text = str(error.value)
    assert text.startswith(f"RAY_ADDRESS (127.0.0.1:{port}) answers, but not as a Ray head ({why}); write")
    assert capfd.readouterr().err == ""


def test_a_head_that_wants_a_token_is_one(monkeypatch):
    """Ray itself shows it the token."""

    class Refuse(grpc.ServerInterceptor):
        def intercept_service(self, continuation, details):
            def answer(request, context):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")

            return grpc.unary_unary_rpc_method_handler(answer)

    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, interceptors=[Refuse()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            network.check_ray_head(f"127.0.0.1:{port}")
        finally:
            server.stop(None).wait()
