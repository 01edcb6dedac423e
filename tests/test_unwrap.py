"""Models inside what data parallelism, compilation and PEFT put around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.parallel import DataParallel, DistributedDataParallel

from cat_rs.unwrap import unwrap_model
from tests.models import add_lora, tiny_unet

Wrap = Callable[[torch.nn.Module], torch.nn.Module]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports


def fsdp(model: torch.nn.Module) -> torch.nn.Module:
    return FullyShardedDataParallel(
        model,
        sharding_strategy=ShardingStrategy.NO_SHARD,
        ignored_states=list(model.parameters()),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )


WRAPPERS: dict[str, Wrap] = {
    "ddp": DistributedDataParallel,
    "data-parallel": DataParallel,
    "compiled": torch.compile,
    "fsdp1": fsdp,
}


@pytest.fixture(autouse=True)
def _group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# A compiled module compiled again is a function.
@pytest.mark.parametrize(("outer", "inner"), sorted(set(product(WRAPPERS, WRAPPERS)) - {("compiled", "compiled")}))
def test_wrappers_are_taken_off_in_any_order(outer: str, inner: str) -> None:
    model = torch.nn.Linear(2, 3)
    assert unwrap_model(WRAPPERS[outer](WRAPPERS[inner](model))) is model
    assert unwrap_model(model) is model


@pytest.mark.parametrize("inner", WRAPPERS)
def test_wrappers_that_calls_need_can_stay(inner: str) -> None:
    wrapped = WRAPPERS[inner](torch.nn.Linear(2, 3))
    expected = wrapped.module if inner == "ddp" else wrapped
    assert unwrap_model(DistributedDataParallel(wrapped), ddp_only=True) is expected


def test_a_peft_model_is_unwrapped_where_asked() -> None:
    from peft import LoraConfig, get_peft_model

    unet = tiny_unet()
    model = get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q"]))
    wrapped = DistributedDataParallel(torch.compile(model))
    assert unwrap_model(wrapped) is model
    assert unwrap_model(wrapped, peft=True) is unet
    assert unwrap_model(add_lora(tiny_unet()), peft=True).__class__ is unet.__class__


def test_a_compiled_model_inside_a_peft_model_leaves_the_peft_model() -> None:
    # A PeftModel passes attributes that it has not on to what it wraps, `_orig_mod` among them.
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(torch.compile(tiny_unet()), LoraConfig(r=2, target_modules=["to_q"]))
    assert unwrap_model(model) is model
