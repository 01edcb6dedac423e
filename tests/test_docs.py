"""README and docs: links lead somewhere, Python blocks are Python, README's snippets run on the bundled model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(page for part in ("docs", "examples") for page in (ROOT / part).rglob("*.md"))])
FENCED = re.compile(r"(?ms)^```(\w*)[^\n]*\n(.*?)^```$")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_are_python(page: Path) -> None:
    for language, code in FENCED.findall(text_of(page)):
        if language == "python":
            compile(code, str(page), "exec")


def test_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").split()) <= 1200


def test_readmes_snippets_run() -> None:
    """Names that a snippet takes from the reader's script are given; what it computes must train."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    loss, step = (code for language, code in FENCED.findall(text_of(ROOT / "README.md")) if language == "python")

    def pipeline() -> Any:
        return StableDiffusionPipeline.from_pretrained(ROOT / "examples/emoji_model/model", dtype=torch.float32)

    emoji = pipeline()

    @torch.no_grad()
    def encode(captions: list[str]) -> torch.Tensor:
        return emoji.encode_prompt(captions, "cpu", 1, False)[0]

    captions = ["a sks dog on a red background", "a sks dog on a blue background"]
    latents = torch.randn(2, 4, 16, 16)
    unet = emoji.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    names = {
        "unet": unet,
        "encode": encode,
        "captions": captions,
        "noisy_latents": latents,
        "timesteps": torch.tensor([200, 800]),
        "noise": torch.randn_like(latents),
    }
    exec(loss, names)
    assert any(param.grad is not None and param.grad.any() for param in unet.parameters())

    batch = {
        "latents": latents,
        "prompt_embeds": encode(captions),
        "prompt_embeds_no_trigger": encode(["a dog on a red background", "a dog on a blue background"]),
    }
    names = {"unet": pipeline().unet, "noise_scheduler": emoji.scheduler, "dataloader": [batch]}
    exec(step, names)
    assert names["metrics"].loss.isfinite()
    assert names["metrics"].grad_norm > 0
