"""The example scripts and the notebook run as they are, on the bundled model, and do what their page says."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cat_rs

ROOT = Path(__file__).resolve().parent.parent
PLAIN, CAT_LOSS, CAT_STEP = "train_lora.py", "train_lora_cat_loss.py", "train_lora_cat_step.py"
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"

# Adam's first steps have the size of the learning rate even where the gradient is mostly rounding.
SAME = 1e-2

Adapter = dict[str, torch.Tensor]


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs an example script with a few options and returns the folder that it wrote."""
    from accelerate.state import AcceleratorState, GradientState

    def run(script: str, *options: str, steps: int = 2) -> Path:
        output = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        arguments = ["--data", "examples/emoji_model/concepts/pineapple", "--output_dir", str(output), "--rank", "4"]
        if script != PLAIN:
            arguments += ["--trigger_word", "sks", "--class_word", "fruit"]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--max_train_steps", str(steps), *options])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        return output

    return run


@pytest.fixture(scope="module")
def example_diffs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_diffs", ROOT / "scripts" / "example_diffs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / "examples/emoji_model/model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def adapter_of(folder: Path) -> Adapter:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def difference(first: Adapter, second: Adapter) -> float:
    """The norm of the difference, relative to lora_B, which begins at zero."""
    assert first.keys() == second.keys()
    changed = torch.stack([(first[name] - second[name]).norm() for name in first])
    trained = torch.stack([tensor.norm() for name, tensor in first.items() if "lora.up" in name])
    return (changed.norm() / trained.norm()).item()


@pytest.mark.parametrize("script", [PLAIN, CAT_LOSS, CAT_STEP])
def test_script_writes_an_adapter_that_changes_the_model(run_example: Any, pipeline: Any, script: str) -> None:
    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipeline("a sks fruit", 64, 64, 2, output_type="np", generator=generator).images)

    before = draw()
    pipeline.load_lora_weights(run_example(script), weight_name="pytorch_lora_weights.safetensors")
    try:
        assert (draw() - before).abs().max() > 1e-5
    finally:
        pipeline.unload_lora_weights()
    assert torch.equal(draw(), before)


def test_loss_and_step_train_the_same_adapter(run_example: Any) -> None:
    options = ["--gradient_accumulation_steps", "3", "--lr_scheduler", "linear", "--learning_rate", "1e-3"]
    loss, step = (adapter_of(run_example(script, *options, steps=4)) for script in (CAT_LOSS, CAT_STEP))
    assert difference(loss, step) < SAME


@pytest.mark.parametrize("script", [CAT_LOSS, CAT_STEP])
def test_factor_0_is_the_plain_script(run_example: Any, script: str) -> None:
    options = ["--learning_rate", "1e-3"]
    plain, without, with_cat = (
        adapter_of(run_example(script, *options, *more, steps=8))
        for script, more in ((PLAIN, []), (script, ["--cat_factor", "0"]), (script, []))
    )
    assert difference(plain, without) < SAME
    assert difference(plain, with_cat) > 5 * SAME


def test_cat_stays_nearer_to_the_base_model(run_example: Any, pipeline: Any) -> None:
    latents, timesteps = torch.randn(4, 4, 8, 8), torch.tensor([200, 400, 600, 800])
    prompt = pipeline.encode_prompt("a fruit on a red background", torch.device("cpu"), 4, False)[0]

    @torch.no_grad()
    def predict() -> torch.Tensor:
        return pipeline.unet(latents, timesteps, prompt).sample

    def drift(script: str, *options: str) -> float:
        folder = run_example(script, "--learning_rate", "1e-3", *options, steps=25)
        pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
        try:
            return (predict() - base).square().mean().item()
        finally:
            pipeline.unload_lora_weights()

    base = predict()
    assert drift(CAT_LOSS, "--cat_factor", "10") < 0.5 * drift(PLAIN)


def test_page_shows_the_differences(example_diffs: ModuleType) -> None:
    page = example_diffs.PAGE.read_text(encoding="utf-8")
    assert example_diffs.with_differences(page) == page, "run scripts/example_diffs.py"
    stated = re.findall(r"(?m)^## .*: (\d+) lines added, (\d+) removed$", page)
    assert [tuple(map(int, pair)) for pair in stated] == [
        example_diffs.line_counts(script) for script in (CAT_LOSS, CAT_STEP)
    ]


@pytest.mark.parametrize(("script", "limit"), [(CAT_LOSS, 10), (CAT_STEP, 15)])
def test_few_lines_change(example_diffs: ModuleType, script: str, limit: int) -> None:
    assert max(example_diffs.line_counts(script)) <= limit


def check_outputs(path: Path) -> None:
    """Every code cell ran in order, without an error; the pictures, the curves and the scores are there."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    for picture in pictures:
        assert min(Image.open(io.BytesIO(base64.b64decode(picture))).size) >= 64
    shown = "".join("".join(output.get("text", "")) for output in outputs)
    for score in ("UPS", "TPS", "KPS", "identity"):
        assert re.search(rf"(?m)^ {score}\b.* \d\.\d{{3}} \[\d\.\d{{3}}, \d\.\d{{3}}\]", shown), score


def test_notebook_runs(tmp_path: Path) -> None:
    copy = tmp_path / "executed.ipynb"
    package = str(Path(cat_rs.__file__).parent.parent)
    environment = {"PYTHONPATH": package, "QUICKSTART_STEPS": "2", "QUICKSTART_PROMPTS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "notebook.py"), "--output", str(copy)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_outputs(copy)


def test_notebook_is_committed_with_its_outputs() -> None:
    check_outputs(NOTEBOOK)
    assert NOTEBOOK.stat().st_size < 600_000
    assert not re.search(r"/(?:tmp|home|work|root)/", NOTEBOOK.read_text(encoding="utf-8"))
