"""A model that stays loaded: its answers over HTTP, as OpenAI's clients ask for them, and in a terminal."""

import builtins
import http.client
import io
import json
import signal
import socket
import sys
import threading
import time
import urllib.request

import pytest
from fastapi.testclient import TestClient
from hf_folders import write
from test_ui import free_port, started

import lowbit_dist
from lowbit_dist import serving
from lowbit_dist.cli.inference import Talk


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    path = write(tmp_path_factory.mktemp("models") / "llama", "llama")
    for file in (corpus.parent / "tokenizer").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.fixture(scope="module")
def model(folder):
    return lowbit_dist.open(folder)


@pytest.fixture(scope="module")
def app(model):
    return serving.application(model, "mine")


@pytest.fixture
def client(app):
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def ask(client, **request):
    content = json.dumps({"prompt": "def ", "max_tokens": 12, "temperature": 0} | request)
    headers = {"content-type": "application/json"}
    return client.post("/v1/completions", content=content, headers=headers)


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_the_model_is_listed_by_its_name(client):
    (found,) = client.get("/v1/models").json()["data"]
    assert (found["id"], found["object"]) == ("mine", "model")


def test_a_completion_is_the_generated_text(client, model):
    expected = model.generate("def ", max_new_tokens=12, temperature=0)
    answer = ask(client, model="mine", user="me")
    assert answer.status_code == 200
    content = answer.json()
    assert content["choices"] == [
        {"index": 0, "text": expected["text"], "logprobs": None, "finish_reason": "length"}
    ]
    assert (content["object"], content["model"]) == ("text_completion", "mine")
    n = len(model.tokenizer.encode("def ")) + 1
    assert content["usage"] == {"prompt_tokens": n, "completion_tokens": 12, "total_tokens": n + 12}


def test_a_stream_is_the_same_text_in_pieces(client):
    whole = ask(client).json()
    streamed = events(ask(client, stream=True, stream_options={"include_usage": True}))
    *pieces, last, usage = streamed
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["choices"][0]["text"]
    assert len(pieces) > 5 and {piece["choices"][0]["finish_reason"] for piece in pieces} == {None}
    assert last["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert len({event["id"] for event in streamed}) == 1


def test_stop_seed_and_several_prompts_are_understood(client):
    text = ask(client).json()["choices"][0]["text"]
    for stop in (text[4:6], [text[4:6], "never there"]):
        (choice,) = ask(client, stop=stop).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text[: text.find(text[4:6])], "stop")
    drawn = [ask(client, temperature=1, seed=seed).json()["choices"][0]["text"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({ask(client, temperature=1).json()["choices"][0]["text"] for _ in range(4)}) > 1
    both = ask(client, prompt=["def ", "class "]).json()
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["choices"][0]["text"] == text and both["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"model": "other"}, 404, "there is no model 'other' here; write 'mine'"),
        ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 500}, 400, "max_tokens 500 they are more than the model's max_seq_len 128"),
        ({"max_tokens": 500, "stream": True}, 400, "max_tokens 500 they are more than"),
        ({"temperature": -1}, 400, "temperature: "),
        ({"logprobs": 3}, 400, "logprobs: "),
        ({"n": 2}, 400, "n: Input should be 1"),
        ({"prompt": [1, 2]}, 400, "prompt: "),
        ({"prompt": []}, 400, "there are 0 prompts"),
        ({"prompt": ["a", "b"], "stream": True}, 400, "there are 2 prompts; write one"),
        ({"min_p": 0.1}, 400, "min_p: Extra inputs are not permitted"),
        ({"stream_options": {"include": True}}, 400, "stream_options: Extra inputs are not permitted"),
        ({"temperature": 1e-40}, 400, "temperature (1e-40) must be 0, or"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"\ud800": 1}, 400, ""),
    ],
)
def test_what_cannot_be_done_is_refused_as_openai_refuses(request_, status, words, client):
    answer = ask(client, **request_)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert "--" not in error["message"]


def test_pages_of_the_web_reach_nothing(app):
    """A name that leads here, and a form that needs no leave of the browser."""
    assert ask(TestClient(app, base_url="http://evil.example")).status_code == 400
    client = TestClient(app, base_url="http://localhost")
    for of_a_page in ({"content-type": "text/plain"}, {}):  # of a form, and of a Blob
        plain = client.post("/v1/completions", content=b'{"prompt": "x"}', headers=of_a_page)
        assert plain.status_code == 400 and "access-control-allow-origin" not in plain.headers


@pytest.mark.parametrize(
    ("verb", "path", "content", "status", "words"),
    [
        ("POST", "completions", b'{"prompt": ', 400, "the request is not JSON: Expecting value"),
        ("POST", "completions", b'{"prompt": "\xff"}', 400, "parsing the body"),
        ("POST", "completions", b"[" * 100_000, 400, ""),
        ("POST", "completions", b"", 400, ""),
        ("GET", "completions", b"", 405, "Method Not Allowed"),
        ("POST", "chat/completions", b"{}", 404, "Not Found"),
    ],
)
def test_what_is_no_request_is_refused_in_the_same_words(verb, path, content, status, words, client):
    headers = {"content-type": "application/json"}
    answer = client.request(verb, f"/v1/{path}", content=content, headers=headers)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"] and error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_away_gives_up_its_turn(is_streamed, app, model, monkeypatch):
    """Over a real connection, of a server that ends when it is told to."""
    begun, ended = [], []

    def slow(prompt, *, stream, **options):
        begun.append(prompt)
        try:
            for _ in range(2000):
                stream("x")
                time.sleep(0.005)
        finally:
            ended.append(time.monotonic())
        return {}

    heard = serving.listen(0)
    url = f"http://{serving.HOST}:{heard.getsockname()[1]}/v1"
    server = serving.uvicorn.Server(serving.uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [heard]})
    thread.start()
    try:
        assert json.loads(urllib.request.urlopen(f"{url}/models", timeout=20).read())["data"]
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "generate", lambda self, prompt, **options: slow(prompt, **options))
            client = http.client.HTTPConnection(*heard.getsockname(), timeout=20)
            body = json.dumps({"prompt": "x", "stream": is_streamed})
            client.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            if is_streamed:
                assert client.getresponse().readline().startswith(b"data: ")
            until = time.monotonic() + 5
            while not begun and time.monotonic() < until:
                time.sleep(0.02)
            assert begun and not ended
            client.close()
            until = time.monotonic() + 5
            while not ended and time.monotonic() < until:
                time.sleep(0.02)
        assert ended, "the text is made on, for nobody"
    finally:
        server.should_exit = True
        thread.join(20)
        heard.close()
    assert not thread.is_alive()


def test_a_request_that_ends_with_the_server_is_told_in_lines(app, monkeypatch, capsys):
    servers = []

    class Server(serving.uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(serving.uvicorn, "Server", Server)
    monkeypatch.setattr(serving, "END_TIMEOUT", 0.1)
    heard = serving.listen(0)
    thread = threading.Thread(target=serving.serve, args=(app, heard))
    thread.start()
    client = socket.create_connection(heard.getsockname())
    try:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        until = time.monotonic() + 10
        while not (servers and servers[0].server_state.tasks) and time.monotonic() < until:
            time.sleep(0.02)
        assert servers[0].server_state.tasks, "the request must have begun"
    finally:
        servers[0].should_exit = True
        thread.join(20)
        client.close()
        heard.close()
    assert not thread.is_alive() and "Traceback" not in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(lowbit, folder):
    with serving.listen(0) as heard:
        port = heard.getsockname()[1]
        done = lowbit("serve", folder, "--port", port)
    assert done.returncode == 2
    assert f"--port ({port}) cannot be served: Address already in use" in done.stderr


@pytest.mark.integration
@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_it_answers_until_it_is_told_to_end_which_is_no_failure(signum, folder):
    with started("serve", folder, "--port", free_port()) as server:
        url = server.stdout.readline().split()[0].replace("completions", "models")
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert json.load(answer)["data"]
        server.send_signal(signum)
        assert server.wait(60) == 0


@pytest.fixture
def say(monkeypatch, folder, lowbit):
    """`say(*lines, option=...)`: what `lowbit chat` answers to these lines."""

    def said(*lines, **options):
        typed = iter(lines)

        def typing(prompt):
            for line in typed:
                return line
            raise EOFError

        monkeypatch.setattr(builtins, "input", typing)
        given = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
        return lowbit("chat", folder, "--temperature", 0, *given)

    return said


def test_each_line_is_answered_with_all_that_was_said(say, model):
    done = say("def main():", "x = 1", max_new_tokens=10)
    first = model.generate("def main():\n", max_new_tokens=10, temperature=0)["text"]
    text = "def main():\n" + first + ("" if first.endswith("\n") else "\n") + "x = 1\n"
    second = model.generate(text, max_new_tokens=10, temperature=0)["text"]
    assert (done.returncode, done.stdout) == (0, first + second)


def test_lines_stand_where_a_turn_says_and_the_next_turn_ends_an_answer(say, model):
    prompt = "Q: x\nA:"
    expected = model.generate(prompt, max_new_tokens=10, temperature=0)["text"]
    assert say("x", max_new_tokens=10, turn="Q: {}\\nA:").stdout == expected
    stop = expected[3:5]
    ended = say("x", max_new_tokens=10, turn=stop + "{}").stdout
    assert stop not in ended


def test_a_turn_without_a_place_for_the_line_is_refused(say):
    done = say(turn="Q:")
    assert done.returncode == 2 and "--turn (Q:) must have {}" in done.stderr


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"temperature": -1}, "--temperature (-1.0)"),
        ({"max_new_tokens": 0}, "--max-new-tokens (0)"),
        ({"max_new_tokens": 128}, "--max-new-tokens (128) leaves no room for a line"),
    ],
)
def test_wrong_options_end_a_talk_before_it_begins(option, words, say):
    done = say("x", **option)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_a_line_that_is_no_text_is_told_and_the_talk_goes_on(folder, lowbit, monkeypatch):
    answers = []
    for lines in (b"def \nx = 1\n", b"def \n\xff\xfe\nx = 1\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        done = lowbit("chat", folder, "--temperature", 0, "--max-new-tokens", 8)
        answers.append(done.stdout.replace("> ", ""))
    assert answers[0] == answers[1] and answers[0]
    assert done.returncode == 0 and done.stderr.count("must be text in UTF-8") == 1


def test_a_line_that_does_not_fit_is_told_and_the_talk_goes_on(say):
    done = say("word " * 200, "x = 1", max_new_tokens=8)
    assert done.returncode == 0 and "max_seq_len 128" in done.stderr and done.stdout


def test_old_turns_are_forgotten_when_there_is_no_room(model):
    network = model.network(integer=True)
    talk = Talk(model, 20, stop=[])
    for number in range(8):
        talk.add(f"line {number}: some words of it\n", say=lambda text: None, temperature=0, network=network)
    assert 1 < len(talk.turns) < 8 and talk.turns[-1].startswith("line 7")


def test_an_answer_that_is_interrupted_stays_as_far_as_it_was_said(model):
    talk, said = Talk(model, 20, stop=[]), []

    def say(text):
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.add("def ", say=say, temperature=0)
    (turn,) = talk.turns
    assert turn.rstrip("\n") == ("def " + "".join(said)).rstrip("\n")
