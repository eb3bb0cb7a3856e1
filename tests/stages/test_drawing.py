"""Draws from torch's global random state."""

import threading

import torch

from triptych.stages.drawing import seeded


def test_two_threads_do_not_take_each_other_s_numbers() -> None:
    drawn: dict[int, torch.Tensor] = {}
    both = threading.Barrier(2)

    def draw(seed: int) -> None:
        both.wait()
        with seeded(seed):
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
    with seeded(9):
        torch.rand(7)
    assert torch.rand(()) == second
