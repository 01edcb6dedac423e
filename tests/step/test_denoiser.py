"""How conditions are joined along the batch, and which convention a model is called by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cat_rs.errors import InvalidValueError, ShapeError
from cat_rs.step.conditions import join_conditions
from cat_rs.step.denoiser import Convention, convention_of, denoiser_predict

B = 3


def join(first: dict[str, Any], second: dict[str, Any], **options: Any) -> dict[str, Any]:
    return join_conditions(first, second, (B, B), **options)


def test_tensors_with_a_batch_dimension_are_concatenated() -> None:
    a, b = torch.randn(B, 4), torch.randn(B, 4)
    assert torch.equal(join({"x": a}, {"x": b})["x"], torch.cat([a, b]))


def test_the_same_tensor_with_a_batch_dimension_is_concatenated() -> None:
    a = torch.randn(B, 4)
    assert torch.equal(join({"x": a}, {"x": a})["x"], torch.cat([a, a]))


@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (2 * B, 3), (1, 7, 3)], ids=str)
def test_a_tensor_without_a_batch_dimension_is_passed_once(shape: tuple[int, ...]) -> None:
    a = torch.randn(shape)
    assert join({"x": a}, {"x": a})["x"] is a
    assert join({"x": a}, {"x": a.clone()})["x"] is a


@pytest.mark.parametrize("nest", [lambda x: {"x": x}, lambda x: [x], lambda x: (None, {"x": [x]})])
def test_nested_values(nest: Any) -> None:
    a, b, shared = torch.randn(B, 4), torch.randn(B, 4), torch.randn(7)
    both = join({"n": nest([a, shared])}, {"n": nest([b, shared])})
    expected = nest([torch.cat([a, b]), shared])
    assert str(both["n"]) == str(expected)
    assert type(both["n"]) is type(expected)


def test_keys_named_as_unbatched_are_passed_once() -> None:
    a = torch.randn(B, 4)
    assert join({"x": a}, {"x": a}, unbatched=["x"])["x"] is a


def test_position_ids_are_passed_once_whatever_their_length() -> None:
    convention = Convention(unbatched=("ids",))
    for ids in (torch.randn(B, 4), torch.randn(7, 4)):
        assert join({"ids": ids}, {"ids": ids.clone()}, convention=convention)["ids"] is ids
    # The older form of FLUX's ids has a batch dimension.
    assert join({"ids": torch.ones(B, 7, 4)}, {"ids": torch.ones(B, 7, 4)}, convention=convention)["ids"].shape[0] == 6


def test_lists_with_an_entry_a_sample_follow_each_other() -> None:
    convention = Convention(per_sample=("feats",))
    a, b = [torch.randn(n, 2) for n in range(1, 4)], [torch.randn(n, 2) for n in range(4, 7)]
    both = join({"feats": a}, {"feats": tuple(b)}, convention=convention)["feats"]
    assert [x.shape[0] for x in both] == [1, 2, 3, 4, 5, 6]


T = torch.ones
BAD: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "shapes": (T(B, 4), T(B, 5), {}, ShapeError, r"must have shape \[3, 4\] .* got \[3, 5\]"),
    "no-batch-dimension": (T(7, 4), 2 * T(7, 4), {}, ShapeError, r"batch dimension of 3 or, .* equal .* \[7, 4\]"),
    "scalar": (torch.tensor(1.0), torch.tensor(2.0), {}, ShapeError, "a batch dimension of 3 or"),
    "unbatched-differs": (T(B, 4), 2 * T(B, 4), {"unbatched": ["x"]}, ShapeError, r"without one, equal .* \[3, 4\]"),
    "tensor-and-value": (T(B), 1, {}, InvalidValueError, "must equal cond's"),
    "values": (1.0, 0.5, {}, InvalidValueError, "must equal cond's 1.0, got 0.5"),
    "list-lengths": ([T(B)], [T(B), T(B)], {}, InvalidValueError, "must equal cond's"),
}


@pytest.mark.parametrize(
    ("first", "second", "options", "error", "text"), [pytest.param(*row, id=name) for name, row in BAD.items()]
)
def test_conditions_that_do_not_match_are_named(
    first: Any, second: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=rf"^CatStep: `cond_no_trigger\['x'\]` .*{text}"):
        join({"x": first}, {"x": second}, **options)


@pytest.mark.parametrize(
    ("value", "got"), [([1, 2], "2 entries"), (torch.ones(B), "Tensor"), (None, "NoneType")], ids=str
)
@pytest.mark.parametrize("side", ["cond", "cond_no_trigger"])
def test_a_list_without_an_entry_a_sample_is_named(value: Any, got: str, side: str) -> None:
    good = {"feats": [1, 2, 3]}
    pair = {"cond": good, "cond_no_trigger": good, side: {"feats": value}}
    with pytest.raises(ShapeError, match=rf"^CatStep: `{side}\['feats'\]` must be a list .* a sample, 3, got {got}"):
        join(*pair.values(), convention=Convention(per_sample=("feats",)))


class FluxTransformer2DModel(torch.nn.Module):
    """Takes and returns what FLUX does."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return hidden_states + timestep[:, None]


class OwnFlux(FluxTransformer2DModel):
    """A class derived from a known one."""


class WithVariance(torch.nn.Module):
    """Returns the variance beside the mean."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(out_channels=out_channels)

    def forward(self, z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.cat([z, -z], 1)


def test_a_derived_class_is_called_as_its_base() -> None:
    z, t = torch.ones(2, 1), torch.tensor([0.0, 500.0])
    assert convention_of(OwnFlux()) == convention_of(FluxTransformer2DModel()) != Convention()
    assert torch.equal(denoiser_predict(OwnFlux())(OwnFlux(), z, t, {}), torch.tensor([[1.0], [1.5]]))


def test_a_compiled_model_is_called_as_the_model_in_it() -> None:
    assert convention_of(torch.compile(OwnFlux(), backend="eager")) == convention_of(OwnFlux())


def test_of_an_output_with_the_variance_the_mean_is_the_prediction() -> None:
    z, t = torch.ones(2, 4, 3, 3), torch.zeros(2)
    model = WithVariance(8)
    assert torch.equal(denoiser_predict(model)(model, z, t, {}), z)
    # Twice the channels by a model that does not say so is left to fail as a wrong shape.
    unknown = WithVariance(4)
    assert denoiser_predict(unknown)(unknown, z, t, {}).shape == (2, 8, 3, 3)
