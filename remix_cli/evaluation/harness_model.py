"""A model that is loaded already, with its adapter in place, as lm-evaluation-harness asks it.

The harness's own class for Hugging Face models (`HFLM`) makes prompts, tokens, stop texts and answers. What differs:

1. Routers choose as in the rest of `remix eval`: the top k, without noise. With `level: sequence` the context of a
   request decides for its continuation and for every token that is generated. Padding takes no part.
2. Log-likelihoods come from the logits at the continuation alone, in float32; the harness's own pass holds those of all
   positions, and has no mask for its padding.
3. A batch that does not fit into memory is halved (log-likelihoods).
4. Answers are kept as they come, by what was asked.

Shapes: B requests, T positions, S scored positions of all of them, V tokens of the vocabulary.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from remix_cli.compat.peft import no_word_of_positions
from remix_cli.compat.transformers import one_sequence_a_row
from remix_cli.core.trace import Trace
from remix_cli.data.chunks import in_chunks, start_size
from remix_cli.errors import DataError
from remix_cli.evaluation.answers import Lines
from remix_cli.models import longest_input
from remix_cli.models.losses import logits_at
from remix_cli.runs import LoadedRun

Progress = Callable[[str, int, int], Any]  # (what, total, done) -> an object with advance(n)
Answer = Any  # (nats, is it greedy's) of a continuation, nats of a text, or a text


class Answered:
    """Answers by what was asked, kept in a file of `Lines` as they come. Sampled ones are asked for anew."""

    def __init__(self, lines: Lines):
        self.lines = lines
        self.answers: dict[str, Answer] = {line["asked"]: line["answer"] for line in lines.done.values()}
        self.earlier = frozenset(self.answers)  # before this evaluation
        self.advance: Callable[[int], None] = lambda count: None

    def add_partial(self, kind: str, asked: tuple, answer: Answer) -> None:
        """What the harness calls for every answer."""
        key = request_key(kind, asked)
        if key not in self.answers and not _is_sampled(kind, asked):
            self.answers[key] = answer
            self.lines.add(len(self.lines.done), {"asked": key, "answer": answer})
        self.advance(1)


def request_key(kind: str, asked: tuple) -> str:
    """A hash of a request: `loglikelihood`, `loglikelihood_rolling` or `generate_until`, and its arguments."""
    return hashlib.sha256(json.dumps([kind, *asked], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _is_sampled(kind: str, asked: tuple) -> bool:
    return kind == "generate_until" and bool(asked[1].get("do_sample"))


@dataclass(frozen=True)
class Continuation:
    """Token ids that are to be scored after others, as far as the model can read them."""

    read: list[int]  # what the model reads: all but the last token
    given: int  # how many of these are the context's
    scored: list[int]  # the continuation


class RoutedLM(HFLM):
    """`HFLM` on a run: see the head of this file. Raises as HFLM does."""

    def __init__(self, run: LoadedRun, answered: Answered, progress: Progress):
        front = run.recipe.virtual_tokens
        longest = longest_input(run.model)
        super().__init__(
            pretrained=run.model,
            tokenizer=run.tokenizer,
            batch_size=start_size(run.recipe.eval.batch_size, run.device),
            max_length=longest - front if front and longest else None,  # else as the harness finds it
        )
        self.run, self.answered, self.progress = run, answered, progress
        self.cache_hook = answered

    # What is asked, less what is answered already.

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        ask = super().loglikelihood
        found = self._all_answers("loglikelihood", requests, lambda todo: ask(todo, disable_tqdm=True))
        return [(nats, greedy) for nats, greedy in found]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        ask = super().loglikelihood_rolling

        def in_parts(todo: list) -> list[float]:  # whose answers are kept when a part is done
            size = int(self.batch_size)
            parts = [ask(todo[i : i + size], disable_tqdm=True) for i in range(0, len(todo), size)]
            return [nats for part in parts for nats in part]

        return self._all_answers("loglikelihood_rolling", requests, in_parts)

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        ask = super().generate_until
        return self._all_answers("generate_until", requests, lambda todo: ask(todo, disable_tqdm=True))

    def _all_answers(self, kind: str, requests: list, ask: Callable[[list], list]) -> list[Answer]:
        """One answer for each request; only those that are not kept are asked for."""
        keys = [request_key(kind, request.args) for request in requests]
        kept = self.answered.answers
        todo = [request for key, request in zip(keys, requests, strict=True) if key not in kept]
        bar = self.progress(f"lm-eval {kind}", len(requests), len(requests) - len(todo))
        known = dict(kept)
        self.answered.advance = bar.advance
        asked = iter(ask(todo) if todo else [])
        return [known[key] if key in known else next(asked) for key in keys]

    # How the model is run.

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is it what greedy decoding writes?) for requests (name, context, continuation) of
        token ids. Continuations that differ in their last token only share a pass."""
        passes: dict[tuple, list[int]] = {}
        for i, (_, context, scored) in enumerate(requests):
            passes.setdefault((tuple(context), tuple(scored[:-1])), []).append(i)
        members = list(passes.values())
        rows = [cut_to(self.max_length, requests[some[0]][1], requests[some[0]][2]) for some in members]
        if any(row.given < 1 for row in rows):
            longest = max(len(row.scored) for row in rows)
            raise DataError(
                f"--lm-eval: an answer to be scored has {longest} tokens, but the model reads at most "
                f"{self.max_length}; leave the task out"
            )

        def work(chunk: list[int]) -> list[list[tuple[float, bool]]]:
            parts = self._log_probabilities([rows[j] for j in chunk])
            found = []
            for j, logs in zip(chunk, parts, strict=True):
                found.append([score(logs, requests[i][2]) for i in members[j]])
            return found

        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for chunk, found in in_chunks([len(row.read) for row in rows], int(self.batch_size), work):
            for j, scores in zip(chunk, found, strict=True):
                for i, answer in zip(members[j], scores, strict=True):
                    answers[i] = answer
                    name = requests[i][0]
                    if name is not None:  # else a part of a text
                        self.cache_hook.add_partial("loglikelihood", name, answer)
        return answers

    @torch.no_grad()
    def _log_probabilities(self, rows: list[Continuation]) -> tuple[Tensor, ...]:
        """For each row the log-probabilities (its scored positions, V) in float32."""
        ids, real, prompt, positions = (tensor.to(self.device) for tensor in laid_out(rows))
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self.run.which == "model":  # whose own code may read positions that are padding
            inputs["attention_mask"] = real.long()
        with self._running(prompt), one_sequence_a_row():
            logits = logits_at(self.run.model, positions, **inputs)  # (S, V)
        return logits.float().log_softmax(-1).split([len(row.scored) for row in rows])

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Token ids (B, T and what is new) after a context (B, T) that is padded on the left."""
        prompt = options["attention_mask"].bool()
        prompt = prompt.repeat_interleave(options.get("num_beams", 1), 0)  # generate repeats its rows, too
        with self._running(prompt):
            return super()._model_generate(context, max_length, stop, **options)

    @contextmanager
    def _running(self, prompt: Tensor) -> Iterator[None]:
        """Context: forward passes whose routers choose from the positions `prompt` (B, T)."""
        adapter = self.run.adapter
        with ExitStack() as scope:
            scope.enter_context(torch.compiler.set_stance("force_eager"))  # the cache grows with every token
            scope.enter_context(torch.no_grad())
            scope.enter_context(adapter.unchanging())
            scope.enter_context(adapter.tracing(Trace(prompt=prompt, record=False)))
            scope.enter_context(no_word_of_positions())
            yield


def cut_to(longest: int, context: list[int], scored: list[int]) -> Continuation:
    """A continuation after its context, cut on the left to what a model of `longest` positions reads."""
    read = (context + scored)[-(longest + 1) :][:-1]
    return Continuation(read, len(read) + 1 - len(scored), scored)


def laid_out(rows: list[Continuation]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids (B, T) padded on the right; where real ones stand and where contexts do, (B, T) bool; and the S
    positions whose logits say what follows, counted row by row."""
    length = max(len(row.read) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    prompt = torch.zeros(len(rows), length, dtype=torch.bool)
    positions: list[int] = []
    for i, row in enumerate(rows):
        ids[i, : len(row.read)] = torch.tensor(row.read)
        real[i, : len(row.read)] = True
        prompt[i, : row.given] = True
        positions += range(i * length + row.given - 1, i * length + len(row.read))
    return ids, real, prompt, torch.tensor(positions)


def score(logs: Tensor, scored: list[int]) -> tuple[float, bool]:
    """The log-likelihood of token ids `scored` (C,) under log-probabilities `logs` (C, V), and whether each is the
    likeliest."""
    wanted = torch.tensor(scored, device=logs.device)
    picked = logs.gather(-1, wanted.unsqueeze(-1))
    return float(picked.double().sum()), bool((logs.argmax(-1) == wanted).all())
