import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets.config
import huggingface_hub.constants
import pytest

from hf_vqlogits.conversion import hub as module
from hf_vqlogits.conversion.hub import hub_answers, offline_unless_answered


@pytest.fixture
def endpoint(monkeypatch):
    """Put the hub at a port of this machine."""

    def put(port):
        address = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    return put


@pytest.fixture
def no_hub(endpoint):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # but nobody listens
        endpoint(unused.getsockname()[1])
        yield


@pytest.fixture
def hub(endpoint):
    """A hub that answers every question with a status and a text."""
    servers = []

    def serve(status, text):
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        endpoint(servers[-1].server_port)

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "text"), [(200, b'{"id": "org/set", "siblings": []}'), (401, b""), (404, b"")]
)
def test_a_refusal_is_an_answer(hub, status, text):
    hub(status, text)
    assert hub_answers("org/set")


def test_no_hub(no_hub):
    assert not hub_answers("org/set")


def test_silence_is_not_waited_for(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes questions, never answers
        endpoint(silent.getsockname()[1])
        before, start = set(threading.enumerate()), time.perf_counter()
        assert not hub_answers("org/set", seconds=0.2)
        assert time.perf_counter() - start < 2
        for thread in set(threading.enumerate()) - before:
            thread.join(2)
            assert not thread.is_alive()


def test_a_slow_search_for_the_address_is_not_waited_for(endpoint, monkeypatch):
    found = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found.wait(10) and [])
    endpoint(1)
    start = time.perf_counter()
    assert not hub_answers("org/set", seconds=0.2)
    assert time.perf_counter() - start < 2
    found.set()


def test_nor_does_the_end_of_the_process_wait():
    """For an address that takes a minute to be found, longer than this test lets it run."""
    program = f"""
import runpy, socket, time
socket.getaddrinfo = lambda *args, **kwargs: time.sleep(60)
hub = runpy.run_path({module.__file__!r})
print(hub["hub_answers"]("org/set", seconds=0.2))
"""
    environment = {"HF_ENDPOINT": "http://hub.invalid"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=40,
        check=True,
    )
    assert done.stdout == "False\n"


def flags():
    return datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE


def test_offline_within_only(no_hub):
    def fail():
        with offline_unless_answered("org/set") as silent:
            raise RuntimeError(f"inside: {silent} {flags()}")

    with pytest.raises(RuntimeError, match=r"inside: True \(True, True\)"):
        fail()
    assert flags() == (False, False)


def test_online_where_the_hub_answers(hub):
    hub(404, b"")
    with offline_unless_answered("org/set") as silent:
        assert flags() == (False, False)
        assert not silent


@pytest.mark.parametrize("flagged", [datasets.config, huggingface_hub.constants])
def test_offline_already(hub, monkeypatch, flagged):
    hub(200, b"{}")
    monkeypatch.setattr(flagged, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(module, "hub_answers", None)  # not asked
    before = flags()
    with offline_unless_answered("org/set") as silent:
        assert flags() == (True, True)
        assert not silent
    assert flags() == before
