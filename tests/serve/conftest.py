import socket
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("fastapi")

import openai
import uvicorn

from kvote.models import embedded
from kvote.serve.app import application
from kvote.serve.documents import Documents
from kvote.serve.engine import Limits
from kvote.serve.service import Service


@pytest.fixture(scope="session")
def parts():
    model = AutoModelForCausalLM.from_pretrained(embedded(), dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(embedded())


class Server:
    """A server on a port of its own, and clients of it."""

    def __init__(self, service: Service, **options) -> None:
        self.service, self._clients = service, list[openai.OpenAI]()
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(application(service, **options), log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def client(self, key: str = "anything") -> openai.OpenAI:
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
        self._clients.append(made)
        return made

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="session")
def start(parts):
    """Starts servers; all of them end with the tests."""
    servers = []

    def one(*, limits=None, documents=None, keys=(), method="dense", prefixes=None, **options) -> Server:
        service = Service(
            "embedded",
            *parts,
            method,
            limits or Limits(chunk=128),
            documents if documents is not None else Documents(2**28, 10),
            keys,
            prefixes,
        )
        servers.append(Server(service, **options))
        return servers[-1]

    yield one
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def server(start):
    return start()
