"""benchmarks.gpu on the CPU: every section runs, what it computes is checked, and what it writes is whole."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import harness, models
from benchmarks.gpu import __main__ as script
from benchmarks.gpu import kernels, layers, meter, results, steps
from benchmarks.harness import OURS, Contender

from tests.cuda.simulation import SimulatedGraphs


class CpuMeter:
    """The CPU in the place of a GPU."""

    device = torch.device("cpu")
    cache = 1000
    memory = 2**40
    low_precision = torch.bfloat16

    def __init__(self) -> None:
        self.resets = 0

    def seconds(self, run: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def reset_peak(self) -> None:
        self.resets += 1

    def peak(self) -> meter.Peak:
        return meter.Peak(3 * 2**30, 4 * 2**30)

    def describe(self) -> dict[str, str]:
        return {"GPU": "none"}


@pytest.fixture(autouse=True)
def _fast(simulated_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(meter, "MOST_SETS", 2)
    monkeypatch.setattr(SimulatedGraphs, "made", 0)
    yield
    torch._dynamo.reset()


def run(tmp_path: Path, *arguments: str, smoke: bool = True) -> tuple[int, dict[str, Any]]:
    argv = ["--output", str(tmp_path), "--repeats", "2", *arguments]
    status = script.run(script.parser().parse_args(argv), argv, CpuMeter(), smoke=smoke)  # type: ignore[arg-type]
    file = tmp_path / results.FILE
    return status, json.loads(file.read_text()) if file.exists() else {}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(["--quick"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cat_loss", "adamw", "noising", "similarity"])
def test_kernels_run_and_are_checked(name: str, tmp_path: Path) -> None:
    status, content = run(tmp_path, "--only", name)
    assert status == 0
    section = content["sections"][name]
    assert {row["provider"] for row in section["rows"]} >= {OURS, "copy"}
    assert {row["metric"] for row in section["rows"]} == {"time", "bandwidth"}
    assert any("share of the copy" in ratio["what"] for ratio in section["ratios"])
    assert all(ratio["met"] is None and math.isfinite(ratio["value"]) for ratio in section["ratios"])
    assert section["command"].startswith("python -m benchmarks.gpu --output")


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "compiled"])
def test_layers_run_and_are_checked(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "linear_shapes", lambda config: dict(list(LINEAR(config).items())[:2]))
    status, content = run(tmp_path, "--only", "lora_linear", *(["--quick"] if quick else []))
    assert status == 0
    section = content["sections"]["lora_linear"]
    assert {row["provider"] for row in section["rows"]} == {"peft", OURS} | (set() if quick else {layers.COMPILED})
    assert sum("worst shape" in ratio["what"] for ratio in section["ratios"]) == 2


LINEAR = models.linear_shapes


def test_shapes_of_both_models_are_found() -> None:
    shapes = models.linear_shapes(models.TINY_SDXL)
    assert sum(shapes.values()) > 0
    assert any(shape.tokens == models.TOKENS for shape in shapes)


@pytest.mark.parametrize("name", ["step_sd15", "step_sdxl"])
def test_steps_run_and_are_checked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = name == "step_sdxl"
    # Each trace of torch.compile takes its time: there is one of each contender.
    monkeypatch.setattr(steps, "TURNS", 2 if quick else 1)
    monkeypatch.setattr(steps, "SD15", dataclasses.replace(steps.SD15, batches=(2,)))
    status, content = run(tmp_path, "--only", name, *(["--quick"] if quick else []))
    assert status == 0
    section = content["sections"][name]
    providers = {steps.PLAIN, steps.RECIPE, steps.OURS_EAGER, steps.OURS_CAPTURED, steps.FLOOR}
    providers |= set() if quick else set(steps.COMPILING)
    assert {row["provider"] for row in section["rows"]} == providers
    assert not [note for note in section["notes"] if "did not run" in note]
    batches = {row["shape"].split(", ")[1] for row in section["rows"]}
    assert batches == {"batch 1" if quick else "batch 2"}
    whats = " ".join(ratio["what"] for ratio in section["ratios"])
    assert "captured / floor" in whats
    assert "peak memory" in whats
    # The check, and for each batch size and turn the captured step and the floor.
    assert SimulatedGraphs.made == 1 + 2 * steps.TURNS * len(batches)


def test_a_step_that_cannot_be_recorded_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: Any, function: Callable[[], Any]) -> Any:
        raise steps.cuda_graphs.NotCapturable("no")

    monkeypatch.setattr(steps, "check", lambda bench: None)
    monkeypatch.setattr(SimulatedGraphs, "record", record)
    status, content = run(tmp_path, "--only", "step_sd15", "--quick")
    assert status == 0
    section = content["sections"]["step_sd15"]
    assert {row["provider"] for row in section["rows"]} == {steps.PLAIN, steps.RECIPE, steps.OURS_EAGER}
    assert sum("did not run" in note for note in section["notes"]) == 2


def test_a_wrong_step_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = steps.OurStep.__call__
    monkeypatch.setattr(steps.OurStep, "__call__", lambda self, given, drawn=True: 2 * call(self, given, drawn=drawn))
    assert run(tmp_path, "--only", "step_sd15", "--quick") == (1, {})
    assert "the first loss of 'CAT, cat_rs' is" in capsys.readouterr().err


def _report(name: str, provider: str) -> dict[str, Any]:
    report = harness.Report(name, name, 3, "python -m benchmarks.gpu", False)
    report.add_times(harness.Case("mode", "float32", "(1,)"), {provider: [1e-3, 2e-3, 3e-3]})
    report.add_ratio("a / b", [4.0], [2.0], ">= 3")
    report.note("said")
    return report.content()


def test_sections_of_the_same_machine_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.kept(tmp_path, {"GPU": "a"}) == {}
    results.write(tmp_path, {"GPU": "a"}, {"adamw": _report("adamw", OURS)})
    assert list(results.kept(tmp_path, {"GPU": "a"})) == ["adamw"]
    assert results.kept(tmp_path, {"GPU": "b"}) == {}
    assert "its figures are not kept" in capsys.readouterr().out


def test_the_table_has_every_section() -> None:
    table = results.table({"GPU": "a"}, {"adamw": _report("adamw", OURS), "noising": _report("noising", "diffusers")})
    assert "| adamw | a / b | 2.00 (2.00 to 2.00) | >= 3 | **no** |" in table
    assert "| noising | diffusers | mode | float32 | (1,) | time | 2.00 ms (1.40 to 2.60) |" in table
    assert "- noising: said" in table
    assert "| GPU | a |" in table


def test_a_later_run_replaces_its_own_sections_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "describe_machine", lambda: {"torch": "x"})
    calls = []

    def section(bench: meter.Bench) -> None:
        calls.append(bench.report.name)
        bench.report.add_times(harness.Case("mode", "float32", "(1,)"), {OURS: [1e-3]})
        if bench.report.name == "noising" and len(calls) > 2:
            raise harness.BenchmarkError("wrong")

    monkeypatch.setattr(script, "SECTIONS", {"noising": section, "adamw": section})
    assert run(tmp_path, "--only", "adamw")[0] == 0
    assert list(run(tmp_path, "--only", "noising")[1]["sections"]) == ["noising", "adamw"]
    status, content = run(tmp_path)
    assert calls == ["adamw", "noising", "noising", "adamw"]
    assert status == 1
    assert list(content["sections"]) == ["noising", "adamw"]


def test_a_missed_bar_is_a_status_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        script, "SECTIONS", {"adamw": lambda bench: bench.report.add_value("a", 1.0, 1.0, 1.0, ">= 2")}
    )
    assert run(tmp_path, smoke=False)[0] == 0
    assert run(tmp_path, "--check", smoke=False)[0] == 1


@pytest.mark.parametrize("option", [["--repeats", "0"], ["--only", "nothing"]], ids=["repeats", "only"])
def test_bad_options_are_refused(option: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, *option)


def test_bytes_that_must_move() -> None:
    assert kernels.loss_bytes(10, 2) == 120
    assert kernels.adamw_bytes(10) == 360
    assert kernels.noising_bytes(10, 2, 2, writes_target=False) == 80
    assert kernels.noising_bytes(10, 2, 2, writes_target=True) == 100


def test_inputs_take_turns_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "MOST_SETS", 64)
    assert meter.rotations(10**9, 10**6) == 1
    assert meter.rotations(10**6, 10**6) == 3
    assert meter.rotations(1, 10**6) == 64
    seen: list[str] = []
    call = meter.rotating(seen.append, ["a", "b"])
    for _ in range(3):
        call()
    assert seen == ["a", "b", "a"]


def test_every_set_of_adamw_has_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: list[bool] = []
    step = torch.optim.AdamW.step

    def noting(optimizer: Any, *arguments: Any) -> Any:
        stepped.extend(param.grad is not None for group in optimizer.param_groups for param in group["params"])
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    assert run(tmp_path, "--only", "adamw")[0] == 0
    assert stepped
    assert all(stepped)


def test_noising_is_checked_against_the_float64_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rates from a table in bfloat16, as diffusers has them: more than rounding away from the true ones.
    rates = kernels.NoiseSchedule.rates

    def rounded(schedule: Any, timesteps: torch.Tensor, batch: int) -> Any:
        return tuple(rate.bfloat16().float() * 1.02 for rate in rates(schedule, timesteps, batch))

    monkeypatch.setattr(kernels.NoiseSchedule, "rates", rounded)
    assert run(tmp_path, "--only", "noising")[0] == 1


def test_a_small_card_gets_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuMeter, "memory", 1000)
    status, content = run(tmp_path, "--only", "cat_loss", "adamw", "noising", "similarity", "step_sdxl")
    assert status == 0
    for name, section in content["sections"].items():
        assert not section["rows"], name
        assert any("was left out: needs" in note for note in section["notes"]), name


def test_a_quick_run_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "QUICK_SECONDS", 0)
    status, content = run(tmp_path, "--quick")
    assert status == 0
    notes = [note for section in content["sections"].values() for note in section["notes"]]
    assert notes == [f"{name} was left out: the time of a quick run is over." for name in script.SECTIONS]
    monkeypatch.setattr(script, "QUICK_SECONDS", 1000)
    begun: list[str] = []
    monkeypatch.setattr(script, "SECTIONS", {"adamw": lambda bench: begun.append(bench.report.name)})
    run(tmp_path, "--quick")
    assert begun == ["adamw"]


def test_rounds_end_in_time_and_samples_are_of_several_steps() -> None:
    calls: list[int] = []
    contender = Contender("a", lambda: calls.append(0))
    most: Any = {"most_seconds": -1.0, "least_calls": 5, "sample_seconds": 0}
    samples = meter.measure(CpuMeter(), [contender], 9, warm_up=1, **most)  # type: ignore[arg-type]
    assert len(samples["a"]) == 1
    assert len(calls) == 1 + 5


def test_tf32_is_off_and_on_again() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with meter.without_tf32():
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    contenders = [Contender(name, lambda name=name: calls.append(name)) for name in "ab"]
    samples = meter.measure(CpuMeter(), contenders, 2, warm_up=3, sample_seconds=0)  # type: ignore[arg-type]
    assert calls == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 2
    assert {name: len(times) for name, times in samples.items()} == {"a": 2, "b": 2}


def test_large_models_have_their_public_sizes() -> None:
    counts = {}
    for name, config in {"sd15": models.SD15, "sdxl": models.SDXL}.items():
        counts[name] = sum(param.numel() for param in models.unet(config, "meta").parameters())
    assert counts == {"sd15": 859_520_964, "sdxl": 2_567_463_684}
