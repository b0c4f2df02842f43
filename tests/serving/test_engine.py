"""Micro-batching: who shares a call of the model with whom, and who pays for whose rows."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from serving.decode import Feeds, Row
from serving.engine import FED_ROWS, Engine, Job
from serving.errors import BadRequest
from serving.metrics import LAYOUT, Metrics, Shared

POISON, LAST_WORDS = -666, -777


class Halves:
    """Predicts half of each row's number, and remembers its calls."""

    def __init__(self, inline: bool, batching: bool = True, seconds: float = 0.0) -> None:
        self.inline, self.batching, self.seconds = inline, batching, seconds
        self.calls: list[list[int]] = []
        self.threads: list[str] = []

    def predict(self, rows: Sequence[Row]) -> tuple[list[float], Feeds]:
        self.calls.append([row[0] for row in rows])
        self.threads.append(threading.current_thread().name)
        time.sleep(self.seconds)
        if (POISON,) in rows:
            raise ValueError("poison")
        if (LAST_WORDS,) in rows:
            raise SystemExit("good bye")
        return [row[0] / 2 for row in rows], {"numbers": np.array(rows, float)}


class Client:
    """One request's side of a job."""

    def __init__(self, engine: Engine, *numbers: int, decode: Callable[[], list[Row]] | None = None) -> None:
        self.finished = False  # whether it has left
        self.answers: list[list[float] | BaseException] = []
        self.feeds: Feeds | None = None
        self.answered = asyncio.Event()
        rows = None if decode else [(number,) for number in numbers]
        engine.submit(Job(self, self._finish, rows, decode))

    def _finish(self, job: Job, result: list[float] | BaseException) -> None:
        self.feeds = job.feeds
        self.answers.append(result)
        self.answered.set()

    async def answer(self) -> list[float] | BaseException:
        await asyncio.wait_for(self.answered.wait(), 10)
        assert len(self.answers) == 1
        return self.answers[0]


def running(model: Halves, scenario: Callable[[Engine], Any], max_rows: int = 1000) -> Metrics:
    metrics = Metrics(Shared(1), 0)

    async def run() -> None:
        await scenario(Engine(model, metrics, max_rows))

    asyncio.run(run())
    return metrics


def calls_counted(metrics: Metrics) -> float:
    return sum(metrics.own[LAYOUT.model : LAYOUT.model + LAYOUT.latency_size - 1])


def test_a_lone_client_of_a_compiled_model_is_answered_in_the_next_turn_of_the_loop() -> None:
    async def scenario(engine: Engine) -> None:
        for number in range(5):
            client = Client(engine, number)
            assert not client.answers, "never from within submit"
            await asyncio.sleep(0)
            assert client.answers == [[number / 2]]

    running(Halves(inline=True), scenario)


def test_a_lone_client_of_an_original_does_not_wait_for_others() -> None:
    model = Halves(inline=False)

    async def scenario(engine: Engine) -> None:
        for number in range(3):
            assert await Client(engine, number).answer() == [number / 2]

    running(model, scenario)
    assert model.calls == [[0], [1], [2]]
    assert all(name.startswith("predict") for name in model.threads)


def test_requests_of_one_turn_of_the_loop_share_a_call_of_a_compiled_model() -> None:
    model = Halves(inline=True)

    async def scenario(engine: Engine) -> None:
        clients = [Client(engine, number, number + 1) for number in range(10)]
        assert [await client.answer() for client in clients] == [[n / 2, (n + 1) / 2] for n in range(10)]

    metrics = running(model, scenario)
    assert len(model.calls) == 1
    assert model.threads == ["MainThread"]
    assert calls_counted(metrics) == 1
    assert metrics.own[LAYOUT.size - 1] == 10, "requests in all batches"


@pytest.mark.parametrize(("batching", "calls"), [(True, [1, 9]), (False, [1] * 10)])
def test_requests_that_come_while_an_original_is_busy_share_the_next_call(
    batching: bool, calls: list[int]
) -> None:
    model = Halves(inline=False, batching=batching, seconds=0.02)

    async def scenario(engine: Engine) -> None:
        clients = [Client(engine, number) for number in range(10)]
        assert [await client.answer() for client in clients] == [[n / 2] for n in range(10)]

    running(model, scenario)
    assert [len(call) for call in model.calls] == calls


@pytest.mark.parametrize("inline", [True, False])
def test_no_call_gets_more_rows_than_a_request_may_have(inline: bool) -> None:
    model = Halves(inline=inline, seconds=0.001)

    async def scenario(engine: Engine) -> None:
        clients = [Client(engine, *range(4)) for _ in range(9)]
        assert [await client.answer() for client in clients] == [[0.0, 0.5, 1.0, 1.5]] * 9

    running(model, scenario, max_rows=10)
    assert max(len(call) for call in model.calls) <= 10


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("poison", [POISON, LAST_WORDS])
def test_a_poisonous_row_fails_its_own_request_alone_and_costs_few_calls(inline: bool, poison: int) -> None:
    model = Halves(inline=inline)

    async def scenario(engine: Engine) -> None:
        first = Client(engine, 0)
        clients = [Client(engine, poison if number == 13 else number) for number in range(32)]
        assert await first.answer() == [0.0]
        for number, client in enumerate(clients):
            answer = await client.answer()
            if number == 13:
                assert isinstance(answer, (ValueError, SystemExit))
            else:
                assert answer == [number / 2]
        assert await Client(engine, 8).answer() == [4.0], "the engine goes on"

    running(model, scenario)
    assert len(model.calls) <= 16, "not one for every request that was with it"


def test_many_rows_are_told_by_the_arrays_that_the_model_was_given_of_them() -> None:
    async def scenario(engine: Engine) -> None:
        clients = [Client(engine, *range(start, start + rows)) for start, rows in ((0, 9), (50, 1), (60, 20))]
        for client in clients:
            await client.answer()
        first, single, last = [client.feeds for client in clients]
        assert 1 < FED_ROWS <= 9
        assert single is None
        assert first is not None and first["numbers"].tolist() == [[float(number)] for number in range(9)]
        assert last is not None and last["numbers"].tolist() == [[float(number)] for number in range(60, 80)]

    model = Halves(inline=True)
    running(model, scenario)
    assert len(model.calls) == 1


def test_a_big_request_goes_to_the_thread_and_small_ones_pass_it() -> None:
    model = Halves(inline=True)

    async def scenario(engine: Engine) -> None:
        big = Client(engine, *range(1000))
        small = Client(engine, 1)
        assert await small.answer() == [0.5]
        assert await big.answer() == [number / 2 for number in range(1000)]

    running(model, scenario)
    by_size = dict(zip(map(len, model.calls), model.threads, strict=True))
    assert by_size[1] == "MainThread"
    assert by_size[1000].startswith("predict")


def test_big_requests_of_a_fast_model_come_back_from_the_thread() -> None:
    """What the calls on the thread took counts too, or nobody would ever find out that they are fast."""
    model = Halves(inline=True)

    async def scenario(engine: Engine) -> None:
        for _ in range(60):
            await Client(engine, *range(100)).answer()

    running(model, scenario)
    assert model.threads[0].startswith("predict")
    assert "MainThread" in model.threads[20:]


@pytest.mark.parametrize("inline", [True, False])
def test_rows_of_clients_that_have_left_are_not_predicted(inline: bool) -> None:
    model = Halves(inline=inline, seconds=0.02)

    async def scenario(engine: Engine) -> None:
        clients = [Client(engine, number) for number in range(6)]
        for left in clients[1::2]:
            left.finished = True
        assert [await client.answer() for client in clients] == [[0.0], [], [1.0], [], [2.0], []]

    running(model, scenario)
    assert sorted(number for call in model.calls for number in call) == [0, 2, 4]


def test_a_body_that_cannot_be_decoded_fails_alone_and_counts_as_no_call() -> None:
    model = Halves(inline=True)

    def broken() -> list[Row]:
        raise BadRequest(400, "the body is not JSON")

    def mistaken() -> list[Row]:
        raise MemoryError

    async def scenario(engine: Engine) -> None:
        clients = [Client(engine, decode=decode) for decode in (broken, mistaken, lambda: [(4,)])]
        first, second, third = [await client.answer() for client in clients]
        assert isinstance(first, BadRequest)
        assert isinstance(second, MemoryError)
        assert third == [2.0]

    metrics = running(model, scenario)
    assert calls_counted(metrics) == 1
    assert model.threads[0].startswith("predict")
