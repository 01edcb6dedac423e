"""README and docs: links lead somewhere, every code block runs or says why not, and the site builds strictly."""

from __future__ import annotations

import doctest
import functools
import importlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from cat_rs import CatStep, save_lora
from cat_rs.cli import main
from tests.comparison import ddpm
from tests.conftest import draw_picture
from tests.evaluation.conftest import tiny_clip_dir  # noqa: F401
from tests.models import CROSS, add_lora, tiny_text_encoder, tiny_transformer, tiny_unet

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(page for part in ("docs", "examples") for page in (ROOT / part).rglob("*.md"))])
FENCED = re.compile(r"(?ms)^```(\w*)[^\n]*\n(.*?)^```$")
CODE = re.compile(r"(?ms)^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>python|bash|sh)\n(?P<code>.*?)^```$")
# Instead of what a page has, so that its blocks take seconds.
SHORTER = (
    ("range(300)", "range(2)"),
    ("num_inference_steps=16", "num_inference_steps=2"),
    ("max_steps=300", "max_steps=2"),
)
SHORT_OPTIONS = {
    "train": "--steps 2 --rank 2 --resolution 16 --device cpu",
    "preserve": "--inference-steps 1 --device cpu",
    "generate": "--inference-steps 2 --device cpu",
    "evaluate": "--inference-steps 2 --device cpu",
    "check": "--inference-steps 1 --device cpu --limit 1 --scales 1",
}
SHORT_EVALUATIONS = "--evaluate-every 2 --evaluate-inference-steps 2 --evaluate-seeds 0"


class Block(NamedTuple):
    """A code block of a page."""

    page: str
    number: int
    mark: str
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks() -> Iterator[Block]:
    for page in PAGES:
        for number, found in enumerate(CODE.finditer(text_of(page))):
            name = page.relative_to(ROOT).as_posix()
            yield Block(name, number, found["mark"] or "", found["language"], found["code"])


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", FENCED.sub("", text_of(page)))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^()\s]+)\)", FENCED.sub("", text_of(page))):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").split()) <= 1200


@pytest.mark.parametrize("block", [block for block in blocks() if block.mark], ids=str)
def test_what_does_not_run_here_says_why(block: Block) -> None:
    reason = re.fullmatch(r"not run: \w.*|runs in (tests/\S+\.py)(?:[:,] .+)?", block.mark)
    assert reason, block.mark
    assert reason[1] is None or (ROOT / reason[1]).is_file(), block.mark
    if block.language == "python":
        compile(block.code, str(block), "exec")


@pytest.fixture
def reader(
    tiny_pipeline_dir: Path,
    tiny_clip_dir: Path,  # noqa: F811
    few_general_prompts: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader's folder, with tiny models under the names that the pages use."""
    monkeypatch.chdir(tmp_path)
    emoji = Path("examples/emoji_model")
    for folder in (emoji, Path("openai")):
        folder.mkdir(parents=True)
    for name in ("concepts", "prompts.json", "preserve_prompts.txt"):
        (emoji / name).symlink_to(ROOT / emoji / name)
    for name in (Path("DIR_OR_ID"), emoji / "model"):
        name.symlink_to(tiny_pipeline_dir)
    for name in (emoji / "clip", Path("openai/clip-vit-large-patch14"), Path("openai/clip-vit-base-patch32")):
        name.symlink_to(tiny_clip_dir)
    for folder, caption in (("pictures", "a sks dog"), ("pictures/dog", "a sks dog")):
        Path(folder).mkdir()
        draw_picture(Path(folder, "0.png"), "red")
        Path(folder, "0.txt").write_text(caption)
    for side, kind in itertools.product(("base", "adapted"), ("trigger", "no_trigger")):
        Path(side, kind).mkdir(parents=True)
        for number, colour in enumerate(("red", "green" if side == "base" else "blue")):
            draw_picture(Path(side, kind, f"{number}.png"), colour)
    Path("prompts.txt").write_text("a sks dog on a beach\na photo of a sks dog\n")
    Path("my_prompts.txt").write_text("a lighthouse\n")
    (tmp_path / "runs").mkdir()


@pytest.fixture(scope="session")
def adapter_dir(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained adapter."""
    folder = tmp_path_factory.mktemp("trained")
    draw_picture(folder / "0.png", "red")
    (folder / "0.txt").write_text("a sks dog")
    options = f"--model {tiny_pipeline_dir} --data {folder} --trigger sks --class-word dog --preserve captions"
    options += f" --output-dir {folder}/run"
    assert main(["train", *shlex.split(options), *shlex.split(SHORT_OPTIONS["train"]), "--no-tensorboard"]) == 0
    return folder / "run"


def names_for(block: Block) -> dict[str, Any]:
    """What a block takes from its reader's script."""
    unet = tiny_unet()
    if (block.page, block.number) != ("README.md", 2):
        add_lora(unet)
    latents, words = torch.randn(2, 4, 8, 8), torch.randn(4, 2, 5, CROSS)
    batch = {"latents": latents, "prompt_embeds": words[0], "prompt_embeds_no_trigger": words[1]}
    names: dict[str, Any] = {
        **batch,
        "unet": unet,
        "noise_scheduler": ddpm(),
        "dataloader": [batch],
        "captions": ["a sks dog on red", "a sks dog on blue"],
        "captions_no_trigger": ["a dog on red", "a dog on blue"],
        "encode": lambda prompts: torch.randn(len(prompts), 5, CROSS),
        "noisy_latents": latents,
        "noise": torch.randn_like(latents),
        "timesteps": torch.tensor([200, 800]),
    }
    if block.page == "docs/preserving.md":
        names |= {"cat_step": CatStep(unet, ddpm()), "general_latents": torch.randn(3, 4, 8, 8)}
        names["general_prompts"] = ["a lemon", "a castle", "an oil painting"]
        # As many tokens as the text encoder of the pipeline gives.
        names["encode"] = lambda prompts: torch.randn(len(prompts), 40, CROSS)
    elif block.page == "docs/in-your-script.md":
        names["unet"] = tiny_unet() if "get_peft_model" in block.code else unet
        names["dataset"] = [{name: values[0] for name, values in batch.items()}] * 8
    elif block.page == "docs/distributed.md":
        names["dataloader"] = torch.utils.data.DataLoader([{name: values[0] for name, values in batch.items()}] * 2)
    elif block.page == "docs/peft.md":
        from peft import LoraConfig, get_peft_model

        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        names |= {"model": get_peft_model(model, LoraConfig(target_modules=["0"])), "inputs": torch.randn(2, 8)}
    elif block.page == "docs/files.md":
        from peft import LoraConfig, inject_adapter_in_model

        text_encoder = tiny_text_encoder()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), text_encoder)
        other = tiny_transformer()
        other.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "other")
        # Only the loading of a file is pretended: no tiny model has names that diffusers' tables change.
        pipe = SimpleNamespace(transformer=other, load_lora_weights=lambda *_args, **_kwargs: None)
        names |= {"text_encoder": text_encoder, "pipe": pipe, "save_lora": save_lora}
        names |= {"other_unet": tiny_unet(2), "other_text_encoder": tiny_text_encoder(4)}
    elif block.page == "docs/check.md":
        from diffusers import DiffusionPipeline

        names["pipeline"] = DiffusionPipeline.from_pretrained("DIR_OR_ID")
    elif block.page == "docs/report.md":
        from diffusers import DiffusionPipeline

        from cat_rs.evaluation import ClipEncoder, EvaluationPrompts

        names |= {
            "pipeline": DiffusionPipeline.from_pretrained("DIR_OR_ID"),
            "adapters": {"cat": "runs/dog"},
            "prompts": EvaluationPrompts.from_trigger_prompts(["a sks dog"], ["sks"], "dog"),
            "encoder": ClipEncoder.from_pretrained("openai/clip-vit-large-patch14"),
        }
    return names


def run_shell(code: str) -> None:
    """Run the commands of a block in this process, with options that shorten them."""
    for line in code.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True) or [""]
        if not program:
            continue
        assert program == "cat-rs", line
        command = arguments[0]
        short = f"{SHORT_OPTIONS.get(command, '')} {SHORT_EVALUATIONS if '--evaluate-every' in arguments else ''}"
        assert main([*arguments, *shlex.split(short)]) == 0, line


def shortened(code: str) -> str:
    return functools.reduce(lambda text, change: text.replace(*change), SHORTER, code)


RUNNING = [
    [block for block in group if not block.mark] for _, group in itertools.groupby(blocks(), lambda block: block.page)
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "block",
    [block for page in RUNNING for block in page if block.page != "docs/getting-started.md"],
    ids=str,
)
@pytest.mark.usefixtures("reader")
def test_blocks_run(block: Block, adapter_dir: Path) -> None:
    for name in ("dog", "plain", "cat"):
        if f"--output-dir runs/{name}" not in block.code:
            shutil.copytree(adapter_dir, f"runs/{name}")
    for name in ("pikachu", "ghibli"):
        shutil.copy(adapter_dir / "pytorch_lora_weights.safetensors", f"{name}.safetensors")
    if block.language == "python":
        names = names_for(block)
        exec(compile(shortened(block.code), str(block), "exec"), names)
        if "metrics" in names:
            assert names["metrics"].loss.isfinite()
            assert names["metrics"].grad_norm > 0
        elif "loss" in names:
            assert any(param.grad is not None and param.grad.any() for param in names["unet"].parameters())
    else:
        run_shell(block.code)


@pytest.mark.filterwarnings("default")
def test_getting_started_needs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks, one after the other on the bundled model, define every name themselves."""
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    (page,) = (page for page in RUNNING if page and page[0].page == "docs/getting-started.md")
    names: dict[str, Any] = {}
    for block in page:
        if block.language == "python":
            exec(compile(shortened(block.code), str(block), "exec"), names)
        else:
            run_shell(block.code)
    assert names["metrics"].grad_norm > 0
    assert {path.name for path in Path("runs").iterdir()} >= {"first", "first-pictures", "script", "pineapple.png"}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; the builder fails at a dead link, and at a docstring that it cannot read."""
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(ROOT / "scripts" / "docs_site.py"), "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_every_public_name_stands_in_the_reference(site: Path) -> None:
    pages = {page.parent.name: text_of(page) for page in (site / "reference").glob("*/index.html")}
    everything = "".join(pages.values())
    for module, names in json.loads(text_of(ROOT / "tests/public_names.json"))["modules"].items():
        for name in names:
            if (module, name) != ("cat_rs", "errors"):
                assert f'id="{module}.{name}"' in everything, f"{module}.{name}"
    assert "<math" in pages["operations"]
    for role in (":class:", ":func:", ":meth:", ".. math::"):
        assert role not in everything


def test_examples_in_docstrings_run() -> None:
    """Those of `KpsEvaluator` are skipped by their own mark: they name a model of the hub."""
    files = [file for file in (ROOT / "python/cat_rs").rglob("*.py") if ">>> " in text_of(file)]
    names = [".".join(file.relative_to(ROOT / "python").with_suffix("").parts) for file in files]
    assert names
    for name in names:
        assert doctest.testmod(importlib.import_module(name)).failed == 0, name


def test_public_names_are_documented() -> None:
    """Each has a docstring, and so has each public method."""
    for module, names in json.loads(text_of(ROOT / "tests/public_names.json"))["modules"].items():
        for name, described in names.items():
            value = getattr(importlib.import_module(module), name)
            if callable(value):
                assert value.__doc__, f"{module}.{name}"
            for member, kind in (described["members"] if isinstance(described, dict) else {}).items():
                if kind == "property" or kind.startswith("("):
                    assert getattr(value, member).__doc__ or member == "__init__", f"{module}.{name}.{member}"
