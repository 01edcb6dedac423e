"""TeacherBank: a step with stored draws against explicit ones and the plain recipe, files, refusals, resume."""

from __future__ import annotations

import copy
import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import cat_rs
from cat_rs import TeacherBank, atomic
from cat_rs.errors import DeviceError, DtypeError, InvalidValueError, ShapeError
from tests.models import CROSS, add_lora, batch, lora_parameters, tiny_transformer, tiny_unet
from tests.references import PlainRecipe
from tests.step.test_cat_step import SETTINGS, _through_a_file, cat_step, ddpm, flow_matching, unet_pair
from tests.tolerances import assert_close

PICTURES, DRAWS = 3, 4
INDICES = [[0, 2], [1, 1], [2, 0], [0, 1], [2, 2]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Latents and both conditions of every picture."""
    one = batch(77, PICTURES, dtype=dtype)
    return {name: one[name] for name in ("latents", "cond", "cond_no_trigger")}


def build(model: torch.nn.Module, scheduler: Any = None, **options: Any) -> TeacherBank:
    data = pictures(next(model.parameters()).dtype)
    arguments = {"latents": data["latents"], "cond_no_trigger": data["cond_no_trigger"], "draws": DRAWS}
    settings = {"generator": generator(5), "dtype": torch.float32, "batch_size": 5}
    return TeacherBank.build(model, scheduler or ddpm(), **{**arguments, **settings, **options})


def step_arguments(indices: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a step with a bank takes for these pictures."""
    data = pictures(dtype)
    return {"latents": torch.tensor(indices)} | {name: data[name][indices] for name in ("cond", "cond_no_trigger")}


def assert_trains_alike(ours: torch.nn.Module, theirs: torch.nn.Module, before: Any, tolerance: float) -> None:
    """The adapters' changes agree to ``tolerance`` of their size."""
    a, b = lora_parameters(ours), lora_parameters(theirs)
    assert a.keys() == b.keys()
    change, error = (
        torch.cat([(one[name].double() - other[name].double()).flatten() for name in before]).norm()
        for one, other in ((b, before), (a, b))
    )
    assert change > 0
    assert error <= tolerance * change, f"the changes differ by {float(error / change):.2g} of their size"


def train_both(bank: TeacherBank, ours: cat_rs.CatStep, theirs: Any, **extra: Any) -> None:
    """Steps from the bank, and the same steps given latents, noise and timesteps explicitly."""
    follow = generator(9)
    ours.generator = generator(9)
    for indices in INDICES:
        arguments = step_arguments(indices)
        metrics = ours(**arguments, **extra)
        drawn = bank.read(arguments["latents"], torch.randint(bank.draws, (len(indices),), generator=follow))
        arguments |= {"latents": drawn.latents, "noise": drawn.noise, "timesteps": drawn.timesteps}
        expected = theirs(**arguments, **extra)
        loss = expected["loss"] if isinstance(expected, dict) else expected.loss
        assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0], ids=["uniform", "min-snr"])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_step_with_a_bank_equals_one_with_its_draws_given(
    prediction_type: str, snr_gamma: float | None, where: str, tmp_path: Path
) -> None:
    model, base = unet_pair()
    scheduler = ddpm(prediction_type=prediction_type)
    options: dict[str, Any] = {"snr_gamma": snr_gamma}
    bank = build(model, scheduler, path=None if where == "memory" else tmp_path / "bank.safetensors")
    explicit, plain, before = copy.deepcopy(model), copy.deepcopy(model), lora_parameters(model)
    step = cat_step(model, scheduler, teacher_bank=bank, **options)
    mask = (torch.rand(2, 1, 8, 8, generator=generator(3)) > 0.3).float()
    extra = {"mask": mask, "sample_weight": torch.tensor([0.5, 2.0])}
    train_both(bank, step, cat_step(explicit, scheduler, **options), **extra)
    assert_trains_alike(model, explicit, before, 2e-5)
    recipe = PlainRecipe(plain, base, scheduler, prediction_type=prediction_type, **SETTINGS, **options)
    train_both(bank, cat_step(copy.deepcopy(plain), scheduler, teacher_bank=bank, **options), recipe, **extra)
    assert_trains_alike(model, plain, before, 1e-4)


def test_equals_the_plain_recipe_with_flow_matching() -> None:
    base = tiny_transformer()
    model = add_lora(copy.deepcopy(base), target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pooled = torch.randn(PICTURES, 8)
    data = pictures()
    cond = {"encoder_hidden_states": data["cond_no_trigger"], "pooled_projections": pooled}
    scheduler = flow_matching()
    bank = build(model, scheduler, cond_no_trigger=cond)
    plain, before = copy.deepcopy(model), lora_parameters(model)
    step = cat_step(model, scheduler, teacher_bank=bank, generator=generator(9))
    recipe = PlainRecipe(plain, base, scheduler, prediction_type="flow", **SETTINGS)
    follow = generator(9)
    for indices in INDICES:
        conds = {
            name: {"encoder_hidden_states": data[name][indices], "pooled_projections": pooled[indices]}
            for name in ("cond", "cond_no_trigger")
        }
        picked = torch.tensor(indices)
        step(picked, **conds)
        drawn = bank.read(picked, torch.randint(DRAWS, (2,), generator=follow))
        recipe(drawn.latents, **conds, noise=drawn.noise, timesteps=drawn.timesteps)
    assert_trains_alike(model, plain, before, 1e-4)


def test_the_base_model_is_not_called_again() -> None:
    model, _ = unet_pair()
    bank = build(model)
    calls: list[int] = []
    model.register_forward_hook(lambda _model, inputs, _output: calls.append(len(inputs[0] if inputs else ())))
    cat_step(model, teacher_bank=bank)(**step_arguments([0, 1]))
    assert len(calls) == 1


def test_a_factor_of_zero_leaves_the_predictions_aside() -> None:
    model, _ = unet_pair()
    metrics = cat_step(model, teacher_bank=build(model), cat_factor=0.0)(**step_arguments([0, 1]))
    assert metrics.cat == 0
    assert metrics.loss == metrics.diffusion > 0


@pytest.mark.parametrize("built_with", ["adapter", "base", "peft-model"])
def test_predictions_are_the_base_models(built_with: str) -> None:
    from peft import LoraConfig, get_peft_model

    model, base = unet_pair()
    config = LoraConfig(r=4, target_modules=["to_k", "to_v"], init_lora_weights=False)
    peft_model = get_peft_model(copy.deepcopy(base), config)
    bank = build({"adapter": model, "base": base, "peft-model": peft_model}[built_with])
    picked, draws = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 3, 1, 2])
    drawn = bank.read(picked, draws)
    data = pictures()
    assert torch.equal(drawn.latents, data["latents"][picked])
    noisy = ddpm().add_noise(drawn.latents, drawn.noise, drawn.timesteps)
    with torch.no_grad():
        expected = base(noisy, drawn.timesteps, data["cond_no_trigger"][picked]).sample
    # The batch is another: matrix products round differently.
    assert_close(drawn.base_pred, expected, factor=20, scale=1.0)
    # Whichever of the three it was built with, all of them may train with it.
    for trained in (model, peft_model):
        cat_step(trained, teacher_bank=bank)(**step_arguments([1, 2]))


def test_draws_are_of_the_schedule_and_standard_normal() -> None:
    base = tiny_unet()
    bank = build(base, draws=300, batch_size=100)
    every = torch.arange(PICTURES * 300)
    drawn = bank.read(every // 300, every % 300)
    assert len(drawn.timesteps.unique()) > 500
    assert 440 < drawn.timesteps.double().mean() < 560
    assert abs(float(drawn.noise.double().mean())) < 0.02
    assert float(drawn.noise.double().std()) == pytest.approx(1.0, abs=0.02)
    # No two draws share their noise.
    assert len(drawn.noise.flatten(1).unique(dim=0)) == len(every)


def test_a_deviation_gives_each_draw_latents_of_its_own() -> None:
    base, data = tiny_unet(), pictures()
    deviation = torch.rand(data["latents"].shape, generator=generator(1))
    bank = build(base, draws=200, batch_size=100, latents_std=deviation)
    drawn = bank.read(torch.ones(200, dtype=torch.long), torch.arange(200))
    standard = (drawn.latents - data["latents"][1]) / deviation[1]
    assert float(standard.double().std()) == pytest.approx(1.0, abs=0.03)
    assert abs(float((standard.double() * drawn.noise.double()).mean())) < 0.03
    noisy = ddpm().add_noise(drawn.latents, drawn.noise, drawn.timesteps)
    with torch.no_grad():
        expected = base(noisy, drawn.timesteps, data["cond_no_trigger"][1].expand(200, -1, -1)).sample
    assert_close(drawn.base_pred, expected, factor=20, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_predictions_are_stored_in_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = unet_pair()
    exact = build(model)
    path = tmp_path / "bank.safetensors"
    bank = build(model, dtype=dtype, path=path)
    every = torch.arange(PICTURES * DRAWS)
    where = every // DRAWS, every % DRAWS
    ours, theirs = bank.read(*where), exact.read(*where)
    assert bank.dtype == ours.base_pred.dtype == dtype
    assert torch.equal(ours.base_pred, theirs.base_pred.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
    with safe_open(path, "pt") as file:
        assert file.get_slice("base").get_shape() == [PICTURES, DRAWS, 4, 8, 8]
        assert file.metadata()["draws"] == str(DRAWS)
    metrics = cat_step(model, teacher_bank=bank)(**step_arguments([0, 1]))
    assert metrics.loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes_train(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = unet_pair(dtype)
    bank = build(model, path=tmp_path / "bank.safetensors", dtype=torch.bfloat16)
    drawn = bank.draw(torch.tensor([0]), generator())
    assert drawn.latents.dtype == drawn.noise.dtype == dtype
    before = lora_parameters(model)
    cat_step(model, teacher_bank=bank)(**step_arguments([0, 1], dtype))
    assert any(not torch.equal(value, before[name]) for name, value in lora_parameters(model).items())


@pytest.mark.parametrize("data_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_loaded_bank_holds_the_same(tmp_path: Path, data_format: Any) -> None:
    model, _ = unet_pair()
    latents = pictures()["latents"].contiguous(memory_format=data_format)
    options = {"latents": latents, "latents_std": latents.abs()}
    built = build(model, path=tmp_path / "bank.safetensors", **options)
    loaded = TeacherBank.load(tmp_path / "bank.safetensors", latents=latents)
    every = torch.arange(PICTURES * DRAWS)
    for one in (loaded, build(model, **options)):
        for ours, theirs in zip(
            one.read(every // DRAWS, every % DRAWS), built.read(every // DRAWS, every % DRAWS), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


def test_odd_sizes_are_read_back(tmp_path: Path) -> None:
    latents, path = torch.randn(1, 3), tmp_path / "bank.safetensors"
    options: dict[str, Any] = {"latents": latents, "cond_no_trigger": torch.ones(1, 5), "draws": 1}
    bank = build(
        unet_pair()[0],
        dtype=torch.bfloat16,
        path=path,
        predict=lambda _model, noisy, _timesteps, _cond: 2 * noisy,
        **options,
    )
    drawn = bank.draw(torch.tensor([0]))
    assert torch.equal(drawn.latents, latents)
    noisy = ddpm().add_noise(latents, drawn.noise, drawn.timesteps)
    assert_close(drawn.base_pred, 2 * noisy, dtype=torch.bfloat16)
    # Three bfloat16 predictions take 6 bytes: the other tensors are aligned all the same, from the file's start on.
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    sizes = {"I64": 8, "F32": 4, "BF16": 2}
    header = json.loads(content[8 : 8 + size])
    starts = [
        (8 + size + entry["data_offsets"][0]) % sizes[entry["dtype"]]
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    assert starts == [0] * len(starts)


def test_later_changes_of_the_latents_do_not_reach_the_bank() -> None:
    latents = pictures()["latents"]
    bank = build(unet_pair()[0], latents=latents)
    latents.zero_()
    assert torch.equal(bank.draw(torch.tensor([1]), generator()).latents, pictures()["latents"][1:2])


def test_a_full_disk_leaves_the_older_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "bank.safetensors"
    build(unet_pair()[0], path=path)
    content = path.read_bytes()
    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        build(unet_pair()[0], path=path, draws=7)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("steps_before", [2, 3], ids=["mid-accumulation", "update-due"])
def test_resumes_bit_for_bit(steps_before: int, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    build(unet_pair()[0], path=path, dtype=torch.bfloat16)

    def fresh(seed: int) -> tuple[torch.nn.Module, cat_rs.CatStep]:
        model, _ = unet_pair()
        bank = TeacherBank.load(path, latents=pictures()["latents"])
        return model, cat_step(model, accumulate=2, generator=generator(seed), teacher_bank=bank)

    model, step = fresh(0)
    for indices in INDICES[:steps_before]:
        step(**step_arguments(indices))
    resumed_model, resumed = fresh(1)
    resumed(**step_arguments([0, 0]))
    resumed.load_state_dict(_through_a_file(step.state_dict()))
    for indices in INDICES[steps_before:]:
        assert torch.equal(resumed(**step_arguments(indices)).loss, step(**step_arguments(indices)).loss)
    expected = lora_parameters(model)
    assert all(torch.equal(param, expected[name]) for name, param in lora_parameters(resumed_model).items())


def _another_weight(base: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        base.conv_out.bias += 1e-3
    return base


OTHER_BASES: dict[str, Any] = {
    "seed": lambda _base: tiny_unet(seed=9),
    "one-bias": _another_weight,
    "dtype": lambda base: base.bfloat16(),
    "size": lambda _base: tiny_unet(block_out_channels=(8, 24)),
}


@pytest.mark.parametrize("other", OTHER_BASES.values(), ids=OTHER_BASES)
def test_a_bank_of_another_base_model_is_refused(other: Any) -> None:
    bank = build(unet_pair()[0])
    model = add_lora(other(unet_pair()[1]))
    with pytest.raises(InvalidValueError, match=r"`teacher_bank` must be of this base model .*, got one of another"):
        cat_step(model, teacher_bank=bank)


def test_another_adapter_on_the_same_base_is_none_of_its_business() -> None:
    model, base = unet_pair()
    bank = build(model)
    other = add_lora(base, r=2, target_modules=["to_q", "conv1"], seed=8)
    cat_step(other, teacher_bank=bank)(**step_arguments([0, 1]))
    # Nor do training and the patches of CatStep make it another model.
    cat_step(other, teacher_bank=bank)


def test_a_bank_of_another_schedule_is_refused() -> None:
    model, _ = unet_pair()
    bank = build(model)
    for scheduler in (ddpm(num_train_timesteps=500), ddpm(rescale_betas_zero_snr=True)):
        with pytest.raises(InvalidValueError, match="`teacher_bank` must be of this scheduler's noise schedule"):
            cat_step(model, scheduler, teacher_bank=bank)
    with pytest.raises(InvalidValueError, match="prediction type 'v_prediction', got one of 'epsilon'"):
        cat_step(model, ddpm(prediction_type="v_prediction"), teacher_bank=bank)
    with pytest.raises(InvalidValueError, match="prediction type 'flow', got one of 'epsilon'"):
        cat_step(model, flow_matching(), teacher_bank=bank)


def test_a_bank_of_other_pictures_is_refused(tmp_path: Path) -> None:
    path, latents = tmp_path / "bank.safetensors", pictures()["latents"]
    build(unet_pair()[0], path=path)
    with pytest.raises(InvalidValueError, match=r"`latents` must be those .* got another picture 0"):
        TeacherBank.load(path, latents=latents.flip(0))
    with pytest.raises(InvalidValueError, match="got another picture 2"):
        TeacherBank.load(path, latents=torch.cat([latents[:2], latents[2:] + 0.1]))
    with pytest.raises(ShapeError, match=r"`latents` must have the bank's shape \[3, 4, 8, 8\], got \[2, 4, 8, 8\]"):
        TeacherBank.load(path, latents=latents[:2])
    # Rounding does not make it another picture.
    TeacherBank.load(path, latents=latents.bfloat16())


def test_files_that_are_no_bank_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TeacherBank.load(tmp_path / "absent", latents=None)
    path = tmp_path / "bank.safetensors"
    path.write_bytes(b"no bank")
    with pytest.raises(InvalidValueError, match=r"`path` must be a file of format .*, got .*bank.safetensors: "):
        TeacherBank.load(path, latents=None)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(InvalidValueError, match=r"`path` must be a file of format .* got .* of format None"):
        TeacherBank.load(path, latents=None)


def test_seeds_that_give_other_noise_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    build(unet_pair()[0], path=path)
    with safe_open(path, "pt") as file:
        facts, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    tensors["seeds"] += 1
    save_file(tensors, path, facts)
    with pytest.raises(InvalidValueError, match="whose seeds give the same noise here"):
        TeacherBank.load(path, latents=None)


def test_predictions_that_overflow_the_dtype_are_refused(tmp_path: Path) -> None:
    def loud(_model: Any, latents: torch.Tensor, _timesteps: Any, _cond: Any) -> torch.Tensor:
        return latents + 1e6

    with pytest.raises(InvalidValueError, match=r"finite numbers that fit torch.float16, got others for pictures 0"):
        build(unet_pair()[0], dtype=torch.float16, predict=loud, path=tmp_path / "bank.safetensors")
    assert not list(tmp_path.iterdir())


BAD_BUILD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "draws": ({"draws": 0}, InvalidValueError, "`draws` must be an integer of at least 1, got 0"),
    "batch_size": ({"batch_size": 0}, InvalidValueError, "`batch_size` must be an integer of at least 1, got 0"),
    "dtype": ({"dtype": torch.int8}, DtypeError, "`dtype` must be bfloat16, float16 or float32, got int8"),
    "latents-dims": ({"latents": torch.ones(3)}, ShapeError, r"`latents` must have shape \[P, ...\] .* got \[3\]"),
    "latents-int": ({"latents": torch.ones(3, 4, 8, 8).long()}, DtypeError, "`latents` must be floating-point"),
    "latents-meta": ({"latents": torch.ones(3, 4, 8, 8, device="meta")}, DeviceError, "`latents` .* on the CPU"),
    "latents_std": ({"latents_std": torch.ones(4, 8, 8)}, ShapeError, r"`latents_std` .* got \[4, 8, 8\]"),
    "cond-batch": (
        {"cond_no_trigger": {"encoder_hidden_states": torch.ones(2, 5, CROSS)}},
        ShapeError,
        r"`cond_no_trigger\['encoder_hidden_states'\]` must have a batch dimension of the 3 .*, got \[2, 5, 16\]",
    ),
    "cond-type": ({"cond_no_trigger": 3}, InvalidValueError, "`cond_no_trigger` must be a tensor .* got int"),
    "predicted-shape": (
        {"predict": lambda _model, latents, _timesteps, _cond: latents[:, :2]},
        ShapeError,
        r"`model` must predict the latents' shape \[5, 4, 8, 8\], got \[5, 2, 8, 8\]",
    ),
}


@pytest.mark.parametrize(("options", "error", "text"), BAD_BUILD.values(), ids=BAD_BUILD)
def test_bad_arguments_of_build_are_named(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build(unet_pair()[0], **options)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"latents": torch.tensor([0, 3])}, InvalidValueError, r"`latents` with a teacher bank .* in 0..2, got 0..3"),
        ({"latents": torch.tensor([-1, 0])}, InvalidValueError, r"in 0..2, got -1..0"),
        ({"latents": torch.ones(2, 4, 8, 8)}, DtypeError, "must be int64 indices, got torch.float32"),
        ({"latents": torch.tensor([[0], [1]])}, ShapeError, r"must have shape \[B\] with B >= 1, got \[2, 1\]"),
        ({"latents": torch.zeros(0, dtype=torch.long)}, ShapeError, r"B >= 1, got \[0\]"),
        ({"noise": torch.ones(2, 4, 8, 8)}, InvalidValueError, "`noise` and `timesteps` must not be given"),
        ({"timesteps": torch.tensor([1, 2])}, InvalidValueError, "`noise` and `timesteps` must not be given"),
        ({"latents": torch.tensor([0, 2])}, InvalidValueError, r"made with, got another at index 1 \(picture 2\)"),
        ({"cond_no_trigger": torch.ones(2, 6, CROSS)}, ShapeError, r"must have shape \[2, 5, 16\] as in the .* bank"),
        (
            {"cond_no_trigger": {"encoder_hidden_states": torch.ones(2, 5, CROSS), "more": torch.ones(2)}},
            InvalidValueError,
            r"must have the teacher bank's tensors \[\"\['encoder_hidden_states'\]\"\], got",
        ),
        ({"mask": torch.ones(2, 1, 8, 7)}, ShapeError, r"`mask` .* got \[2, 1, 8, 7\]"),
    ],
    ids=["high", "negative", "float", "dims", "empty", "noise", "timesteps", "order", "length", "keys", "mask"],
)
def test_bad_arguments_of_a_step_are_named(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    model, _ = unet_pair()
    step = cat_step(model, teacher_bank=build(model))
    before = lora_parameters(model)
    with pytest.raises(error, match=text):
        step(**{**step_arguments([0, 1]), **changes})
    assert all(torch.equal(param, before[name]) for name, param in lora_parameters(model).items())


def test_indices_without_a_bank_are_refused() -> None:
    with pytest.raises(DtypeError, match="got int64; picture indices need a teacher_bank"):
        cat_step(unet_pair()[0])(**step_arguments([0, 1]))


@pytest.mark.parametrize("draws", [[0, 4], [-1, 0]], ids=str)
def test_draws_out_of_range_are_named(draws: list[int]) -> None:
    with pytest.raises(InvalidValueError, match=r"`draws` must be indices in 0..3"):
        build(unet_pair()[0]).read(torch.tensor([0, 1]), torch.tensor(draws))


def test_the_documented_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "teacher-bank.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model, _ = unet_pair()
    before = lora_parameters(model)
    data = pictures()
    names = {
        "unet": model,
        "noise_scheduler": ddpm(),
        "latents": data["latents"],
        "prompt_embeds": data["cond"],
        "prompt_embeds_no_trigger": data["cond_no_trigger"],
        "batches": torch.tensor(INDICES),
    }
    exec(code, names)
    assert (names["bank"].pictures, names["bank"].draws) == (PICTURES, 64)
    assert any(not torch.equal(value, before[name]) for name, value in lora_parameters(model).items())
