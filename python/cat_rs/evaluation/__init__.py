"""The pictures, embeddings and scores behind `cat-rs evaluate`: what an adapter learned and what it destroyed."""

from __future__ import annotations

from cat_rs.evaluation.adapter_evaluation import evaluate
from cat_rs.evaluation.config import EvaluationConfig
from cat_rs.evaluation.encoder import CallableEncoder, ClipEncoder, Dinov2Encoder, Encoder, load_encoder
from cat_rs.evaluation.errors import EvaluationFileError, EvaluationInputError
from cat_rs.evaluation.generation import (
    PictureGrid,
    ScaledAdapter,
    adapter_loaded,
    generate_pictures,
    save_pictures,
)
from cat_rs.evaluation.kps_evaluator import KpsEvaluator
from cat_rs.evaluation.live_evaluation import LiveEvaluation
from cat_rs.evaluation.measures import Comparison, Interval, PromptScores, Scores
from cat_rs.evaluation.pictures import Pictures, load_pictures
from cat_rs.evaluation.prompts import EvaluationPrompts
from cat_rs.evaluation.result import EvaluationPictures, EvaluationResult, ModelPictures

__all__ = [
    "CallableEncoder",
    "ClipEncoder",
    "Comparison",
    "Dinov2Encoder",
    "Encoder",
    "EvaluationConfig",
    "EvaluationFileError",
    "EvaluationInputError",
    "EvaluationPictures",
    "EvaluationPrompts",
    "EvaluationResult",
    "Interval",
    "KpsEvaluator",
    "LiveEvaluation",
    "ModelPictures",
    "PictureGrid",
    "Pictures",
    "PromptScores",
    "ScaledAdapter",
    "Scores",
    "adapter_loaded",
    "evaluate",
    "generate_pictures",
    "load_encoder",
    "load_pictures",
    "save_pictures",
]
