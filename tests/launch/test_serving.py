"""vLLM's own server, with an exported folder, gives the tokens of transformers.

Only where launch/serving/setup.sh has made its environment: VLLM_ENV, else .venv-vllm.
"""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.launch.served import (
    NEEDS_VLLM,
    TOLERANCE,
    ULTRAMEM,
    VLLM,
    export,
    greedy,
    prompts,
    vllm_environment,
)
from tests.ranks import run_on_ranks

pytestmark = NEEDS_VLLM
_START = 300  # seconds


class _Server:
    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **body: Any) -> tuple[int, Any]:
        """Status and content of the answer."""
        data = json.dumps({"model": "memories", **body}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_START) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def is_there(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    run_on_ranks(1, export, made, ULTRAMEM)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[_Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(VLLM), "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", str(folder / "hf"), "--served-model-name", "memories"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--trust-remote-code"]
    words += ["--model-impl", "transformers", "--dtype", "float32", "--enforce-eager"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            words,
            env=vllm_environment(folder),
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            answering, end = _Server(f"http://127.0.0.1:{port}"), time.monotonic() + _START
            while not answering.is_there():
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                assert time.monotonic() < end, (folder / "log").read_text()[-3000:]
                time.sleep(1)
            yield answering
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[tuple[list[int], list[float]]]:
    return greedy(folder)


def _complete(server: _Server, prompt: list[int], tokens: int = 8) -> tuple[list[int], list[float]]:
    status, answer = server.ask(
        "/v1/completions",
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        logprobs=1,
        ignore_eos=True,
        return_token_ids=True,
    )
    assert status == 200, answer
    choice = answer["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def test_tokens_and_their_probabilities_are_those_of_transformers(
    server: _Server, expected: list[tuple[list[int], list[float]]]
) -> None:
    for _ in range(2):  # the second time from the prefix cache
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda prompt: _complete(server, prompt), prompts()))
        for (ids, logs), (wanted_ids, wanted_logs) in zip(found, expected, strict=True):
            assert ids == wanted_ids
            assert logs == pytest.approx(wanted_logs, abs=TOLERANCE)


def test_wrong_requests_are_answered_and_harm_nobody(
    server: _Server, expected: list[tuple[list[int], list[float]]]
) -> None:
    wrong = (
        {"prompt": [5] * 200, "max_tokens": 4},
        {"prompt": [100_000], "max_tokens": 4},
        {"prompt": "a", "max_tokens": -1},
        {"prompt": "a", "temperature": -2},
    )
    assert [server.ask("/v1/completions", **body)[0] for body in wrong] == [400] * len(wrong)
    assert _complete(server, prompts()[0])[0] == expected[0][0]


def test_200_requests_at_once_are_all_answered_alike(
    server: _Server, expected: list[tuple[list[int], list[float]]]
) -> None:
    asked_for = prompts()
    with ThreadPoolExecutor(200) as pool:
        asked = [
            pool.submit(_complete, server, asked_for[i % len(asked_for)], 4) for i in range(200)
        ]
        found = [future.result()[0] for future in asked]
    assert found == [expected[i % len(asked_for)][0][:4] for i in range(200)]


def test_text_is_completed_from_the_folders_own_tokenizer(server: _Server) -> None:
    status, answer = server.ask("/v1/completions", prompt="A memory layer", max_tokens=6)
    assert status == 200
    assert answer["usage"]["completion_tokens"] <= 6
    assert answer["choices"][0]["text"]
