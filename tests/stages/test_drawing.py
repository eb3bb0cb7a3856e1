"""Draws from torch's global random state."""

import threading

import pytest
import torch

from triptych.stages.drawing import seeded

CPU = torch.device("cpu")


def test_two_threads_do_not_take_each_other_s_numbers() -> None:
    drawn: dict[int, torch.Tensor] = {}
    both = threading.Barrier(2)

    def draw(seed: int) -> None:
        both.wait()
        with seeded(seed, CPU):
            drawn[seed] = torch.stack([torch.rand(3) for _ in range(2000)])

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, numbers in drawn.items():
        torch.manual_seed(seed)
        assert torch.equal(numbers, torch.stack([torch.rand(3) for _ in range(2000)])), seed


def test_the_state_is_put_back() -> None:
    torch.manual_seed(5)
    first, second = torch.rand(2)
    torch.manual_seed(5)
    assert torch.rand(()) == first
    with seeded(9, CPU):
        torch.rand(7)
    assert torch.rand(()) == second


def test_cards_are_not_touched_for_what_a_cpu_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("a card was asked")

    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, touched)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with seeded(9, CPU):
        drawn = torch.rand(3)
    monkeypatch.undo()
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(9)))
