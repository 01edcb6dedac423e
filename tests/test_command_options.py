"""Every option of the commands beside `train` changes what it should."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cat_rs
from cat_rs.adapter_check import CheckResult, WeightReport
from cat_rs.commands import check, convert, demo, evaluate, generate, merge, preserve, report
from cat_rs.text_files import general_prompts
from cat_rs.training import Rewind
from tests.conftest import draw_picture
from tests.option_cases import Case, Seen, check_case, check_table

pytest.importorskip("diffusers")

SAMPLING = {
    "picture_seeds": Case((3,), {"sampling.seeds": (3,)}),
    "inference_steps": Case(5, {"sampling.num_inference_steps": 5}),
    "guidance_scale": Case(1.5, {"sampling.guidance_scale": 1.5}),
    "height": Case(32, {"sampling.height": 32}),
    "width": Case(48, {"sampling.width": 48}),
    "picture_batch": Case(3, {"sampling.batch_size": 3}),
    "device": Case("meta", {"error": "device: expected a device of this machine, got 'meta'"}),
    "dtype": Case("bfloat16", {"loaded.dtype": torch.bfloat16}),
}

GENERATE: dict[str, Case] = {
    **SAMPLING,
    "model": Case("other model", {"loaded": "other model"}),
    "prompt": Case(("a dog", "a cat"), {"prompts": ("a dog", "a cat")}),
    "adapter": Case("adapter", {"adapter": "adapter"}),
    "output_dir": Case("elsewhere", {"folder": "elsewhere"}),
    "overwrite": Case(True, {"folder": "<earlier>"}, {"output_dir": "<earlier>"}),
}

EVALUATE: dict[str, Case] = {
    **SAMPLING,
    "model": Case("other model", {"loaded": "other model"}),
    "adapters": Case(("mine=a", "theirs=b"), {"adapters": {"mine": "a", "theirs": "b"}}),
    "data": Case("other data", {"concept_images": "other data"}),
    "encoder": Case("other encoder", {"encoder": "other encoder"}),
    "output_dir": Case(
        "<elsewhere>",
        {
            "cache": "<elsewhere>/cache",
            "pictures": "<elsewhere>/pictures",
            "results": "<elsewhere>/results.json",
            "sheet": "<elsewhere>/contact_sheet.png",
        },
    ),
    "cache": Case("kept", {"cache": "kept"}),
    "overwrite": Case(True, {"results": "<earlier>/results.json"}, {"output_dir": "<earlier>"}),
    "prompts": Case("<more>", {"prompts.trigger": ("a sks cat outdoors",)}),
    "trigger": Case(("a",), {"prompts.trigger_words": ("a",)}),
    "class_word": Case("dog", {"prompts.class_word": "dog"}, {"prompts": "<plain>"}),
    "concept": Case("pug", {"prompts.trigger": ("a sks dog",)}, {"prompts": "<concepts>"}),
}

DEMO: dict[str, Case] = {
    **SAMPLING,
    "emoji_model": Case("<other>", {"concepts": ["pug"], "loaded": "<other>/model", "encoder": "<other>/clip"}),
    "concepts": Case(("tom", "tabby"), {"concepts": ["tom", "tabby"]}),
    "seeds": Case((4, 5), {"train.seed": [4, 4, 5, 5]}),
    "output_dir": Case("<elsewhere>", {"results": "<elsewhere>/results.json"}),
    "steps": Case(3, {"train.steps": [3, 3], "results.steps": 3}),
    "batch_size": Case(3, {"train.batch_size": [3, 3], "results.batch_size": 3}),
    "lr": Case(0.5, {"train.lr": [0.5, 0.5], "results.lr": 0.5}),
    "rank": Case(3, {"train.rank": [3, 3], "results.rank": 3}),
    "cat_factor": Case(2.5, {"train.cat_factor": [0.0, 2.5], "results.cat_factor": 2.5}),
    "preserve": Case("blank", {"train.preserve": [None, "blank"], "results.preserve": "blank"}),
    # Of the trained weights too.
    "dtype": Case("bfloat16", {"loaded.dtype": torch.bfloat16, "train.dtype": ["bfloat16"] * 2}),
}

PRESERVE: dict[str, Case] = {
    **SAMPLING,
    "action": Case("draw", {"error": "preserve: expected build, got 'draw'"}),
    "model": Case("other model", {"loaded": "other model"}),
    "output": Case("elsewhere", {"built": "elsewhere"}),
    "overwrite": Case(True, {"built": "<earlier>/set"}, {"output": "<earlier>/set"}),
    "teacher_draws": Case(3, {"draws": 3}),
    "prompts": Case(("<more>", "<plain>"), {"prompts": ["a sks cat outdoors", "a sks outdoors"]}),
    "general": Case(True, {"prompts": ["a crooked house", *general_prompts()]}),
    "data": Case("<data>", {"prompts": ["a crooked house", "a cat on a hill"]}, {"trigger": ("sks",)}),
    "trigger": Case(
        ("sks=cat",), {"prompts": ["a crooked house", "a cat on a hill"]}, {"data": "<data>", "trigger": ("zwx",)}
    ),
    "class_word": Case(
        "tabby", {"prompts": ["a crooked house", "a tabby on a hill"]}, {"data": "<bare>", "trigger": ("sks",)}
    ),
}

CONVERT: dict[str, Case] = {
    "input": Case("<other>", {"read": "<other>"}),
    "output": Case("elsewhere", {"written": "elsewhere"}),
    "overwrite": Case(True, {"written": "<earlier>"}, {"output": "<earlier>"}),
    "to": Case("kohya", {"format": "kohya"}, {"family": "sd"}),
    "family": Case("sdxl", {"family": "sdxl"}),
    "dtype": Case("bfloat16", {"dtype": torch.bfloat16}),
    "model": Case("model", {"loaded": "model", "checked": ["unet"]}),
}

MERGE: dict[str, Case] = {
    "adapters": Case(("b",), {"merged": ("b",)}),
    "output": Case("elsewhere", {"written": "elsewhere"}),
    "overwrite": Case(True, {"written": "<earlier>"}, {"output": "<earlier>"}),
    "scales": Case((0.5,), {"scales": (0.5,)}),
    "cap": Case(2.0, {"cap": 2.0}),
    "to": Case("kohya", {"format": "kohya"}),
    "family": Case("sdxl", {"family": "sdxl"}),
    "dtype": Case("bfloat16", {"dtype": torch.bfloat16}),
}

CHECK: dict[str, Case] = {
    **SAMPLING,
    "adapters": Case(("mine=b",), {"adapters": {"mine": "b"}}),
    "model": Case("other model", {"loaded": "other model"}),
    "weights_only": Case(True, {"weights": "a", "models": ["unet"]}),
    "encoder": Case("other encoder", {"encoder": "other encoder"}),
    "output_dir": Case("<elsewhere>", {"cache": "<elsewhere>/cache", "results": "<elsewhere>/check.json"}),
    "overwrite": Case(True, {"results": "<earlier>/check.json"}, {"output_dir": "<earlier>"}),
    "cache": Case("kept", {"cache": "kept"}),
    "trigger": Case(("sks",), {"triggers": ("sks",)}),
    "class_word": Case(("cat",), {"class_words": ("cat",)}),
    "prompts": Case("<more>", {"prompts": "<more>"}),
    "limit": Case(7, {"limit": 7}),
    "scales": Case((0.5,), {"scales": (0.5,)}),
    "max_drift": Case(0.1, {"max_drift": 0.1}),
    "stack": Case(True, {"stack": True}),
    "stack_scales": Case((0.5,), {"stack_scales": (0.5,)}),
    "concepts": Case(("mine=pictures",), {"concepts": {"mine": "pictures"}}),
    "rewind": Case("best", {"rewound": "a", "written": "best"}, {"adapters": ("a",)}),
}

REPORT: dict[str, Case] = {
    "runs": Case(("a", "b"), {"runs": ("a", "b")}),
    "output": Case("elsewhere", {"output": "elsewhere"}),
    "overwrite": Case(True, {"output": "<earlier>"}, {"output": "<earlier>"}),
    "title": Case("Cats", {"title": "Cats"}),
}

BASES: dict[str, tuple[Any, dict[str, Case], dict[str, Any]]] = {
    "generate": (generate, GENERATE, {"model": "model", "prompt": ("a cat",), "device": "cpu"}),
    "evaluate": (
        evaluate,
        EVALUATE,
        {
            "model": "model",
            "adapters": ("mine=a",),
            "data": "data",
            "prompts": "<prompts>",
            "trigger": ("sks",),
            "output_dir": "<output>",
            "device": "cpu",
        },
    ),
    "demo": (
        demo,
        DEMO,
        {"emoji_model": "<emoji>", "output_dir": "<output>", "concepts": (), "seeds": (0,), "device": "cpu"},
    ),
    "preserve": (
        preserve,
        PRESERVE,
        {"action": "build", "model": "model", "output": "output", "prompts": ("<house>",), "device": "cpu"},
    ),
    "convert": (convert, CONVERT, {"input": "<lora>", "output": "output", "to": "diffusers"}),
    "report": (report, REPORT, {"runs": ("run",)}),
    "merge": (merge, MERGE, {"adapters": ("a",), "output": "output"}),
    "check": (
        check,
        CHECK,
        {"adapters": ("mine=a",), "model": "model", "output_dir": "<output>", "device": "cpu"},
    ),
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """The paths that values name as <name>."""
    (tmp_path / "prompts").write_text("a sks cat\n")
    (tmp_path / "house").write_text("a crooked house\n")
    (tmp_path / "plain").write_text("a sks outdoors\n")
    (tmp_path / "more").write_text("a sks cat outdoors\n")
    concepts = [
        {"name": name, "trigger_prompts": [f"a sks {word}"]} for name, word in (("tabby", "cat"), ("pug", "dog"))
    ]
    (tmp_path / "concepts.json").write_text(json.dumps({"concepts": concepts}))
    for folder, names in (("emoji", ("tabby", "tom")), ("other", ("pug",))):
        (tmp_path / folder).mkdir()
        concepts = [
            {
                "name": name,
                "class_word": "cat",
                "folder": name,
                **{f"{kind}_prompts": ["a cat"] for kind in ("class", "neighbour", "other_class")},
                "trigger_prompts": ["a sks cat"],
            }
            for name in names
        ]
        (tmp_path / folder / "prompts.json").write_text(json.dumps({"trigger_word": "sks", "concepts": concepts}))
    (tmp_path / "earlier").mkdir()
    files = ("metadata.jsonl", "results.json", "check.json", "pytorch_lora_weights.safetensors", "report.html", "set")
    for file in files:
        (tmp_path / "earlier" / file).touch()
    for folder, caption in (("data", "a sks cat on a hill"), ("bare", "a sks on a hill")):
        (tmp_path / folder).mkdir()
        draw_picture(tmp_path / folder / "0.png", "red")
        (tmp_path / folder / "0.txt").write_text(caption)
    places = {
        f"<{name}>": str(tmp_path / name)
        for name in (
            "earlier",
            "prompts",
            "plain",
            "house",
            "more",
            "output",
            "elsewhere",
            "emoji",
            "other",
            "data",
            "bare",
        )
    }
    return places | {"<concepts>": str(tmp_path / "concepts.json"), "<lora>": str(tmp_path / "lora")}


@pytest.fixture
def seen() -> Seen:
    return {}


@pytest.fixture(autouse=True)
def _watched(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands call notes what it is given, and does nothing."""

    def note(**given: Any) -> None:
        seen.update({name: str(value) if isinstance(value, Path) else value for name, value in given.items()})

    def load_pipeline(model: str, dtype: torch.dtype, device: torch.device) -> Any:
        note(loaded=model, **{"loaded.dtype": dtype})
        return SimpleNamespace(device=device)

    def sample(config: Any) -> None:
        seen.update({f"sampling.{name}": value for name, value in dataclasses.asdict(config).items()})

    def generate_pictures(pipeline: Any, prompts: Any, config: Any, *, adapter: Any) -> str:
        sample(config)
        note(prompts=prompts, adapter=adapter)
        return "grid"

    def score(
        pipeline: Any, adapters: Any, prompts: Any, encoder: Any, *, concept_images: Any, config: Any, **more: Any
    ) -> Any:
        sample(config)
        note(adapters=adapters, concept_images=concept_images, cache=more.get("cache"))
        note(**{f"prompts.{name}": value for name, value in dataclasses.asdict(prompts).items()})
        return SimpleNamespace(save=lambda path: note(results=path), to_json=lambda: "{}", adapters={})

    def train(config: Any) -> Any:
        for name, value in config.to_dict().items():
            seen.setdefault(f"train.{name}", []).append(value)
        return SimpleNamespace(output_dir=Path(config.output_dir), metrics=None, seconds=1.0)

    def save_lora(path: Any, lora: Any, *, format: Any, family: Any, dtype: Any) -> Any:
        note(written=path, format=format, family=family, dtype=dtype)
        return path

    def load_encoder(path: Any, device: Any) -> None:
        note(encoder=path)

    def read_lora(path: Any, models: Any) -> Any:
        note(read=path)
        return SimpleNamespace(alphas={}, state={}, format="peft", family=None)

    def merge_loras(adapters: Any, scales: Any, *, cap: Any) -> Any:
        note(merged=adapters, scales=scales, cap=cap)
        return SimpleNamespace(alphas={}), ()

    def check_weights(adapter: Any, models: Any) -> WeightReport:
        note(weights=adapter, models=sorted(models))
        return WeightReport("peft", None, (), ())

    def build(pipeline: Any, prompts: Any, path: Any, *, sampling: Any, draws: Any, processes: Any) -> list[str]:
        sample(sampling)
        note(prompts=prompts, built=path, draws=draws)
        return prompts

    def check_adapters(adapters: Any, pipeline: Any, encoder: Any, **given: Any) -> CheckResult:
        sample(given.pop("config"))
        note(adapters=adapters, **{name: value for name, value in given.items() if name != "processes"})
        return CheckResult({}, {})

    def rewind(run: Any, output: Any, **given: Any) -> Rewind:
        note(rewound=run, written=output)
        return Rewind((), None, None)

    def write_report(runs: Any, output: Any, *, title: Any) -> None:
        note(runs=runs, output=output, title=title)

    fakes: dict[str, Callable[..., Any]] = {
        "training.model.load_pipeline": load_pipeline,
        "training.train": train,
        "training.rewind": rewind,
        "evaluation.generate_pictures": generate_pictures,
        "evaluation.save_pictures": lambda grid, folder: note(folder=folder) or [],
        "evaluation.generation.adapter_files": lambda path: {},
        "evaluation.evaluate": score,
        "evaluation.load_encoder": load_encoder,
        "evaluation.ClipEncoder.from_pretrained": load_encoder,
        "report.contact_sheet": lambda result, path: note(sheet=path) or draw_picture(path, "red"),
        "report.save_all_pictures": lambda result, path: path.mkdir(parents=True) or note(pictures=path),
        "report.training_curves": lambda metrics, path: draw_picture(path, "red"),
        "report.print_table": lambda result: None,
        "report.write_report": write_report,
        "training.preservation_set.PreservationSet.build": build,
        "adapter_file.save_lora": save_lora,
        "adapter_file.merge_loras": merge_loras,
        "adapter_check.check": check_adapters,
        "adapter_check.check_weights": check_weights,
        "adapter_check.CheckResult.save": lambda _, path: note(results=path),
        "adapter_file.read.read_lora": read_lora,
        "adapter_file.lora_file.check_fit": lambda lora, models: note(checked=sorted(models)),
        "training.model.pipeline_models": lambda pipeline: {"unet": pipeline},
        "commands.demo.summarize": lambda runs: note(concepts=list(dict.fromkeys(run.concept for run in runs))) or {},
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(f"cat_rs.{name}", fake)


def named(value: Any, places: dict[str, str]) -> Any:
    """The value with its <names> filled in."""
    if isinstance(value, dict):
        return {name: named(item, places) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(named(item, places) for item in value)
    if isinstance(value, str) and value.startswith("<"):
        name, end, rest = value.partition(">")
        return places[name + end] + rest
    return value


def run(command: Any, seen: Seen, options: dict[str, Any], places: dict[str, str]) -> Seen:
    seen.clear()
    try:
        command.run(command.Settings(**named(options, places)))
    except cat_rs.errors.CatRsError as error:
        seen["error"] = str(error)
    results = Path(
        places["<elsewhere>"] if options.get("output_dir") == "<elsewhere>" else places["<output>"], "results.json"
    )
    if command is demo and results.exists():
        seen["results"] = str(results)
        seen.update({f"results.{name}": value for name, value in json.loads(results.read_text())["training"].items()})
    return dict(seen)


@pytest.mark.parametrize("command", ["generate", "evaluate", "preserve", "convert", "report", "merge", "check"])
def test_earlier_files_are_found_before_anything_is_loaded(command: str, seen: Seen, places: dict[str, str]) -> None:
    module, table, basis = BASES[command]
    after = run(module, seen, basis | table["overwrite"].given, places)
    assert after.keys() == {"error"}
    assert after["error"].startswith(
        f"{'output_dir' if 'output_dir' in table else 'output'}: expected a new place, got"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ("<empty>",)}, "prompts: expected at least one prompt in .*empty, got none"),
        (
            {"prompts": ("<prompts>",), "trigger": ("sks=cat",)},
            "prompts: expected prompts without a trigger in .*'a sks",
        ),
        ({"data": "<data>"}, "trigger: expected the trigger word of the captions in data, got none"),
    ],
    ids=["empty", "trigger", "no-trigger"],
)
def test_prompts_that_preserve_nothing_are_refused(
    options: dict[str, Any], message: str, places: dict[str, str], tmp_path: Path
) -> None:
    places["<empty>"] = str(tmp_path / "empty")
    (tmp_path / "empty").write_text("# none\n")
    with pytest.raises(cat_rs.errors.CatRsError, match=f"^{message}"):
        preserve.run(preserve.Settings(**named(BASES["preserve"][2] | options, places)))


@pytest.mark.parametrize("command", BASES)
def test_every_option_has_its_case(command: str) -> None:
    module, table, basis = BASES[command]
    check_table(module.Settings, table, basis)


@pytest.mark.parametrize(("command", "name"), [(command, name) for command in BASES for name in BASES[command][1]])
def test_an_option_changes_what_it_should(
    command: str, name: str, seen: Seen, places: dict[str, str], tmp_path: Path
) -> None:
    module, table, basis = BASES[command]
    case = table[name]
    given = basis | case.given
    before = run(module, seen, given, places)
    places["<output>"] = str(tmp_path / "output with the option")
    after = run(module, seen, {**given, name: case.value}, places)
    check_case(name, dataclasses.replace(case, changes=named(case.changes, places)), before, after)
