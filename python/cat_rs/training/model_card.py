"""The model card of a run: README.md with the block that model hubs read, for whoever uploads the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cat_rs._version import __version__
from cat_rs.atomic import write_bytes
from cat_rs.evaluation import EvaluationResult
from cat_rs.evaluation.measures import MEASURES, format_interval
from cat_rs.run_folder import BEST_FOLDER, CARD_FILE, FRONT_FILE
from cat_rs.training.config import TrainConfig, base_model_name, learning_settings
from cat_rs.training.evaluation import LastEvaluation

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_FAMILY_TAGS = {"StableDiffusionPipeline": "stable-diffusion", "StableDiffusionXLPipeline": "stable-diffusion-xl"}
_OWN_TAG = "cat-rs"
# Only who publishes an adapter can say under which terms.
_OWNERS_KEYS = ("license", "license_name", "license_link")
_SCORES = ("identity", "ups", "tps", "kps", "prompt_similarity", "diversity", "drift")
_PAPER = "[Contrastive Adapter Training](https://arxiv.org/abs/2404.07554)"


def make_card(
    config: TrainConfig,
    *,
    steps: int,
    pipeline: str,
    picture_count: int,
    evaluation: LastEvaluation | None = None,
) -> ModelCard:
    """Describe a trained adapter.

    Args:
        config: The settings.
        steps: The number of finished steps.
        pipeline: The name of the base model's pipeline class.
        picture_count: The number of pictures that it was trained on.
        evaluation: What the last evaluation on the way found; None if there was none.

    Returns:
        The card. Its license is left to the user; local paths are left out, since a hub would publish them.
    """
    from huggingface_hub import ModelCard, ModelCardData

    trigger_words = list(config.class_words())
    is_local = Path(config.model).is_dir()
    tags = ("text-to-image", "diffusers", "diffusers-training", "lora", _FAMILY_TAGS[pipeline], "template:sd-lora")
    pictures = [] if evaluation is None else evaluation.pictures
    data = ModelCardData(
        base_model=None if is_local else config.model,
        instance_prompt=", ".join(trigger_words) or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*tags, _OWN_TAG],
        widget=[{"text": row.prompt, "output": {"url": row.adapter}} for row in pictures] or None,
    )
    name = base_model_name(config)
    model = f"`{name}`" if is_local else f"[{name}](https://huggingface.co/{name})"
    prompt = pictures[0].prompt if pictures else ", ".join(trigger_words)
    parts = [
        f"# LoRA of {_escaped(' '.join(_subject(config))) or 'a concept'}",
        f"A LoRA adapter for {model}, trained for {steps} steps on {picture_count} pictures with cat-rs "
        f"{__version__}, {_method(config)}.",
        _usage(name, trigger_words, prompt),
        "" if evaluation is None else _evaluation_text(evaluation, steps),
        f"## Settings\n\n```yaml\n{_settings(config)}```",
        "## License\n\nWhoever publishes this adapter chooses its license, within the terms of the base model and of "
        "the pictures: `license:` in the block at the top of this file.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n")


def is_own_card(path: Path) -> bool:
    """Return whether a file is a card of this module, which may be replaced."""
    return path.is_file() and _OWN_TAG in (_metadata(path).get("tags") or ())


def write_card(folder: Path, card: ModelCard) -> bool:
    """Write the card, with the license that the user gave the one before.

    Returns:
        Whether it was written: a README.md of others stays.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / CARD_FILE
    if path.exists() and not is_own_card(path):
        return False
    if path.exists():
        before = _metadata(path)
        for key in _OWNERS_KEYS:
            if before.get(key) is not None:
                card.data[key] = before[key]
    write_bytes(path, str(card).encode(errors="backslashreplace"))
    return True


def _metadata(path: Path) -> Mapping[str, Any]:
    """Return the block at the top of a file; empty if it has none that can be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _subject(config: TrainConfig) -> Iterator[str]:
    for word, class_word in config.class_words().items():
        yield f"{word} {class_word}" if class_word else word


def _method(config: TrainConfig) -> str:
    if not config.preserves():
        return "without a preservation term (plain LoRA)"
    preserve, every, _ = config.preserved()
    drawn = " on pictures that the base model drew" if preserve == "set" else ""
    when = f"in one of {every} steps" if every > 1 else "in every step"
    method = {
        "cat": f"by {_PAPER}: {when}, without the trigger the adapted model also had to predict what the base model "
        f"predicts{drawn}",
        "prior": f"with [prior preservation](https://arxiv.org/abs/2208.12242): {when}, it also learned pictures that "
        "the base model drew",
        "dco": "by [Direct Consistency Optimization](https://arxiv.org/abs/2402.12004), which compares its errors "
        "with the base model's",
        "l2": f"with a penalty on the change of the weights {when}",
        "layers": f"with a penalty on what it changes in each layer without the trigger {when}",
    }[config.preservation]
    return f"{method}, so that it forgets less"


def _usage(model: str, trigger_words: list[str], prompt: str) -> str:
    words = ", ".join(f"`{word}`" for word in trigger_words)
    return (
        "## Use\n\n"
        + (f"Trigger words: {words}.\n\n" if words else "")
        + "```python\nfrom diffusers import DiffusionPipeline\n\n"
        + f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(model, ensure_ascii=False)})\n"
        + 'pipeline.load_lora_weights(".")  # this folder, or its name on the hub\n'
        + f"pipeline({json.dumps(prompt, ensure_ascii=False)}).images[0]\n```"
    )


def _evaluation_text(evaluation: LastEvaluation, steps: int) -> str:
    result = evaluation.result
    (scores,) = result.adapters.values()
    rows = [
        f"| {MEASURES[name].label} | {_side(name)} | {format_interval(getattr(result.base, name))} "
        f"| {format_interval(getattr(scores, name))} |"
        for name in _SCORES
        if getattr(scores, name) is not None
    ]
    best = evaluation.best_step
    parts = [
        f"## Scores after step {evaluation.step}",
        "\n".join(["| measure | what it is | base model | with the adapter |", "|---|---|---|---|", *rows]),
        _conditions(result) + " KPS is 1 where nothing was learned: read it beside identity.",
        f"`{BEST_FOLDER}/` holds the adapter of step {best}, the best of this run by the rule in `{FRONT_FILE}`."
        if best not in (None, steps)
        else "",
    ]
    if evaluation.pictures:
        parts += [
            "## Pictures",
            "Drawn with the same noise.",
            "\n".join(
                ["| prompt | base model | with the adapter |", "|---|---|---|"]
                + [
                    f"| {_escaped(row.prompt)} | ![base model]({row.base}) | ![adapter]({row.adapter}) |"
                    for row in evaluation.pictures
                ]
            ),
        ]
    return "\n\n".join(filter(None, parts))


def _side(name: str) -> str:
    measure = MEASURES[name]
    if measure.trigger is None or "the trigger" in measure.note:
        return measure.note
    return f"{measure.note}, {'with' if measure.trigger else 'without'} the trigger"


def _conditions(result: EvaluationResult) -> str:
    prompts, sampling = result.settings["prompts"], result.settings["sampling"]
    return (
        f"95 % bootstrap intervals over {len(prompts['trigger'])} prompts with the trigger and "
        f"{len(prompts['no_trigger'])} without, {len(sampling['seeds'])} pictures of each; encoder "
        f"`{Path(result.settings['encoder']).name}`."
    )


def _settings(config: TrainConfig) -> str:
    """Return what decided the training, as a config file."""
    import yaml

    values = {name: value for name, value in learning_settings(config).items() if value is not None}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, in a cell of a table too."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", " ".join(text.split()))
