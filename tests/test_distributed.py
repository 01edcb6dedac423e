"""Two processes train one adapter: CatStep, FlatAdamW and the trainer under torch.distributed.

The processes of a fixture run many small scenarios one after the other, because starting them is what takes time;
each test looks at what one scenario left.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import cat_rs
from cat_rs.errors import AdapterError, CatRsError, DeviceError, InvalidValueError
from cat_rs.options import ConfigError
from cat_rs.processes import Processes
from cat_rs.step import collectives
from cat_rs.training import TrainConfig, train
from cat_rs.training.encoded_dataset import EncodedDataset
from cat_rs.training.sampler import BatchSampler
from cat_rs.training.trainer import Trainer
from tests.conftest import draw_picture
from tests.models import add_lora, batch, lora_parameters, tiny_unet
from tests.ranks import RANKS, TIMEOUT, join_group, on_ranks

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

if not dist.is_available():
    pytest.skip("this PyTorch is built without torch.distributed", allow_module_level=True)

TOLERANCE = 2e-5
"""Of the size of the adapter's change: the sum over the batch is rounded in another order, and Adam divides by it."""
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}

Results = list[dict[str, Any]]


def scheduler() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def cat_step(model: torch.nn.Module, **options: Any) -> cat_rs.CatStep:
    return cat_rs.CatStep(model, scheduler(), **{**SETTINGS, **options})


def joint_batch(number: int) -> dict[str, torch.Tensor]:
    """The batches of all ranks in step `number`, one after the other."""
    parts = [batch(RANKS * number + rank) for rank in range(RANKS)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def adapter_of(step: cat_rs.CatStep) -> dict[str, torch.Tensor]:
    return {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in step.trainable.items()}


class Counter:
    """Counts the all_reduces of this process."""

    def __init__(self) -> None:
        self.calls = 0
        self._all_reduce = dist.all_reduce
        dist.all_reduce = self._count

    def _count(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._all_reduce(*args, **kwargs)

    def during(self, act: Callable[[], Any]) -> int:
        before = self.calls
        act()
        return self.calls - before


# --- what the ranks run


def some_steps(rank: int, counter: Counter) -> dict[str, Any]:
    """Each rank draws another adapter, and sees other data."""
    step = cat_step(add_lora(tiny_unet(), seed=2 + rank))
    before, metrics = adapter_of(step), []
    counts = [counter.during(lambda n=n: metrics.append(step(**batch(RANKS * n + rank)))) for n in range(3)]
    return {"before": before, "after": adapter_of(step), "counts": counts, "metrics": [tuple(m) for m in metrics]}


def accumulating(rank: int, counter: Counter) -> dict[str, Any]:
    step = cat_step(add_lora(tiny_unet()), accumulate=2)
    counts = [counter.during(lambda n=n: step(**batch(RANKS * n + rank))) for n in range(4)]
    return {"after": adapter_of(step), "counts": counts}


def following(rank: int, counter: Counter) -> dict[str, Any]:
    """Each rank's terms are its own; the factor that follows them is that of all."""
    factor = cat_rs.CatFactorTarget(1e-3, rate=0.5, decay=0.5)
    step, metrics = cat_step(add_lora(tiny_unet()), cat_factor=factor, accumulate=2, preserve_every=2), []
    counts = [counter.during(lambda n=n: metrics.append(step(**batch(RANKS * n + rank)))) for n in range(12)]
    return {"after": adapter_of(step), "counts": counts, "factors": [one.cat_factor for one in metrics]}


def prepared_by_accelerate(rank: int, counter: Counter) -> dict[str, Any]:
    from accelerate import Accelerator

    model = Accelerator(cpu=True).prepare(add_lora(tiny_unet()))
    kind = type(model).__name__
    step = cat_step(model, accumulate=2)
    step(**batch(rank))
    local = {name: param.grad.clone() for name, param in step.trainable.items()}
    counts = [counter.during(lambda n=n: step(**batch(RANKS * n + rank))) for n in range(1, 4)]
    return {"kind": kind, "local": local, "after": adapter_of(step), "counts": counts}


def not_finite_on_one(rank: int, counter: Counter) -> dict[str, Any]:
    step = cat_step(add_lora(tiny_unet()))
    step(**batch(rank))
    before, one = adapter_of(step), batch(2 + rank)
    if rank == 1:
        one["latents"][0, 0, 0, 0] = torch.inf
    metrics = step(**one)
    skipped = adapter_of(step)
    step(**batch(4 + rank))
    return {
        "before": before,
        "skipped": skipped,
        "after": adapter_of(step),
        "loss": metrics.loss,
        "grad_norm": metrics.grad_norm,
        "skipped_steps": step.optimizer.skipped_steps,
    }


def overflow_on_one(rank: int, counter: Counter) -> dict[str, Any]:
    """A scale that overflows on the second rank only; then steps at the scale that both have."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step = cat_step(add_lora(tiny_unet()), grad_scaler=scaler)
    before, metrics, counts, scales = adapter_of(step), [], [], []
    for number in range(2):
        one = batch(RANKS * number + rank)
        if (number, rank) == (0, 1):
            one["sample_weight"] = torch.full((2,), 1e36)
        with torch.autocast("cpu", torch.float16):
            counts.append(counter.during(lambda one=one: metrics.append(step(**one))))
        scales.append(scaler.get_scale())
        if number == 0:
            skipped = adapter_of(step)
    return {
        "before": before,
        "skipped": skipped,
        "after": adapter_of(step),
        "scales": scales,
        "counts": counts,
        "norms": [one.grad_norm for one in metrics],
    }


def fully_sharded_base(rank: int, counter: Counter) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = add_lora(tiny_unet()), init_device_mesh("cpu", (RANKS,))
    adapter = {param for param in model.parameters() if param.requires_grad}
    # The inner blocks give their weights back after forward, before the layers' backward needs them.
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        fully_shard(block, mesh=mesh, ignored_params=adapter)
    fully_shard(model, mesh=mesh, ignored_params=adapter)
    sharded = type(model.conv_in.weight).__name__
    step = cat_step(model)
    for n in range(3):
        step(**batch(RANKS * n + rank))
    return {"sharded": sharded, "after": adapter_of(step)}


def fully_sharded_base_first_version(rank: int, counter: Counter) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = add_lora(tiny_unet())
    adapter = [param for param in model.parameters() if param.requires_grad]
    blocks = ModuleWrapPolicy({type(block) for block in (*model.down_blocks, model.mid_block, *model.up_blocks)})
    step = cat_step(
        FullyShardedDataParallel(
            model, auto_wrap_policy=blocks, ignored_states=adapter, device_id=torch.device("cpu"), use_orig_params=True
        )
    )
    for n in range(3):
        step(**batch(RANKS * n + rank))
    return {"after": adapter_of(step)}


def error_of(act: Callable[[], Any]) -> tuple[str, str]:
    try:
        act()
    except CatRsError as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


def sharded_adapters(rank: int, counter: Counter) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    second = add_lora(tiny_unet())
    fully_shard(second, mesh=init_device_mesh("cpu", (RANKS,)))
    first = FullyShardedDataParallel(add_lora(tiny_unet()), device_id=torch.device("cpu"), use_orig_params=True)
    return {"fsdp2": error_of(lambda: cat_step(second)), "fsdp1": error_of(lambda: cat_step(first))}


def unlike_adapters(rank: int, counter: Counter) -> dict[str, Any]:
    return {
        "shapes": error_of(lambda: cat_step(add_lora(tiny_unet(), r=2 + rank))),
        "number": error_of(lambda: cat_step(add_lora(tiny_unet(), target_modules=["to_k", "to_v"][rank:]))),
    }


def groups(rank: int, counter: Counter) -> dict[str, Any]:
    alone = [dist.new_group([each]) for each in range(RANKS)]
    step = cat_step(add_lora(tiny_unet()), process_group=alone[rank])
    step(**batch(rank))
    other = alone[1 - rank]
    return {
        "after": adapter_of(step),
        "stranger": error_of(lambda: cat_step(add_lora(tiny_unet()), process_group=other)),
    }


def resumed(rank: int, counter: Counter) -> dict[str, Any]:
    """From the middle of an accumulation, with noise drawn by each rank."""

    def fresh(seed: int) -> cat_rs.CatStep:
        generator = torch.Generator().manual_seed(seed + rank)
        return cat_step(add_lora(tiny_unet()), accumulate=2, generator=generator)

    def drawn(number: int) -> dict[str, torch.Tensor]:
        return {name: value for name, value in batch(number).items() if name not in ("noise", "timesteps")}

    whole = fresh(0)
    for n in range(3):
        whole(**drawn(RANKS * n + rank))
    parted = fresh(10)
    parted(**drawn(50 + rank))
    parted.load_state_dict(whole.state_dict())
    losses = []
    for n in range(3, 6):
        losses.append([step(**drawn(RANKS * n + rank)).loss for step in (whole, parted)])
    return {"whole": adapter_of(whole), "parted": adapter_of(parted), "losses": losses}


def some_params(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 5), (7,), (2, 2))
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def flat_adamw(rank: int, counter: Counter) -> dict[str, Any]:
    params, alone = some_params(rank), some_params(rank)
    optimizer = cat_rs.FlatAdamW(
        params, lr=0.1, max_grad_norm=1.0, process_group=dist.group.WORLD, low_precision=torch.float16
    )
    copies = [optimizer.low_precision_copy(param).clone() for param in params if param.dtype == torch.float32]
    optimizer_alone = cat_rs.FlatAdamW(alone, lr=0.1, max_grad_norm=1.0)
    before = [param.detach().clone() for param in params]
    for param, one, grad in zip(params, alone, some_params(10 + rank), strict=True):
        param.grad.copy_(grad.detach())
        one.grad.copy_(grad.detach())
    return {
        "before": before,
        "copies": copies,
        "counts": (counter.during(optimizer.step), counter.during(optimizer_alone.step)),
        "after": [param.detach().clone() for param in params],
        "alone": [param.detach().clone() for param in alone],
    }


SCENARIOS = (
    some_steps,
    accumulating,
    following,
    prepared_by_accelerate,
    not_finite_on_one,
    overflow_on_one,
    fully_sharded_base,
    fully_sharded_base_first_version,
    sharded_adapters,
    unlike_adapters,
    groups,
    resumed,
    flat_adamw,
)


def train_settings(folder: Path, model: Path, name: str, rank: int = 0, **settings: Any) -> TrainConfig:
    """A short run; a rank that must not write gets an output folder of its own, which must not appear."""
    return TrainConfig(
        **{
            "model": str(model),
            "data": str(folder / "concept"),
            "caption": "a {trigger} cat number {name}",
            "output_dir": str(folder / (name if rank == 0 else f"{name}-of-rank-{rank}")),
            "trigger": ("sks",),
            "class_word": "cat",
            "preserve": "captions",
            "rank": 2,
            "steps": 5,
            "batch_size": 2,
            "lr": 1e-2,
            "lora_dropout": 0.5,
            "flip": True,
            "checkpoint_every": 2,
            "cat_drift": 1e-3,
            "tensorboard": False,
            **settings,
        }
    )


def run_trainings(rank: int, folder: Path, model: Path) -> dict[Any, Any]:
    """What each training left, by output folder and whether it continued."""
    advance, encoded, fsync = Trainer.advance, EncodedDataset.batch, os.fsync
    results: dict[Any, Any] = {}

    def run(name: str, at_step_3: Callable[[torch.Tensor], Any] | None = None, **settings: Any) -> None:
        """Trains, and notes what was seen, reported and raised; `at_step_3` may change the figures of that step."""
        notes: dict[str, Any] = {"pictures": [], "figures": [], "lines": [], "error": None}

        def watched_batch(cache: EncodedDataset, pictures: Any, *generators: Any, **options: Any) -> Any:
            notes["pictures"].append(list(pictures))
            return encoded(cache, pictures, *generators, **options)

        def watched_advance(training: Trainer) -> torch.Tensor:
            figures = advance(training)
            if at_step_3 is not None and training.steps_done == 3:
                at_step_3(figures)
            notes["figures"].append(figures)
            notes["adapter"] = lora_parameters(training.unet)
            notes["global_draws"] = torch.get_rng_state()
            return figures

        EncodedDataset.batch, Trainer.advance = watched_batch, watched_advance
        try:
            train(train_settings(folder, model, name, rank, **settings), progress=False, report=notes["lines"].append)
        except (CatRsError, ArithmeticError) as error:
            notes["error"] = type(error).__name__, str(error)
        finally:
            EncodedDataset.batch, Trainer.advance, os.fsync = encoded, advance, fsync
        results[name, "resume" in settings] = notes

    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError("the machine fails here")

    def signal_one_rank(_: torch.Tensor) -> None:
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)

    def spoil_one_loss(figures: torch.Tensor) -> None:
        if rank == 1:
            figures[0] = torch.nan

    def fill_disk(_: torch.Tensor) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if rank == 0:
            os.fsync = full

    run("whole")
    run("parted", fail)
    run("parted", resume=True)
    run("signalled", signal_one_rank)
    run("spoiled", spoil_one_loss)
    run("full", fill_disk)
    run("full", resume=True)
    run("bank", teacher_draws=2)
    default = {"preserve": None, "cat_drift": None, "preserve_prompts": str(folder / "general.txt")}
    run("set", **default)
    run("set parted", fail, **default)
    run("set parted", resume=True, **default)
    return results


def run_everything(rank: int, folder: Path, model: Path) -> None:
    join_group(rank, folder)
    counter = Counter()
    results: dict[Any, Any] = {scenario.__name__: scenario(rank, counter) for scenario in SCENARIOS}
    torch.save(results | run_trainings(rank, folder, model), folder / f"results-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def training_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainings")
    (folder / "concept").mkdir()
    for colour in ("red", "green", "blue"):
        draw_picture(folder / "concept" / f"{colour}.png", colour)
    (folder / "general.txt").write_text("a house\na tree\n")
    return folder


@pytest.fixture(scope="module")
def ranks(training_folder: Path, tiny_pipeline_dir: Path) -> Results:
    """What each rank's scenarios and trainings left."""
    return on_ranks(run_everything, training_folder, tiny_pipeline_dir)


# --- CatStep and FlatAdamW


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def assert_trained_as_one(
    after: dict[str, torch.Tensor], batches: list[dict[str, torch.Tensor]], **options: Any
) -> None:
    """The adapter is that of one process that saw the batches of all ranks as one."""
    model = add_lora(tiny_unet())
    before = lora_parameters(model)
    step = cat_step(model, **options)
    for one in batches:
        step(**one)
    expected = adapter_of(step)
    assert expected.keys() == after.keys()

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(torch.cat([(a[name].double() - b[name].double()).flatten() for name in a]).norm())

    change, error = distance(expected, before), distance(after, expected)
    assert change > 0
    assert error <= TOLERANCE * change, f"the changes differ by {error / change:.2g} of their size"


def test_ranks_start_and_stay_identical(ranks: Results) -> None:
    ours, theirs = (results["some_steps"] for results in ranks)
    assert_same(ours["before"], lora_parameters(add_lora(tiny_unet(), seed=2)))
    assert_same(ours["before"], theirs["before"])
    assert_same(ours["after"], theirs["after"])
    assert not any(torch.equal(ours["before"][name], value) for name, value in ours["after"].items())


def test_equals_one_process_at_the_joint_batch(ranks: Results) -> None:
    assert_trained_as_one(ranks[0]["some_steps"]["after"], [joint_batch(n) for n in range(3)])


def test_one_all_reduce_a_step(ranks: Results) -> None:
    assert [results["some_steps"]["counts"] for results in ranks] == [[1, 1, 1]] * RANKS


def test_metrics_are_of_the_rank_and_the_norm_of_the_average(ranks: Results) -> None:
    ours, theirs = (results["some_steps"]["metrics"] for results in ranks)
    joint = cat_step(add_lora(tiny_unet()))(**joint_batch(0))
    assert ours[0][0] != theirs[0][0]
    assert float(ours[0][0] + theirs[0][0]) / RANKS == pytest.approx(float(joint.loss), rel=1e-6)
    assert ours[0][3] == theirs[0][3]
    assert float(ours[0][3]) == pytest.approx(float(joint.grad_norm), rel=1e-5)


def test_accumulating_calls_do_not_reduce(ranks: Results) -> None:
    assert [results["accumulating"]["counts"] for results in ranks] == [[0, 1, 0, 1]] * RANKS
    assert_same(*(results["accumulating"]["after"] for results in ranks))
    assert_trained_as_one(ranks[0]["accumulating"]["after"], [joint_batch(n) for n in range(4)], accumulate=2)


def test_a_factor_follows_the_terms_of_all_ranks(ranks: Results) -> None:
    ours, theirs = (results["following"] for results in ranks)
    assert_same(ours["factors"], theirs["factors"])
    assert_same(ours["after"], theirs["after"])
    # The gradient, and in every second step the terms.
    assert ours["counts"] == [0, 1, 0, 2] * 3
    factor = cat_rs.CatFactorTarget(1e-3, rate=0.5, decay=0.5)
    options = {"cat_factor": factor, "accumulate": 2, "preserve_every": 2}
    assert_trained_as_one(ours["after"], [joint_batch(n) for n in range(12)], **options)
    assert len({float(one) for one in ours["factors"]}) == 3


def test_a_model_in_ddp_is_reduced_once(ranks: Results) -> None:
    ours, theirs = (results["prepared_by_accelerate"] for results in ranks)
    assert ours["kind"] == "DistributedDataParallel"
    assert ours["counts"] == theirs["counts"] == [1, 0, 1]
    # DDP's reduction would have made them the same after the first call.
    assert not any(torch.equal(grad, theirs["local"][name]) for name, grad in ours["local"].items())
    assert_same(ours["after"], ranks[0]["accumulating"]["after"])
    assert_same(ours["after"], theirs["after"])


def test_a_gradient_not_finite_on_one_rank_is_skipped_by_all(ranks: Results) -> None:
    ours, theirs = (results["not_finite_on_one"] for results in ranks)
    assert ours["loss"].isfinite()
    assert not theirs["loss"].isfinite()
    for results in (ours, theirs):
        assert not results["grad_norm"].isfinite()
        assert results["skipped_steps"] == 1
        assert_same(results["skipped"], results["before"])
    assert_same(ours["after"], theirs["after"])
    assert_trained_as_one(ours["after"], [joint_batch(0), joint_batch(2)])


def test_an_overflow_on_one_rank_lowers_the_scale_of_all(ranks: Results) -> None:
    ours, theirs = (results["overflow_on_one"] for results in ranks)
    for results in (ours, theirs):
        assert results["scales"] == [2.0**9, 2.0**9]
        assert results["counts"] == [1, 1]
        assert [bool(norm.isfinite()) for norm in results["norms"]] == [False, True]
        assert_same(results["skipped"], results["before"])
        assert not torch.equal(*(next(iter(results[key].values())) for key in ("after", "before")))
    assert_same(ours["after"], theirs["after"])


def test_the_base_may_be_fully_sharded(ranks: Results) -> None:
    assert ranks[0]["fully_sharded_base"]["sharded"] == "DTensor"
    ours, theirs = (results["fully_sharded_base"]["after"] for results in ranks)
    assert_same(ours, theirs)
    assert_trained_as_one(ours, [joint_batch(n) for n in range(3)])


def test_the_base_may_be_in_fully_sharded_data_parallel(ranks: Results) -> None:
    ours, theirs = (results["fully_sharded_base_first_version"]["after"] for results in ranks)
    assert_same(ours, theirs)
    assert_trained_as_one(ours, [joint_batch(n) for n in range(3)])


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_a_sharded_adapter_is_named(ranks: Results, kind: str) -> None:
    for results in ranks:
        error, text = results["sharded_adapters"][kind]
        assert error == "AdapterError"
        assert text.startswith("CatStep: `model` must have its trainable parameters whole on every rank, got ")
        assert ("a DTensor" if kind == "fsdp2" else "FullyShardedDataParallel's flat parameter") in text
        assert "shard only the frozen base" in text


def test_an_adapter_partitioned_by_deepspeed_is_named() -> None:
    model = add_lora(tiny_unet())
    for param in model.parameters():
        param.ds_id = 0
    with pytest.raises(
        AdapterError, match=r"whole on every rank, got .*lora_A.*: a parameter partitioned by DeepSpeed"
    ):
        cat_step(model)
    with pytest.raises(InvalidValueError, match="`params` must be whole on every rank, got a parameter partitioned"):
        cat_rs.FlatAdamW([param for param in model.parameters() if param.requires_grad])


def test_adapters_that_differ_between_ranks_are_named(ranks: Results) -> None:
    for results in ranks:
        error, text = results["unlike_adapters"]["shapes"]
        assert error == "InvalidValueError"
        assert "`params` must have the same shapes and dtypes on every rank" in text
        assert "[2, 16], 'torch.float32') on rank 0 and ([3, 16], 'torch.float32') on rank 1" in text
        assert "32 parameters on rank 0 and 16 parameters on rank 1" in results["unlike_adapters"]["number"][1]


def test_a_group_of_one_trains_alone(ranks: Results) -> None:
    for rank, results in enumerate(ranks):
        assert_trained_as_one(results["groups"]["after"], [batch(rank)])


def test_a_group_without_this_rank_is_named(ranks: Results) -> None:
    expected = "CatStep: `process_group` must be a torch.distributed process group with this rank, got one without"
    for results in ranks:
        error, text = results["groups"]["stranger"]
        assert error == "InvalidValueError"
        assert text.startswith(expected)


def test_something_else_than_a_group_is_named() -> None:
    with pytest.raises(InvalidValueError, match=r"^CatStep: `process_group` must be .*, got str"):
        cat_step(add_lora(tiny_unet()), process_group="gloo")
    with pytest.raises(InvalidValueError, match=r"^FlatAdamW: `process_group` must be .*, got str"):
        cat_rs.FlatAdamW(some_params(0), process_group="gloo")


def test_a_group_that_cannot_move_the_tensors_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(DeviceError, match=r"must have a backend for tensors on cpu, as gloo .* got cuda:nccl"):
        collectives.check_alike("CatStep", None, some_params(0))


def test_resumes_bit_for_bit_within_an_accumulation(ranks: Results) -> None:
    ours, theirs = (results["resumed"] for results in ranks)
    assert_same(ours["whole"], theirs["whole"])
    for results in (ours, theirs):
        assert_same(results["whole"], results["parted"])
        assert all(torch.equal(whole, parted) for whole, parted in results["losses"])
    assert ours["losses"][0][0] != theirs["losses"][0][0]


def test_flat_adamw_steps_on_the_mean_gradient(ranks: Results) -> None:
    params = some_params(0)
    optimizer = cat_rs.FlatAdamW(params, lr=0.1, max_grad_norm=1.0)
    for param, *grads in zip(params, *(some_params(10 + rank) for rank in range(RANKS)), strict=True):
        param.grad.copy_(sum(grad.detach() / RANKS for grad in grads))
    optimizer.step()
    for results in ranks:
        start = [param.detach() for param in some_params(0)]
        assert_same(results["flat_adamw"]["before"], start)
        assert_same(results["flat_adamw"]["copies"], [param.half() for param in start if param.dtype == torch.float32])
        assert_same(results["flat_adamw"]["after"], [param.detach() for param in params])


def test_flat_adamw_reduces_each_buffer_once_and_only_when_asked(ranks: Results) -> None:
    for rank, results in enumerate(ranks):
        assert results["flat_adamw"]["counts"] == (2, 0)
        alone = some_params(rank)
        optimizer = cat_rs.FlatAdamW(alone, lr=0.1, max_grad_norm=1.0)
        for param, grad in zip(alone, some_params(10 + rank), strict=True):
            param.grad.copy_(grad.detach())
        optimizer.step()
        assert_same(results["flat_adamw"]["alone"], [param.detach() for param in alone])


# --- the trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_processes_train_one_adapter(ranks: Results) -> None:
    ours, theirs = (results["whole", False] for results in ranks)
    assert_same(ours["adapter"], theirs["adapter"])
    assert all(float(a[0]) != float(b[0]) for a, b in zip(ours["figures"], theirs["figures"], strict=True))
    # Dropout draws from torch's global generator.
    assert not torch.equal(ours["global_draws"], theirs["global_draws"])


def test_processes_share_each_batch(ranks: Results) -> None:
    order = BatchSampler(3, 2 * RANKS, seed=0)
    ours, theirs = (results["whole", False]["pictures"] for results in ranks)
    assert [a + b for a, b in zip(ours, theirs, strict=True)] == [order.next_batch() for _ in range(5)]


def test_only_the_main_process_writes_and_reports(ranks: Results, training_folder: Path) -> None:
    assert ranks[0]["whole", False]["lines"]
    assert not ranks[1]["whole", False]["lines"]
    assert not [path for path in training_folder.iterdir() if "of-rank" in path.name]


def test_the_log_holds_means_over_the_processes(ranks: Results, training_folder: Path) -> None:
    rows = [json.loads(line) for line in (training_folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row, *figures in zip(rows, *(results["whole", False]["figures"] for results in ranks), strict=True):
        names = ("loss", "diffusion", "cat", "grad_norm", "cat_factor")
        assert [row[name] for name in names] == pytest.approx((sum(figures) / RANKS).tolist(), rel=1e-6)


def test_processes_share_cached_base_predictions(ranks: Results, training_folder: Path) -> None:
    assert [results["bank", False]["error"] for results in ranks] == [None] * RANKS
    assert len(weights(training_folder / "bank")) > 0
    assert not (training_folder / "bank" / "teacher_bank.safetensors").exists()


def test_processes_draw_one_preservation_set_and_go_on_with_it(ranks: Results, training_folder: Path) -> None:
    for rank, results in enumerate(ranks):
        assert [results["set", False]["error"], results["set parted", True]["error"]] == [None, None], rank
        assert_same(results["set", False]["adapter"], ranks[0]["set", False]["adapter"])
    assert_same(weights(training_folder / "set parted"), weights(training_folder / "set"))
    rows = [json.loads(line) for line in (training_folder / "set" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["cat"] is not None] == [4]


def test_an_adapter_tells_the_batch_of_all_processes(ranks: Results, training_folder: Path) -> None:
    assert cat_rs.load_lora(training_folder / "whole").metadata["batch_size"] == 2 * RANKS


def test_resumed_processes_equal_uninterrupted_ones(ranks: Results, training_folder: Path) -> None:
    for results in ranks:
        assert results["parted", False]["error"][0] == "ArithmeticError"
        assert results["parted", True]["error"] is None
        # The third step was lost.
        assert torch.equal(
            torch.stack(results["whole", False]["figures"][2:]), torch.stack(results["parted", True]["figures"])
        )
    assert_same(weights(training_folder / "parted"), weights(training_folder / "whole"))


def test_a_run_resumes_with_as_many_processes(ranks: Results, training_folder: Path, tiny_pipeline_dir: Path) -> None:
    config = train_settings(training_folder, tiny_pipeline_dir, "whole", resume=True)
    with pytest.raises(ConfigError, match=r"resume: expected as many processes as wrote .*step-000005, 2, got 1"):
        train(config, progress=False, report=lambda line: None)


def test_a_signal_to_one_process_stops_all(ranks: Results) -> None:
    for results in ranks:
        name, text = results["signalled", False]["error"]
        assert name == "TrainingInterrupted"
        assert "stopped after step 3" in text
        assert "signalled/checkpoints/step-000003" in text


def test_a_loss_not_finite_in_one_process_stops_all(ranks: Results) -> None:
    for results in ranks:
        name, text = results["spoiled", False]["error"]
        assert name == "TrainingError"
        assert "the loss of step 3 is not finite" in text


def test_a_checkpoint_that_cannot_be_written_stops_all(ranks: Results, training_folder: Path) -> None:
    for results in ranks:
        name, text = results["full", False]["error"]
        assert name == "CheckpointError"
        assert "No space left on device" in text
        assert "step-000002 is whole" in text
        assert results["full", True]["error"] is None
    assert_same(weights(training_folder / "full"), weights(training_folder / "whole"))


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    processes = Processes.init(torch.device("cpu"))
    assert (processes.rank, processes.world_size, processes.is_main) == (0, 1, True)
    assert not dist.is_initialized()


def test_one_process_where_several_were_asked_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # As `accelerate launch --cpu --num_processes 2` sets them.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match=r"expected the number given to accelerate launch, got 1, .* torchrun"):
        Processes.init(torch.device("cpu"))


def test_torchrun_trains_the_same_adapter(ranks: Results, training_folder: Path, tiny_pipeline_dir: Path) -> None:
    settings = train_settings(training_folder, tiny_pipeline_dir, "launched")
    settings.save(training_folder / "launched.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command = ["-m", "cat_rs.cli", "train", "--config", str(training_folder / "launched.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(Path(cat_rs.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launcher + command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 steps in") == 1
    assert_same(weights(training_folder / "launched"), weights(training_folder / "whole"))
