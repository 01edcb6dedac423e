"""The settings: files, types, ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cat_rs.options import ConfigError, read_config_file
from cat_rs.training.config import TrainConfig

REQUIRED = {"model": "model", "data": "data", "trigger": ("sks",)}


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_file_round_trip(tmp_path: Path, name: str) -> None:
    config = TrainConfig(**REQUIRED, class_word="Bär", lr=1e-5, snr_gamma=5.0, flip=True)
    config.save(tmp_path / name)
    assert TrainConfig.load(tmp_path / name) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\ndata: d\nlearning_rat: 1", "unknown key 'learning_rat'; known keys: model, data"),
        ("data: d", "missing --model"),
        ("model: m\ndata: d\ntrigger: sks\nsteps: many", "steps: expected int, got 'many'"),
        ("model: m\ndata: d\ntrigger: sks\nsteps: 1.5", "steps: expected int, got 1.5"),
        ("model: m\ndata: d\ntrigger: sks\nsteps: true", "steps: expected int, got True"),
        ("model: m\ndata: d\ntrigger: sks\nflip: 1", "flip: expected bool, got 1"),
        ("model: m\ndata: d\ntrigger: sks\ncrop: left", "crop: expected one of center, random; got 'left'"),
        ("model: m\ndata: d\ntrigger: [1]", "trigger: expected str, got 1"),
        ("- model", "expected a mapping of settings, got list"),
        ("a: [", "expected YAML or JSON"),
    ],
)
def test_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config.yaml: ") as error:
        TrainConfig.load(tmp_path / "config.yaml")
    assert message in str(error.value)


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot read"):
        TrainConfig.load(tmp_path / "absent.yaml")


def test_dashes_short_numbers_and_single_words_are_understood(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: m\ndata: d\ntrigger: sks\nbatch-size: 2\nlr: 1e-4\n")
    config = TrainConfig.load(tmp_path / "config.yaml")
    assert (config.batch_size, config.lr, config.trigger) == (2, 1e-4, ("sks",))


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"rank": 0},
        {"cat_factor": -1.0},
        {"cat_factor": float("nan")},
        {"teacher_draws": -1},
        {"lr": 0.0},
        {"lr": float("inf")},
        {"beta1": 1.0},
        {"lora_dropout": 1.0},
        {"target_modules": ()},
        {"trigger": ()},
        {"cat_factor_end": -1.0},
        {"cat_ratio": 0.0},
        {"preserve_every": 0},
        {"cat_ratio": 0.1, "cat_factor_end": 1.0},
        {"cat_ratio": 0.1, "cat_drift": 0.1},
        {"cat_drift": 0.0},
        {"preserve_share": 0.0},
        {"preserve_share": 1.5},
        {"preserve_batch": 0},
        {"noise_offset": -0.1},
        {"resume": True, "overwrite": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_value_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{', '.join(settings)}: expected"):
        TrainConfig(**REQUIRED | settings)


def test_a_share_of_given_sets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"preserve_share: expected it with .* no preserve_set, got 0.7 without"):
        TrainConfig(**REQUIRED, preserve_share=0.7, preserve="set", preserve_set=("a",))


def test_settings_that_changed_since_the_checkpoint_are_named() -> None:
    earlier = TrainConfig(**REQUIRED, rank=4).effective()
    TrainConfig(**REQUIRED, rank=4, steps=1000, resume=True).check_continues(earlier)
    with pytest.raises(ConfigError, match="rank was 4, is 8"):
        TrainConfig(**REQUIRED, rank=8).check_continues(earlier)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"preservation": "l2", "teacher_draws": 3}, "preservation: expected cat with teacher_draws, got l2"),
        (
            {"preservation": "dco", "preserve_prompts": "prompts.txt"},
            "preservation: expected cat or prior or layers with preserve_prompts, got dco",
        ),
        (
            {"preservation": "dco", "cat_ratio": 0.1},
            "preservation: expected cat or l2 or layers with cat_ratio, got dco",
        ),
        ({"preservation": "dco", "cat_drift": 0.1}, "preservation: expected .* with cat_drift, got dco"),
        ({"preservation": "dco", "preserve_every": 2}, "preserve_every: expected 1 with preservation dco, got 2"),
    ],
    ids=["draws", "prompts", "ratio", "drift", "every"],
)
def test_what_a_preservation_does_not_have_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{text}"):
        TrainConfig(**REQUIRED, **settings)


@pytest.mark.parametrize(
    ("settings", "preserved"),
    [
        ({}, ("set", 4, 8)),
        ({"preserve_set": ("a",)}, ("set", 4, 0)),
        ({"preserve_every": 1, "teacher_draws": 0}, ("set", 1, 0)),
        ({"preservation": "prior"}, ("set", 1, 0)),
        ({"preserve": "captions"}, ("captions", 1, 0)),
        ({"preserve": "blank"}, ("blank", 1, 0)),
        ({"preservation": "layers"}, ("captions", 1, 0)),
        ({"preservation": "layers", "preserve_set": ("a",)}, ("set", 1, 0)),
        ({"cat_drift": 0.1}, ("set", 1, 8)),
        ({"cat_ratio": 0.1}, ("set", 1, 8)),
        ({"noise_offset": 0.1}, ("set", 4, 0)),
        ({"preservation": "dco"}, ("captions", 1, 0)),
        ({"cat_factor": 0.0}, ("captions", 1, 0)),
        ({"cat_factor": 0.0, "cat_factor_end": 1.0}, ("set", 4, 8)),
    ],
    ids=str,
)
def test_what_is_preserved_by_default_depends_on_the_term(
    settings: dict[str, Any], preserved: tuple[str, int, int]
) -> None:
    assert TrainConfig(**REQUIRED, **settings).preserved() == preserved


def test_a_saved_file_leaves_to_its_reader_what_was_not_given(tmp_path: Path) -> None:
    TrainConfig(**REQUIRED).save(tmp_path / "config.yaml")
    values = read_config_file(tmp_path / "config.yaml")
    assert TrainConfig(**{**values, "preservation": "l2"}).preserved().preserve == "captions"


def test_a_checkpoint_from_before_sets_continues_on_the_captions() -> None:
    before = {"preserve", "preserve_every", "preserve_set", "preserve_batch", "teacher_draws"}
    earlier = TrainConfig(**REQUIRED, preserve="captions").effective()
    earlier = {name: value for name, value in earlier.items() if name not in before}
    TrainConfig(**REQUIRED, preserve="captions").check_continues(earlier)
    with pytest.raises(ConfigError, match="preserve was 'captions', is 'set'"):
        TrainConfig(**REQUIRED).check_continues(earlier)


def test_a_default_that_is_given_is_no_change() -> None:
    earlier = TrainConfig(**REQUIRED).effective()
    TrainConfig(**REQUIRED, preserve="set", preserve_every=4, teacher_draws=8).check_continues(earlier)


def test_plain_lora_has_no_term_to_leave_out() -> None:
    with pytest.raises(ConfigError, match="preserve_every: expected 1 with cat_factor 0, got 4"):
        TrainConfig(**REQUIRED, cat_factor=0.0, preserve_every=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"preserve": "captions", "preserve_set": ("a",)},
            "preserve: expected set with preserve_set or preserve_batch, got captions",
        ),
        ({"cat_factor": 0.0, "preserve_batch": 2}, "preserve_batch: expected none with cat_factor 0, got 2"),
        ({"cat_factor": 0.0, "preserve_set": ("a",)}, "preserve_set: expected none with cat_factor 0, got"),
        (
            {"preservation": "dco", "preserve_set": ("a",)},
            "preservation: expected cat, prior or layers with preserve set, got dco",
        ),
        ({"preserve": "set", "preserve_set": ("a",), "teacher_draws": 2}, "preserve_set: expected none with"),
        ({"preserve": "set", "preserve_set": ("a",), "preserve_prompts": "b"}, "preserve_set: expected none with"),
        ({"preserve": "set", "cat_factor": 0.0}, "preserve: expected captions with cat_factor 0, got set"),
        ({"preserve": "blank", "preservation": "dco"}, "preservation: expected .* with preserve blank, got dco"),
        ({"preserve": "blank", "preservation": "prior"}, "preserve: expected set with preservation prior.* got blank"),
        ({"preserve": "blank", "preserve_batch": 2}, "preserve: expected set with preserve_set .* got blank"),
        ({"preserve": "captions", "preserve_share": 0.7}, "preserve_share: expected it with preserve_prompts, or"),
        ({"preserve": "set", "preservation": "l2"}, "preservation: expected cat, prior or layers with preserve set"),
    ],
)
def test_settings_of_a_preservation_set_fit_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        TrainConfig(**REQUIRED, **settings)


def test_a_preservation_set_has_draws_of_any_prompts() -> None:
    TrainConfig(**REQUIRED, preserve="set", teacher_draws=3, preserve_prompts="prompts.txt", noise_offset=0.1)


def test_plain_lora_has_no_base_predictions_to_cache() -> None:
    with pytest.raises(ConfigError, match="teacher_draws: expected 0 with cat_factor 0, got 8"):
        TrainConfig(**REQUIRED, cat_factor=0.0, teacher_draws=8)


@pytest.mark.parametrize("settings", [{"noise_offset": 0.1}, {"preserve_prompts": "prompts.txt"}], ids=str)
def test_a_bank_has_its_own_noise_and_prompts(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="teacher_draws: expected 0 with preserve_prompts or noise_offset"):
        TrainConfig(**REQUIRED, preserve="captions", teacher_draws=3, **settings)
