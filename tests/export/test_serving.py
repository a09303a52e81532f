"""The exported folder behind `transformers serve`, asked by OpenAI's client."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from helpers.tiny import recipe_text, write_recipe
from openai import APIError, OpenAI
from rich.console import Console

from remix_cli.data.formats import Example
from remix_cli.evaluation.generate import Decoding, generate
from remix_cli.recipe import load_recipe
from remix_cli.runs import load_run
from remix_cli.train.trainer import train

QUESTIONS = [f"w{i} w{(3 * i) % 17} w7 ?" for i in range(12)]
TOKENS = 8


@pytest.fixture(scope="module", params=["token", "sequence"])
def served(request, stage, tmp_path_factory):
    """(level, folder, our answers) of a run long enough that the adapter matters."""
    folder = tmp_path_factory.mktemp("served")
    settings = {"max_steps": 12, "learning_rate": 0.2, "eval_steps": None, "save_steps": None}
    recipe = recipe_text(*stage[:2], folder / "run", router={"level": request.param}, train=settings)
    train(load_recipe(write_recipe(folder / "r.yaml", recipe)), Console(quiet=True))
    command = [sys.executable, "-m", "remix_cli", "export", str(folder / "run"), "-o", str(folder / "hf")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    run = load_run(folder / "run")
    answer = {"role": "assistant", "content": "."}
    asked = [Example(({"role": "user", "content": question}, answer), "t") for question in QUESTIONS]
    prompts = [run.encoder.prompt_ids(example) for example in asked]
    answers = dict(generate(run, prompts, list(range(len(prompts))), Decoding(TOKENS), 4))
    assert len(set(answers.values())) > 1, "answers must tell questions apart"
    return request.param, folder / "hf", [answers[i] for i in range(len(prompts))]


@contextmanager
def server(folder, log, *options):
    """The address of one that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = os.path.join(os.path.dirname(sys.executable), "transformers")
    command = [program, "serve", str(folder), "--trust-remote-code", "--device", "cpu", "--port", str(port), *options]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def ask(client, folder, question):
    answer = client.chat.completions.create(
        model=str(folder), messages=[{"role": "user", "content": question}], max_tokens=TOKENS, temperature=0
    )
    return answer.choices[0].message.content


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--continuous-batching"]], ids=["plain", "continuous"])
def test_what_is_served_answers_like_the_run(served, options, tmp_path):
    level, folder, ours = served
    with server(folder, tmp_path / "log", *options) as address:
        client = OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
        if level == "sequence" and options:  # sequences end to end have no prompt of their own: never in silence
            with pytest.raises(APIError):
                ask(client, folder, QUESTIONS[0])
            return
        with ThreadPoolExecutor(6) as several:  # so that they are batched where the server can
            answers = list(several.map(lambda question: ask(client, folder, question), QUESTIONS))
    assert [text.strip() for text in answers] == [text.strip() for text in ours]
