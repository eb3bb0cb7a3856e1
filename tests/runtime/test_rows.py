"""Calls that are rows of one give what each would give by itself."""

from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from triptych.runtime.rows import Call, own, run_joined


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
    return Call("model", function, args, kwargs, copy_context())


def doubled(x: torch.Tensor, *, pair: Any = None) -> Any:
    return {"twice": x * 2, "nested": [(x + 1,), None], "pair": pair}


@given(rows=st.lists(st.integers(1, 4), min_size=1, max_size=5), width=st.integers(1, 3))
def test_rows_are_parted_as_they_were_joined(rows: list[int], width: int) -> None:
    calls = [call(doubled, torch.randn(n, width), pair=(torch.randn(n, 2), 3)) for n in rows]
    for each, part in zip(calls, run_joined(calls)):
        alone = each.run()
        assert torch.equal(part["twice"], alone["twice"])
        assert torch.equal(part["nested"][0][0], alone["nested"][0][0]) and part["nested"][1] is None
        assert torch.equal(part["pair"][0], alone["pair"][0]) and part["pair"][1] == 3


def test_a_library_s_output_keeps_its_class_and_loses_its_keys_and_values() -> None:
    def model(x: torch.Tensor) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(x, past_key_values=DynamicCache(), hidden_states=(x, x * 2))

    first, second = run_joined([call(model, torch.zeros(1, 2)), call(model, torch.ones(2, 2))])
    assert type(second) is BaseModelOutputWithPast
    assert second.past_key_values is None and second[0].shape == (2, 2)
    assert second.hidden_states[1].tolist() == [[2, 2], [2, 2]] and first.hidden_states[1].sum() == 0


def test_what_one_keeps_does_not_keep_the_others() -> None:
    part = own(run_joined([call(doubled, torch.randn(1, 8)), call(doubled, torch.randn(7, 8))])[0])
    assert part["twice"].untyped_storage().nbytes() == part["twice"].nbytes


@pytest.mark.parametrize(
    "other",
    [
        call(doubled, torch.zeros(1, 3)),
        call(doubled, torch.zeros(1, 2, dtype=torch.float64)),
        call(doubled, torch.zeros(1, 2), pair=True),
        call(doubled, torch.zeros(1, 2), pair=object()),
        Call("another model", doubled, (torch.zeros(1, 2),), {}, copy_context()),
    ],
)
def test_calls_that_differ_in_more_than_rows_do_not_fit_together(other: Call) -> None:
    assert call(doubled, torch.zeros(1, 2)).form() != other.form()


def test_calls_of_any_rows_fit_together() -> None:
    assert call(doubled, torch.zeros(1, 2)).form() == call(doubled, torch.ones(5, 2)).form()


def test_a_call_whose_tensors_disagree_on_their_number_has_no_rows() -> None:
    assert call(doubled, torch.zeros(1, 2), pair=torch.zeros(64, 2)).rows is None
    assert call(doubled, torch.zeros(())).rows is None
    assert call(doubled, 3).rows is None
    assert call(doubled, torch.zeros(2, 2), pair=[torch.zeros(2)]).rows == 2


@pytest.mark.parametrize("bad", [lambda x: x.sum(), lambda x: x[:1], lambda x: DynamicCache()])
def test_what_has_not_a_row_for_each_cannot_be_parted(bad: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(ValueError, match="came back"):
        run_joined([call(bad, torch.zeros(1, 2)), call(bad, torch.zeros(2, 2))])


def test_only_the_same_tokens_are_the_same_content() -> None:
    tokens = torch.tensor([[1, 2]])
    assert call(doubled, tokens).content() == call(doubled, tokens.clone()).content()
    assert call(doubled, tokens).content() != call(doubled, tokens + 1).content()
    one, other = (call(doubled, torch.zeros(1, 2)) for _ in range(2))
    assert one.content() != other.content(), "comparing pictures would cost more than it saves"
