"""Comparisons of two adapters: differences of the scores, with intervals from resampling both together."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cat_rs.evaluation import (
    Comparison,
    EvaluationInputError,
    EvaluationResult,
    Interval,
    PromptScores,
    Scores,
)
from cat_rs.evaluation.scores import Paired, paired_interval, paired_kps_interval
from cat_rs.report import format_table, print_table
from cat_rs.report.table import format_comparisons

Array = NDArray[np.float64]
MEASURES = [name for name in Comparison.__dataclass_fields__ if name not in ("a", "b")]


def harmonic(*groups: Array) -> float:
    return len(groups) / sum(np.mean(1 / values) for values in groups)


def rows(model: str, seed: int, prompts: int = 6, seeds: int = 3) -> list[PromptScores]:
    """Scores of random figures in (0.5, 1)."""
    generator = np.random.default_rng(seed)

    def draw() -> tuple[float, ...]:
        return tuple(0.5 + 0.5 * generator.random(seeds))

    return [
        PromptScores(
            model,
            f"prompt {number}",
            trigger,
            similarity=draw(),
            identity=draw() if trigger else (),
            prompt_similarity=draw(),
            pixel_rmse=draw(),
            latent_rmse=draw(),
            diversity=draw()[0],
        )
        for trigger in (True, False)
        for number in range(prompts)
    ]


def result_of(**models: list[PromptScores]) -> EvaluationResult:
    adapters = {name: Scores(ups=Interval(0.9, 0.8, 1.0)) for name in models}
    return EvaluationResult({}, Scores(), None, adapters, tuple(row for model in models.values() for row in model))


def column(model: list[PromptScores], measure: str, trigger: bool) -> Array:
    return np.array([getattr(row, measure) for row in model if row.trigger is trigger]).ravel()


def value(interval: Interval | None) -> float:
    assert interval is not None
    assert interval.low <= interval.value <= interval.high
    return interval.value


@pytest.fixture
def result() -> EvaluationResult:
    return result_of(one=rows("one", 1), two=rows("two", 2), three=rows("three", 3))


def test_differences_are_those_of_the_scores(result: EvaluationResult) -> None:
    one, two = rows("one", 1), rows("two", 2)
    comparison = result.compare("one", "two")
    assert (comparison.a, comparison.b) == ("one", "two")
    ups, tps = ([column(model, "similarity", trigger) for model in (one, two)] for trigger in (False, True))
    assert value(comparison.ups) == pytest.approx(harmonic(ups[1]) - harmonic(ups[0]))
    assert value(comparison.tps) == pytest.approx(harmonic(tps[1]) - harmonic(tps[0]))
    assert value(comparison.kps) == pytest.approx(harmonic(ups[1], tps[1]) - harmonic(ups[0], tps[0]))
    # (1 - mean cos) / 2, with cos = 2 s - 1.
    drift = [np.mean((1 - (2 * s - 1)) / 2) for s in ups]
    assert value(comparison.drift) == pytest.approx(drift[1] - drift[0])
    for name, measure, trigger in (
        ("identity", "identity", True),
        ("prompt_similarity", "prompt_similarity", True),
        ("prompt_similarity_no_trigger", "prompt_similarity", False),
        ("diversity", "diversity", False),
        ("pixel_rmse", "pixel_rmse", False),
        ("latent_rmse", "latent_rmse", False),
    ):
        expected = column(two, measure, trigger).mean() - column(one, measure, trigger).mean()
        assert value(getattr(comparison, name)) == pytest.approx(expected), name


def test_order_turns_the_sign(result: EvaluationResult) -> None:
    there, back = result.compare("one", "two"), result.compare("two", "one")
    for name in MEASURES:
        forth, opposite = getattr(there, name), getattr(back, name)
        assert (forth.value, forth.low, forth.high) == pytest.approx((-opposite.value, -opposite.high, -opposite.low))


def test_all_pictures_of_a_prompt_are_resampled_together() -> None:
    def alike(model: str, seed: int) -> list[PromptScores]:
        """Prompts whose seeds have one figure, so that more seeds are no more evidence."""
        many = rows(model, seed, seeds=1)
        return [
            replace(row, **{name: getattr(row, name) * 8 for name in ("similarity", "identity", "prompt_similarity")})
            for row in many
        ]

    single = result_of(one=rows("one", 1, seeds=1), two=rows("two", 2, seeds=1)).compare("one", "two")
    repeated = result_of(one=alike("one", 1), two=alike("two", 2)).compare("one", "two")
    for name in ("kps", "ups", "tps", "drift", "identity", "prompt_similarity", "prompt_similarity_no_trigger"):
        once, often = getattr(single, name), getattr(repeated, name)
        assert often.value == pytest.approx(once.value), name
        assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.1), name


def test_adapter_does_not_differ_from_itself(result: EvaluationResult) -> None:
    comparison = result.compare("one", "one")
    for name in MEASURES:
        assert getattr(comparison, name) == Interval(0, 0, 0)


def like_within_prompts(generator: np.random.Generator, prompts: int, seeds: int) -> Paired:
    """Pairs whose differences are mostly those of their prompts."""
    numbers = np.repeat(np.arange(prompts), seeds)
    a = 0.5 + 0.4 * generator.random(prompts)[numbers]
    change = 0.03 * generator.standard_normal(prompts)[numbers] + 0.005 * generator.standard_normal(len(numbers))
    return Paired(a, np.clip(a + change, 0.01, 1), numbers)


@pytest.mark.parametrize("statistic", ["mean", "harmonic_mean"])
def test_interval_is_that_of_resampling_prompts(statistic: str) -> None:
    generator = np.random.default_rng(7)
    pairs = like_within_prompts(generator, 20, 4)
    of = np.mean if statistic == "mean" else harmonic
    differences = []
    for _ in range(20_000):
        drawn = (4 * generator.integers(20, size=20)[:, None] + np.arange(4)).ravel()
        differences.append(of(pairs.b[drawn]) - of(pairs.a[drawn]))
    interval = paired_interval(pairs, statistic)  # type: ignore[arg-type]
    spread = float(np.std(differences))
    assert (interval.low, interval.high) == pytest.approx(np.quantile(differences, (0.025, 0.975)), abs=0.1 * spread)
    # As if pictures of one prompt were independent, it would be half as wide; unpaired, several times.
    alone = paired_interval(pairs._replace(prompts=np.arange(80)), statistic)  # type: ignore[arg-type]
    assert alone.high - alone.low < 0.6 * (interval.high - interval.low)
    assert interval.high - interval.low < 0.5 * 4 * float(np.std(pairs.a)) / 20**0.5


def test_kinds_are_resampled_each_by_itself() -> None:
    generator = np.random.default_rng(8)
    kinds = [like_within_prompts(generator, 30, 2), like_within_prompts(generator, 7, 2)]
    differences = []
    for _ in range(20_000):
        drawn = []
        for kind in kinds:
            prompts = len(kind.a) // 2
            drawn.append((2 * generator.integers(prompts, size=prompts)[:, None] + np.arange(2)).ravel())
        sides = [[getattr(kind, side)[one] for kind, one in zip(kinds, drawn, strict=True)] for side in "ab"]
        differences.append(harmonic(*sides[1]) - harmonic(*sides[0]))
    interval = paired_kps_interval(*kinds)
    assert interval.value == pytest.approx(harmonic(*(k.b for k in kinds)) - harmonic(*(k.a for k in kinds)))
    spread = float(np.std(differences))
    assert (interval.low, interval.high) == pytest.approx(np.quantile(differences, (0.025, 0.975)), abs=0.1 * spread)


def test_pictures_of_a_single_prompt_are_resampled() -> None:
    pairs = like_within_prompts(np.random.default_rng(9), 1, 50)
    interval = paired_interval(pairs, "mean")
    width = 2 * 1.96 * float(np.std(pairs.b - pairs.a)) / 50**0.5
    assert interval.high - interval.low == pytest.approx(width, rel=0.1)


def test_similarity_of_zero_is_no_division_by_zero() -> None:
    interval = paired_interval(Paired(np.array([0.0, 0.5]), np.array([0.5, 0.5]), np.arange(2)), "harmonic_mean")
    assert interval == Interval(0.5, 0.0, 0.5)


def test_single_pair_has_no_bounds() -> None:
    comparison = result_of(one=rows("one", 1, 1, 1), two=rows("two", 2, 1, 1)).compare("one", "two")
    for name in MEASURES:
        interval = getattr(comparison, name)
        assert math.isfinite(interval.value)
        assert np.isnan([interval.low, interval.high]).all()


def test_measures_that_do_not_apply_are_none() -> None:
    models = {
        name: [replace(row, prompt_similarity=(), diversity=None) for row in rows(name, seed)]
        for name, seed in (("one", 1), ("two", 2))
    }
    comparison = result_of(**models).compare("one", "two")
    absent = {name for name in MEASURES if getattr(comparison, name) is None}
    assert absent == {"prompt_similarity", "prompt_similarity_no_trigger", "diversity"}
    assert "CLIP-T" not in format_comparisons(result_of(**models))


def test_what_cannot_be_compared_is_named(result: EvaluationResult) -> None:
    with pytest.raises(EvaluationInputError, match=r"b: expected one of \['one', 'two', 'three'\], got 'four'"):
        result.compare("one", "four")
    with pytest.raises(EvaluationInputError, match="a: expected one of"):
        result.compare("base", "one")
    with pytest.raises(EvaluationInputError, match="expected the same prompts of 'one' and 'two', got others"):
        result_of(one=rows("one", 1), two=rows("two", 2)[:-1]).compare("one", "two")
    shorter = [replace(row, similarity=row.similarity[:2]) for row in rows("two", 2)]
    with pytest.raises(EvaluationInputError, match=r"values of similarity of 'one' .* 'prompt 0', got 3 and 2"):
        result_of(one=rows("one", 1), two=shorter).compare("one", "two")


def test_result_from_a_file_compares_the_same(result: EvaluationResult, tmp_path: Path) -> None:
    result.save(tmp_path / "results.json")
    loaded = EvaluationResult.load(tmp_path / "results.json")
    assert loaded.compare("three", "two") == result.compare("three", "two")
    content = json.loads((tmp_path / "results.json").read_text())["comparisons"]
    assert [(entry["a"], entry["b"]) for entry in content] == [("one", "two"), ("one", "three")]
    ups = result.compare("one", "three").ups
    assert ups is not None
    assert content[1]["ups"] == {"value": ups.value, "low": ups.low, "high": ups.high}
    assert content[0].keys() == Comparison.__dataclass_fields__.keys()


def test_file_without_comparisons_is_read(result: EvaluationResult) -> None:
    content = json.loads(result.to_json())
    del content["comparisons"]
    assert EvaluationResult.from_json(json.dumps(content)) == result


def test_print_shows_each_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(one=rows("one", 1), two=rows("two", 2), three=rows("three", 3))
    settings = {"prompts": {"trigger": [], "no_trigger": []}, "sampling": {"seeds": [0]}, "encoder": "clip"}
    result = replace(result, settings=settings)
    print_table(result)
    printed = capsys.readouterr().out
    assert printed == f"{format_table(result)}\n\n{format_comparisons(result)}\n"
    assert "two minus one" in printed
    assert "three minus one" in printed
    ups = result.compare("one", "two").ups
    assert ups is not None
    assert f"{ups.value:+.3f} [{ups.low:+.3f}, {ups.high:+.3f}]" in printed
