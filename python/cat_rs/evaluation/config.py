"""How pictures are generated for an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from cat_rs.options import ConfigError, check_range


@dataclass(frozen=True)
class EvaluationConfig:
    """Sampler settings, shared by the base model and every adapter.

    Attributes:
        num_inference_steps: Denoising steps of a picture.
        guidance_scale: Classifier-free guidance; 1 switches it off.
        seeds: The seeds; the model draws one picture for each prompt and seed. Diversity and the "other seed"
            reference need two.
        height: Picture height in pixels; the model's own if None, as is width then.
        width: Picture width in pixels; the model's own if None.
        batch_size: Pictures generated together; it changes them only by rounding.

    Raises:
        ConfigError: A value is out of range, or a seed occurs twice.
    """

    num_inference_steps: int = 16
    guidance_scale: float = 3.0
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    height: int | None = None
    width: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        for name in ("num_inference_steps", "batch_size", "height", "width"):
            check_range(name, getattr(self, name), 1)
        check_range("guidance_scale", self.guidance_scale, 0)
        if not self.seeds:
            raise ConfigError("seeds: expected at least one, got none")
        for seed in self.seeds:
            check_range("seeds", seed, 0)
        if len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds: expected seeds that differ, got {list(self.seeds)}")
