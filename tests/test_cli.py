"""The command line, run as a person runs it."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cat_rs.cli import main
from cat_rs.commands.evaluate import Settings as EvaluateSettings
from cat_rs.evaluation import Interval
from cat_rs.training import TrainConfig

TRAIN = ["--trigger", "sks", "--class-word", "cat", "--rank", "2", "--steps", "4", "--batch-size", "2"]
TRAIN += ["--preserve", "captions"]


@pytest.fixture
def train_arguments(tiny_pipeline_dir: Path, concept_dir: Path, tmp_path: Path) -> list[str]:
    """A short training of the tiny model, as command-line words."""
    places = ["--model", str(tiny_pipeline_dir), "--data", str(concept_dir), "--output-dir", str(tmp_path / "adapter")]
    return ["train", *places, *TRAIN, "--lr", "1e-2", "--checkpoint-every", "2", "--no-tensorboard"]


@pytest.fixture
def emoji_model(
    tiny_pipeline_dir: Path, tiny_clip_dir: Path, concept_dir: Path, few_general_prompts: None, tmp_path: Path
) -> Path:
    """A folder laid out as the bundled emoji model, with the tiny models in it."""
    folder = tmp_path / "emoji"
    shutil.copytree(tiny_pipeline_dir, folder / "model")
    shutil.copytree(tiny_clip_dir, folder / "clip")
    shutil.copytree(concept_dir, folder / "concepts" / "tabby")
    concept = {
        "name": "tabby",
        "class_word": "cat",
        "folder": "concepts/tabby",
        "trigger_prompts": ["a sks cat on a red background", "a sks cat on a blue background"],
        "class_prompts": ["a cat on a red background"],
        "neighbour_prompts": ["a lion on a red background"],
        "other_class_prompts": ["a car on a red background"],
    }
    (folder / "prompts.json").write_text(json.dumps({"trigger_word": "sks", "concepts": [concept]}))
    return folder


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "train",
            ["contrastive adapter training:", "--cat-factor X", "L = L_diff + cat_factor * L_cat", "checkpoints:"],
        ),
        ("evaluate", ["model and adapters:", "sampling:", "UPS, TPS and KPS"]),
        ("generate", ["--prompt TEXT", "sampling:"]),
        ("demo", ["--concepts NAME", "--seeds N"]),
        (
            "convert",
            ["convert INPUT OUTPUT [--config FILE]", "--to {diffusers,peft,kohya}", "--family {sd,sdxl,flux}"],
        ),
        ("report", ["report RUN... [--config FILE]", "--output DIR", "--title TEXT"]),
        ("info", ["--debug"]),
    ],
)
def test_help_groups_the_options(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(word in shown for word in words)


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["train", "--stepz", "3"], ["train", "--steps", "many"]], ids=" ".join
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_train_writes_the_adapter(
    train_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_arguments) == 0
    shown = capsys.readouterr()
    assert "3 pictures; trigger removed from 3 of 3 captions" in shown.out
    assert "adapter: " in shown.out
    assert all(part in shown.err for part in ("loss=", "diffusion=", "cat="))
    assert load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")


def test_command_line_wins_over_the_file(train_arguments: list[str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("steps: 1000\nrank: 4\ncheckpoint-every: 0\n")
    assert main([*train_arguments, "--config", str(config), "--steps", "1"]) == 0
    used = TrainConfig.load(tmp_path / "adapter" / "train_config.yaml")
    assert (used.steps, used.rank, used.checkpoint_every) == (1, 2, 2)


def test_file_alone_is_enough(train_arguments: list[str], tmp_path: Path) -> None:
    assert main([*train_arguments, "--steps", "1"]) == 0
    config = tmp_path / "adapter" / "train_config.yaml"
    assert main(["train", "--config", str(config), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--trigger", "zwx"], "cat-rs: trigger: expected 'zwx' in the captions"),
        (["--model", "/absent"], "cat-rs: model: expected a diffusers model, cannot load /absent"),
        (["--config", "/absent.yaml"], "cat-rs: /absent.yaml: cannot read the config file"),
        (["--cat-factor", "-1"], "cat-rs: cat_factor: expected a number >= 0, got -1.0"),
    ],
)
def test_error_is_one_line(
    train_arguments: list[str], extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train_arguments, *extra]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cat-rs:")]
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_missing_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "cat-rs: cat-rs train: missing --model, --data\n"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_interrupt_exits_with_130_and_resumes(train_arguments: list[str], tmp_path: Path) -> None:
    script = """
import signal, sys
from cat_rs.cli import main
from cat_rs.commands.evaluate import Settings as EvaluateSettings
from cat_rs.training.trainer import Trainer

advance = Trainer.advance

def advance_and_interrupt(run):
    figures = advance(run)
    if run.steps_done == 3:
        signal.raise_signal(signal.SIGINT)
    return figures

Trainer.advance = advance_and_interrupt
sys.exit(main(sys.argv[1:]))
"""
    stopped = subprocess.run(
        [sys.executable, "-c", script, *train_arguments], capture_output=True, text=True, check=False
    )
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped after step 3; continue with --resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (tmp_path / "adapter" / "checkpoints" / "step-000003").is_dir()
    assert main([*train_arguments, "--resume"]) == 0


def test_generate_draws_each_prompt_and_seed(
    train_arguments: list[str], tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    main([*train_arguments, "--steps", "1"])
    arguments = ["--model", str(tiny_pipeline_dir), "--adapter", str(tmp_path / "adapter"), "--inference-steps", "1"]
    prompts = ["--prompt", "a sks cat", "a cat", "--picture-seeds", "0", "1", "2"]
    assert main(["generate", *arguments, *prompts, "--output-dir", str(tmp_path / "drawn")]) == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 6


@pytest.fixture
def evaluate_arguments(
    train_arguments: list[str], tiny_pipeline_dir: Path, tiny_clip_dir: Path, concept_dir: Path, tmp_path: Path
) -> list[str]:
    """A short evaluation of a trained adapter, as command-line words."""
    main(train_arguments)
    (tmp_path / "prompts.txt").write_text("a sks cat\na sks cat outdoors\n")
    arguments = ["--model", str(tiny_pipeline_dir), "--encoder", str(tiny_clip_dir), "--data", str(concept_dir)]
    sampling = ["--trigger", "sks", "--inference-steps", "1", "--picture-batch", "2"]
    places = ["--prompts", str(tmp_path / "prompts.txt"), "--output-dir", str(tmp_path / "evaluation")]
    return ["evaluate", *arguments, *sampling, *places, "--adapters", f"mine={tmp_path / 'adapter'}"]


def test_evaluate_writes_results_and_sheet(evaluate_arguments: list[str], tmp_path: Path) -> None:
    assert main(evaluate_arguments) == 0
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert 0 < results["adapters"]["mine"]["kps"]["value"] < 1
    assert results["comparisons"] == []
    assert (tmp_path / "evaluation" / "contact_sheet.png").stat().st_size > 0
    for kind in ("pictures", "embeddings"):
        # Two models, with the trigger and without, two batches each.
        assert len(list((tmp_path / "evaluation" / "cache" / kind).iterdir())) == 8
    drawn = tmp_path / "evaluation" / "pictures"
    assert sorted(path.name for path in drawn.iterdir()) == ["base", "concept", "mine"]
    assert len(list((drawn / "mine" / "trigger").glob("*.png"))) == 4
    runs = [str(tmp_path / "adapter"), str(tmp_path / "evaluation")]
    assert main(["report", *runs, "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    # Three pictures of the concept; two prompts with the trigger and two without, by two seeds and two models.
    assert page.count("<img src=") == 3 + 4 * 2 * 2


def test_evaluate_compares_several_adapters(
    evaluate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "shared"
    earlier = tmp_path / "adapter" / "checkpoints" / "step-000002"
    assert main([*evaluate_arguments, f"earlier={earlier}", "--cache", str(cache)]) == 0
    assert "earlier minus mine" in capsys.readouterr().out
    comparison = json.loads((tmp_path / "evaluation" / "results.json").read_text())["comparisons"][0]
    assert (comparison["a"], comparison["b"]) == ("mine", "earlier")
    assert comparison["ups"]["low"] <= comparison["ups"]["value"] <= comparison["ups"]["high"]
    assert len(list((cache / "pictures").iterdir())) == 12
    assert not (tmp_path / "evaluation" / "cache").exists()


KILL_AT_A_WRITE = """
import os, signal, sys
from cat_rs.cli import main
from cat_rs.commands.evaluate import Settings as EvaluateSettings

last, fsync = int(sys.argv[1]), os.fsync

def fsync_and_kill(handle):
    global last
    if last == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    last -= 1
    fsync(handle)

os.fsync = fsync_and_kill
sys.exit(main(sys.argv[2:]))
"""


def test_killed_evaluation_goes_on_where_it_was(evaluate_arguments: list[str], tmp_path: Path) -> None:
    def outcome(folder: Path) -> tuple[bytes, bytes]:
        return (folder / "results.json").read_bytes(), (folder / "contact_sheet.png").read_bytes()

    assert main([*evaluate_arguments, "--output-dir", str(tmp_path / "whole")]) == 0
    # One thread, as in this process: sums may be rounded in another order by several.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # The fifth write is of pictures; of those left after four, the seventh is of embeddings.
    for writes, pictures, embeddings in ((4, 4, 0), (6, 8, 2)):
        killed = subprocess.run(
            # Each write syncs the file, then its folder.
            [sys.executable, "-c", KILL_AT_A_WRITE, str(2 * writes), *evaluate_arguments],
            env=environment,
            capture_output=True,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        kept = [list((tmp_path / "evaluation" / "cache" / kind).glob("*")) for kind in ("pictures", "embeddings")]
        assert [sum(not file.name.startswith(".") for file in files) for files in kept] == [pictures, embeddings]
        assert any(file.name.startswith(".unfinished-") for files in kept for file in files)
    assert main(evaluate_arguments) == 0
    assert outcome(tmp_path / "evaluation") == outcome(tmp_path / "whole")


def test_evaluate_needs_different_names(tiny_pipeline_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "m", "--data", "d", "--prompts", __file__, "--trigger", "expected"]
    assert main(["evaluate", *arguments, "--adapters", "a/x", "b/x"]) == 2
    assert "adapters: expected different names, got a/x b/x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "name", "path"),
    [
        ("mine=runs/a.safetensors", "mine", "runs/a.safetensors"),
        ("mine=runs/lr=1e-4", "mine", "runs/lr=1e-4"),
        ("runs/lr=1e-4/a.safetensors", "a", "runs/lr=1e-4/a.safetensors"),
        ("/runs/lr=1e-4", "lr=1e-4", "/runs/lr=1e-4"),
        ("./lr=1e-4", "lr=1e-4", "./lr=1e-4"),
        ("here=there", "here=there", "here=there"),
        ("lr=1e-4", "lr", "1e-4"),
        ("a.safetensors", "a", "a.safetensors"),
        ("mine=", "mine=", "mine="),
    ],
)
def test_a_path_may_hold_an_equals_sign(
    given: str, name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here=there").mkdir()
    settings = EvaluateSettings(model="model", adapters=(given,), data="data", prompts="prompts")
    assert settings.named_adapters() == {name: path}


def test_paths_that_are_not_utf_8_are_written_and_printed(
    train_arguments: list[str], tiny_clip_dir: Path, concept_dir: Path, tmp_path: Path
) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    try:
        shutil.copytree(concept_dir, odd)
    except OSError:
        pytest.skip("the file system takes only UTF-8")
    (tmp_path / "prompts.txt").write_text("a sks cat\n")
    output = f"{odd}-out"
    program = [sys.executable, "-m", "cat_rs.cli"]
    words = [*train_arguments, "--data", odd, "--output-dir", output]
    done = subprocess.run([*program, *words], capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert b"caf\\udce9-out" in done.stdout
    resumed = subprocess.run([*program, *words, "--resume"], capture_output=True, timeout=300, check=False)
    assert resumed.returncode == 0, resumed.stderr
    model = words[words.index("--model") + 1]
    evaluation = ["--model", model, "--adapters", f"{output}/", "--data", odd, "--encoder", str(tiny_clip_dir)]
    evaluation += ["--prompts", str(tmp_path / "prompts.txt"), "--trigger", "sks", "--class-word", "cat"]
    evaluation += ["--picture-seeds", "0", "--inference-steps", "2", "--output-dir", f"{odd}-scores"]
    scored = subprocess.run([*program, "evaluate", *evaluation], capture_output=True, timeout=300, check=False)
    assert scored.returncode == 0, scored.stderr
    reported = subprocess.run(
        [*program, "report", f"{odd}-scores", output, "--output", f"{odd}-report"],
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert reported.returncode == 0, reported.stderr


SHORT_DEMO = ["--steps", "2", "--rank", "2", "--lr", "1e-2", "--inference-steps", "1"]


def test_demo_preserves_what_train_preserves(emoji_model: Path, tmp_path: Path) -> None:
    arguments = ["--emoji-model", str(emoji_model), "--output-dir", str(tmp_path / "demo")]
    recorded = {}
    for given in ("", "blank"):
        assert main(["demo", *arguments, *SHORT_DEMO, *(["--preserve", given] if given else [])]) == 0
        training = json.loads((tmp_path / "demo" / "results.json").read_text())["training"]
        recorded[given] = [training[name] for name in ("preserve", "preserve_every", "teacher_draws")]
    assert recorded == {"": ["set", 4, 8], "blank": ["blank", 1, 0]}


def test_demo_compares_both_adapters(emoji_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--emoji-model", str(emoji_model), "--output-dir", str(tmp_path / "demo"), "--seeds", "0", "1"]
    assert main(["demo", *arguments, *SHORT_DEMO]) == 0
    shown = capsys.readouterr().out
    assert "mean over 2 runs" in shown
    # Of the two adapters of each run, CAT alone.
    assert shown.count("pictures that the base model draws are preserved") == 2
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [(run["concept"], run["seed"]) for run in results["runs"]] == [("tabby", 0), ("tabby", 1)]
    assert set(results["runs"][0]["evaluation"]["adapters"]) == {"LoRA", "CAT"}
    difference = results["summary"]["ups"]["difference"]
    assert difference["low"] <= difference["value"] <= difference["high"]
    for name in ("contact_sheet.png", "curves.png"):
        assert (tmp_path / "demo" / name).stat().st_size > 0


def test_report_on_a_demo(emoji_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--emoji-model", str(emoji_model), "--output-dir", str(tmp_path / "demo")]
    # The first steps have no preservation term.
    assert main(["demo", *arguments, *SHORT_DEMO, "--steps", "8"]) == 0
    config = tmp_path / "report.yaml"
    config.write_text(f"runs: {tmp_path / 'demo'}\noutput: {tmp_path / 'report'}\ntitle: Two tabbies\n")
    assert main(["report", "--config", str(config)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'report' / 'report.html'}"
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["title"] == "Two tabbies"
    (run,) = content["runs"]
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert run["evaluations"][0]["evaluation"] == results["runs"][0]["evaluation"]
    assert {curve["key"] for curve in content["curves"]} == {"diffusion", "cat", "grad_norm", "cat_factor"}
    assert (tmp_path / "report" / "report.png").stat().st_size > 0


def test_report_on_a_training_with_evaluations(
    train_arguments: list[str], tiny_clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny model's pictures are noise: any identity counts as beyond the base model's.
    below = Interval(-1.0, -1.0, -1.0)
    monkeypatch.setattr("cat_rs.training.evaluation.base_identity", lambda _result: below)
    (tmp_path / "prompts.txt").write_text("a sks cat\na sks cat outdoors\n")
    judged = ["--evaluate-prompts", str(tmp_path / "prompts.txt"), "--evaluate-encoder", str(tiny_clip_dir)]
    assert main([*train_arguments, "--evaluate-every", "2", *judged, "--evaluate-inference-steps", "1"]) == 0
    assert main(["report", str(tmp_path / "adapter"), "--output", str(tmp_path / "report")]) == 0
    (front,) = json.loads((tmp_path / "report" / "report.json").read_text())["fronts"]
    written = json.loads((tmp_path / "adapter" / "evaluations" / "front.json").read_text())
    points = [(point["step"], point["best"], point["identity"], point["ups"]) for point in front["points"]]
    assert [step for step, *_ in points] == [2, 4]
    assert points == [
        (row["step"], row["best"], row["scores"]["identity"], row["scores"]["ups"]) for row in written["checkpoints"]
    ]
    assert written["rule"] in html.unescape((tmp_path / "report" / "report.html").read_text())


def test_report_names_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--output", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err == "cat-rs: cat-rs report: missing RUN\n"
    assert main(["report", str(tmp_path / "absent"), "--output", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err.startswith(f"cat-rs: runs: {tmp_path / 'absent'} cannot be read")
    assert not (tmp_path / "report").exists()


def test_demo_names_unknown_concepts(emoji_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--emoji-model", str(emoji_model), "--concepts", "yeti"]) == 2
    assert capsys.readouterr().err == "cat-rs: concepts: expected names out of tabby; got yeti\n"
    assert main(["demo", "--emoji-model", "/absent"]) == 2
    assert "emoji_model: expected the emoji model's folder, got /absent" in capsys.readouterr().err


def test_info_lists_versions_and_operations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("PyTorch", "instruction set used", "operation cat_loss", "diffusers"))


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--learning_rate", "--lr"),
        ("--output_dir=x", "--output-dir"),
        ("--pretrained_model_name_or_path", "--model"),
        ("--network-dim", "--rank"),
        ("--acumulate", "--accumulate"),
    ],
)
def test_other_trainers_options_and_slips_are_understood(
    option: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", option, "1"])
    assert stopped.value.code == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err
