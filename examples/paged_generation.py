"""A server of a small language model: many requests at once, whose keys and values share pages of one cache.

    python examples/paged_generation.py
    python examples/paged_generation.py --requests 100 --pages 40

The model is that of train_char_lm.py, trained here for some seconds. Requests come while others are being answered.
Each is the beginning of a passage, many of the same passage, and asks for one continuation or several. Every step of
the server (*continuous batching*) computes a chunk of each new prompt and one character of each answer together:

- `cufa.PagedKVCache` says on which pages the keys and values of a sequence lie. Prompts that begin alike share pages,
  answers to one prompt fork its sequence, and where pages run out the youngest answer gives up its own for a while.
- `cufa.attention_with_kvcache` rotates and appends the new keys, and attends over the pages.

In the end every answer is written once more, without any cache, and must be the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import train_char_lm as lm
from tqdm import tqdm
from train_char_lm import Size, Transformer, gelu, non_negative, norm, positive

import cufa

Array = Any  # a NumPy or a CuPy array

SIZE = Size(layers=2, width=96, heads=4, context=192, batch=6, steps=400, rate=4e-3, dropout=0.0)
PAGE_SIZE = 16
CHUNK = 48  # characters of a prompt in a step
TOLERANCE = 1e-4  # of scores: what rounding may make of them


# Requests ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Answer:
    """A continuation of a prompt, of as many characters as there is noise for."""

    prompt: list[int]
    noise: Array  # Gumbel noise (count, characters), so that an answer does not depend on what is beside it
    written: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return len(self.written) == len(self.noise)


class Request(NamedTuple):
    """Answers to one prompt, asked for when the server makes a certain step."""

    step: int
    answers: list[Answer]


def make_requests(text: Array, characters: int, count: int, temperature: float, seed: int) -> list[Request]:
    """Requests for one to three continuations of passages, of which there are a few only."""
    random = np.random.default_rng(seed)
    starts = random.integers(len(text) - SIZE.context, size=4)
    steps = np.cumsum(random.poisson(4, size=count))
    requests = []
    for step in steps.tolist():
        start, length = random.choice(starts), random.integers(SIZE.context // 4, SIZE.context // 2)
        answers, more = random.integers(1, 4), random.integers(SIZE.context // 8, SIZE.context // 3)
        noise = random.gumbel(scale=temperature, size=(answers, more, characters))
        requests.append(Request(step, [Answer(text[start : start + length].tolist(), each) for each in noise]))
    return requests


# The server ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Job:
    """A sequence of the cache, and the answers that go on from it: several until its prompt is computed."""

    answers: list[Answer]
    sequence: cufa.PagedSequence | None = None  # None while it waits

    @property
    def tokens(self) -> list[int]:
        return self.answers[0].prompt + self.answers[0].written


class Server:
    """Answers requests with up to `max_batch` sequences at a time, on a cache of `pages` pages."""

    def __init__(self, model: Transformer, pages: int, max_batch: int) -> None:
        self.model, self.max_batch = model, max_batch
        heads, width = model.size.heads, model.size.width
        self.cache = cufa.PagedKVCache.empty(
            num_layers=model.size.layers,
            num_pages=pages,
            page_size=PAGE_SIZE,
            num_heads_k=heads,
            head_dim=width // heads,
            dtype=model.flat.dtype,
            xp=model.xp,
        )
        self.batch = self.cache.batch(max_batch, model.size.context)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []  # the oldest first
        self.preemptions = 0

    def submit(self, request: Request) -> None:
        self.waiting.append(Job(request.answers))

    def step(self) -> int:
        """One step of all running sequences; how many characters it has written."""
        self.admit()
        jobs = self.schedule()
        if not jobs:
            return 0
        sequences = [job.sequence for job in jobs]
        batch = self.batch.update(sequences)
        new = [token for sequence in sequences for token in sequence.tokens[sequence.length :]]
        logits = self.forward(batch, self.model.xp.asarray(new))
        self.cache.commit(sequences)

        # Whose characters are all in the cache goes on by one.
        done = [(row, job) for row, job in enumerate(jobs) if job.sequence.length == len(job.tokens)]
        turns = [(row, answer) for row, job in done for answer in job.answers]
        for (_, answer), token in zip(turns, self.choose(logits, turns), strict=True):
            answer.written.append(token)
        for _, job in done:
            self.part(job)
        return len(turns)

    def admit(self) -> None:
        """Start waiting jobs while there are rows and pages for them."""
        rows = self.max_batch - sum(len(job.answers) for job in self.running)
        while self.waiting and len(self.waiting[0].answers) <= rows:
            tokens = self.waiting[0].tokens
            if len(tokens) // PAGE_SIZE + 1 > self.cache.num_available_pages:
                break
            job = self.waiting.popleft()
            job.sequence = self.cache.add_sequence(tokens)
            self.running.append(job)
            rows -= len(job.answers)

    def schedule(self) -> list[Job]:
        """Append to each sequence what a step computes of it. Where pages run out, the youngest job goes."""
        jobs = []
        for job in self.running[:]:
            while job.sequence is not None:
                todo = job.tokens[job.sequence.length :][:CHUNK]
                try:
                    self.cache.append(job.sequence, todo)
                except cufa.OutOfPagesError:
                    self.preempt(self.running.pop())
                else:
                    jobs.append(job)
                    break
        return jobs

    def preempt(self, job: Job) -> None:
        """Let a job wait once more; if its pages are still cached then, it goes on where it was."""
        self.cache.free(job.sequence)
        job.sequence = None
        self.waiting.appendleft(job)
        self.preemptions += 1

    def part(self, job: Job) -> None:
        """Give each unfinished answer of a job a sequence of its own."""
        unfinished = [answer for answer in job.answers if not answer.finished]
        self.running += [Job([answer], self.cache.fork(job.sequence)) for answer in unfinished[1:]]
        if unfinished:
            job.answers = unfinished[:1]
        else:
            self.cache.free(job.sequence)
            self.running.remove(job)

    def forward(self, batch: cufa.PagedBatch, tokens: Array) -> Array:
        """The logits behind the last new token of each sequence, (batch, characters). The caches get their rows."""
        model = self.model
        heads, cos, sin = model.size.heads, model.cos[:, 0], model.sin[:, 0]
        x = linear(model, "embedding", model.one_hot[tokens])
        for layer, (k_cache, v_cache) in enumerate(zip(self.cache.k_caches, self.cache.v_caches, strict=True)):
            q, k, v = linear(model, f"qkv{layer}", norm(x)[0]).reshape(len(x), 3, heads, -1).swapaxes(0, 1)
            out = cufa.attention_with_kvcache(
                q,
                k_cache,
                v_cache,
                k=k,
                v=v,
                cache_seqlens=batch.cache_seqlens,
                block_table=batch.block_table,
                cu_seqlens_q=batch.cu_seqlens_q,
                rotary_cos=cos,
                rotary_sin=sin,
                rotary_interleaved=False,
                causal=True,
            )
            x = x + linear(model, f"out{layer}", out.reshape(len(x), -1))
            x = x + linear(model, f"down{layer}", gelu(linear(model, f"up{layer}", norm(x)[0]))[0])
        return linear(model, "head", norm(x[batch.cu_seqlens_q[1:] - 1])[0])

    def choose(self, logits: Array, turns: list[tuple[int, Answer]]) -> list[int]:
        """The next character of each answer, by the row of `logits` that it goes on from."""
        if not turns:
            return []
        rows, answers = zip(*turns, strict=True)
        noise = np.stack([answer.noise[len(answer.written)] for answer in answers])
        scores = logits[self.model.xp.asarray(rows)] + self.model.xp.asarray(noise)
        return scores.argmax(axis=-1).tolist()


def linear(model: Transformer, name: str, x: Array) -> Array:
    return model.linear(name)(x)[0]


def serve(server: Server, requests: list[Request]) -> tuple[float, int]:
    """Answer all requests, which come when their step does: seconds, and the number of steps."""
    total = sum(len(answer.noise) for request in requests for answer in request.answers)
    arriving = deque(requests)
    start, step = time.perf_counter(), 0
    with tqdm(total=total, unit=" characters", disable=None, leave=False) as bar:
        while arriving or server.waiting or server.running:
            while arriving and arriving[0].step <= step:
                server.submit(arriving.popleft())
            written, pages = server.step(), server.cache.stats().held
            bar.set_postfix(running=len(server.running), waiting=len(server.waiting), pages=pages, refresh=False)
            bar.update(written)
            step += 1
    return time.perf_counter() - start, step


# The check -----------------------------------------------------------------------------------------------


def check(model: Transformer, answers: list[Answer]) -> float:
    """Write every answer without a cache: a whole pass for each character. The seconds that it took; or exit."""
    start = time.perf_counter()
    for number, answer in enumerate(tqdm(answers, unit=" answers", disable=None, leave=False)):
        ids = answer.prompt[:]
        for token, noise in zip(answer.written, answer.noise, strict=True):
            scores = model.logits(model.xp.asarray([ids]))[0, -1] + model.xp.asarray(noise)
            best = int(scores.argmax())
            if best != token and not scores[best] - scores[token] <= TOLERANCE:
                place = len(ids) - len(answer.prompt)
                sys.exit(f"paged_generation: answer {number} differs at character {place} from one without a cache.")
            ids.append(token)
    return time.perf_counter() - start


# The command ---------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=positive, default=24, metavar="N", help="how many come (default: 24)")
    parser.add_argument(
        "--pages", type=positive, default=40, metavar="N", help=f"of {PAGE_SIZE} keys each (default: 40)"
    )
    parser.add_argument("--max-batch", type=positive, default=12, metavar="N", help="sequences in a step (default: 12)")
    parser.add_argument(
        "--steps", type=positive, default=SIZE.steps, metavar="N", help=f"of the training (default: {SIZE.steps})"
    )
    parser.add_argument(
        "--temperature", type=non_negative, default=0.7, metavar="T", help="the higher, the bolder (default: 0.7)"
    )
    parser.add_argument("--seed", type=positive, default=1, metavar="N", help="of all that is random (default: 1)")
    options = parser.parse_args()
    if options.pages * PAGE_SIZE < SIZE.context:
        parser.error(f"--pages {options.pages}: one answer may need {SIZE.context // PAGE_SIZE}")
    if options.max_batch < 3:
        parser.error(f"--max-batch {options.max_batch}: a request asks for up to 3 answers at once")
    return options


def trained(xp: ModuleType, characters: Array, ids: Array, options: argparse.Namespace) -> Transformer:
    size = SIZE._replace(steps=options.steps)
    model = Transformer(xp, len(characters), size, lm.cufa_attention, options.seed)
    text, held_out = np.split(ids, [len(ids) - len(ids) // 10])
    curves, seconds = lm.train(model, text, held_out, options.seed)
    loss = list(curves.held_out.values())[-1]
    print(f"Trained a model of {model.flat.size:,} weights in {seconds:.1f} s: {loss:.2f} nats per character.")
    return model


def main() -> None:
    options = parse_arguments()
    characters, ids = np.unique(np.array(list(lm.TEXT.read_text(encoding="utf-8"))), return_inverse=True)
    model = trained(lm.array_library(), characters, ids, options)
    requests = make_requests(
        ids[-len(ids) // 10 :], len(characters), options.requests, options.temperature, options.seed
    )
    answers = [answer for request in requests for answer in request.answers]
    server = Server(model, options.pages, options.max_batch)

    seconds, steps = serve(server, requests)
    count, stats = sum(len(answer.written) for answer in answers), server.cache.stats()
    rate = count / seconds
    print(f"{len(requests)} requests, {len(answers)} answers: {count:,} characters, {steps} steps, {seconds:.1f} s.")
    print(f"Of {stats.prompt_tokens:,} characters of prompts {stats.cached_tokens:,} were in the cache.")
    print(f"Pages: {stats.copies} copied for forks, {stats.evictions} evicted; {server.preemptions} answers preempted.")
    seconds = check(model, answers)
    print(f"All are the same without a cache: {count / seconds:,.0f} characters/s instead of {rate:,.0f}.")

    longest = max(requests, key=lambda request: len(request.answers))
    print(f"\nA prompt:\n\n{''.join(characters[longest.answers[0].prompt])}")
    for number, answer in enumerate(longest.answers, 1):
        print(f"\nAnswer {number}:\n\n{''.join(characters[answer.written])}")


if __name__ == "__main__":
    main()
