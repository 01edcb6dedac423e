"""Check any adapter: its weights, and what it does to the pictures of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cat_rs.adapter_check.pictures import Drawn, scale_name, score_pictures
from cat_rs.adapter_check.prompts import GENERAL, TRIGGER, CheckPrompts, Kinds, read_own_prompts, write_prompts
from cat_rs.adapter_check.result import AdapterCheck, CheckResult, PictureCheck, StackCheck
from cat_rs.adapter_check.stack import all_models, score_stacks, trigger_kind
from cat_rs.adapter_check.trigger import Trigger, find_trigger
from cat_rs.adapter_check.weights import check_weights
from cat_rs.adapter_check.wording import sentences
from cat_rs.adapter_file.merge import merge_loras
from cat_rs.adapter_file.pipeline import pipeline_models
from cat_rs.adapter_file.read import read_lora
from cat_rs.arguments import check as check_argument
from cat_rs.arguments import check_path
from cat_rs.evaluation import (
    EvaluationConfig,
    EvaluationFileError,
    EvaluationInputError,
    KpsEvaluator,
    ScaledAdapter,
)
from cat_rs.evaluation.batches import embedded_batches
from cat_rs.evaluation.disk_cache import EvaluationCache
from cat_rs.evaluation.encoder import EncoderSource
from cat_rs.evaluation.generation import check_adapter, require_no_adapter
from cat_rs.evaluation.measures import BASE
from cat_rs.evaluation.pictures import PictureSource
from cat_rs.evaluation.task import KindPictures, Models, PictureTask
from cat_rs.processes import Processes


def check(
    adapters: Mapping[str, str | os.PathLike[str]],
    pipeline: Any = None,
    encoder: KpsEvaluator | EncoderSource | None = None,
    *,
    triggers: Sequence[str] = (),
    class_words: Sequence[str] = (),
    prompts: Mapping[str, Sequence[str]] | str | os.PathLike[str] | None = None,
    limit: int | None = 48,
    scales: Sequence[float] = (0.4, 0.6, 0.8, 1.0),
    max_drift: float = 0.05,
    stack: bool = False,
    stack_scales: Sequence[float] = (),
    concepts: Mapping[str, PictureSource] | None = None,
    config: EvaluationConfig | None = None,
    cache: str | os.PathLike[str] | None = None,
    processes: Processes | None = None,
    progress: bool = True,
) -> CheckResult:
    """Say what adapters do to a model, from their files and the model alone.

    Looks at the weights of each adapter. With a pipeline, writes prompts of several kinds (with the trigger, without
    it, false triggers, ...), draws them with the base model and with the adapter at several scales, and scores how
    much each kind changes, beside what another seed of the base model changes. No training data are needed.

    Args:
        adapters: A name for reports, and a file or folder that `load_lora` reads.
        pipeline: A diffusers pipeline without adapters; None looks at the weights alone.
        encoder: The encoder that embeds pictures and prompts, see `KpsEvaluator`; needed with a pipeline.
        triggers: The trigger of each adapter, in their order; where there are none, the file's metadata are asked.
        class_words: What each adapter's concept is an example of, likewise.
        prompts: Prompts of one's own: kind -> texts, which replace the prompts of a known kind; or a file of them, a
            ``.json`` file with such an object, or a text file with a prompt a line, which become a kind "own".
        limit: At most so many prompts of a kind, spread over its list; None takes all.
        scales: What the adapter's update is multiplied by.
        max_drift: The damage that is still safe: drift of the general prompts, of the class and of its neighbours.
        stack: Whether all pairs of adapters, and all of them, are also drawn together: what each keeps of its own
            effect, what they damage more than one of them does, whether what is asked for appears.
        stack_scales: The scale of each adapter in a stack, in their order; 1 if there are none.
        concepts: Adapter -> pictures of its concept, by which a stack tells whether it appears; where there are none,
            the adapter's own pictures when it is alone stand for them.
        config: The sampler settings.
        cache: A folder for pictures and embeddings, as `cat_rs.evaluation.evaluate` takes it: what is there is not
            drawn again, and a check that was killed goes on where it stopped.
        processes: The processes that share the work; if None, those of torch.distributed's default group.
        progress: Whether to show progress bars that count pictures.

    Returns:
        Of each adapter its weights, scores by kind and scale with intervals, the largest safe scale, and sentences.
        An adapter that cannot be loaded into the pipeline has no scores, and a sentence that says why.

    Raises:
        InvalidValueError, EvaluationInputError: An argument cannot be used; names it.
        EvaluationFileError: The file of prompts cannot be read.
        AdapterError: An adapter's file is damaged or no LoRA.
        OSError: An adapter's file cannot be read.
    """
    _check_arguments(adapters, pipeline, encoder, triggers, class_words, limit, scales, max_drift)
    own = read_own_prompts(prompts) if isinstance(prompts, (str, os.PathLike)) else prompts
    check_argument("check", "prompts", own, "texts by kind, at least one of each", _are_prompts)
    if pipeline is not None:
        require_no_adapter(pipeline)
    _check_stack(adapters, pipeline, stack, stack_scales, concepts)
    settings: dict[str, Any] = {"adapters": {name: os.fspath(path) for name, path in adapters.items()}}
    if pipeline is None:
        weights = {name: AdapterCheck(check_weights(path), (), None) for name, path in adapters.items()}
        return CheckResult(settings, weights)
    session = _Session(pipeline, encoder, config, cache, processes, progress)
    checked: dict[str, AdapterCheck] = {}
    called: dict[str, Kinds] = {}
    for number, (name, path) in enumerate(adapters.items()):
        report = check_weights(path, pipeline_models(pipeline))
        try:
            check_adapter(pipeline, path)
        except (EvaluationInputError, EvaluationFileError) as error:
            checked[name] = AdapterCheck(report, (f"No pictures are drawn: {error}.",), None)
            continue
        lora = read_lora(path, pipeline_models(pipeline))
        trigger = find_trigger(lora, path, *(words[number] if words else None for words in (triggers, class_words)))
        written = write_prompts(trigger, _same_tokens(pipeline), own, limit)
        pictures = session.check_pictures(path, trigger, written, scales, max_drift)
        called[name] = written.kinds
        checked[name] = AdapterCheck(report, sentences(pictures), pictures)
    together = None
    if stack:
        given = dict(zip(adapters, stack_scales or [1.0] * len(adapters), strict=True))
        parts = {name: ScaledAdapter(path, given[name]) for name, path in adapters.items()}
        together = session.check_stack(parts, called, concepts or {})
    return CheckResult(settings | session.settings(), checked, together)


class _Session:
    """A pipeline and an encoder that draw and score for all adapters."""

    def __init__(
        self,
        pipeline: Any,
        encoder: Any,
        config: EvaluationConfig | None,
        cache: str | os.PathLike[str] | None,
        processes: Processes | None,
        progress: bool,
    ) -> None:
        self._pipeline = pipeline
        self._evaluator = encoder if isinstance(encoder, KpsEvaluator) else KpsEvaluator(encoder)
        self._config = config or EvaluationConfig()
        self._cache = None if cache is None else EvaluationCache(cache, pipeline, self._config)
        self._processes = Processes.current() if processes is None else processes
        self._progress = progress

    def settings(self) -> dict[str, Any]:
        return PictureTask({}, self._evaluator, self._config).sampling_settings(self._pipeline)

    def check_pictures(
        self,
        path: str | os.PathLike[str],
        trigger: Trigger,
        prompts: CheckPrompts,
        scales: Sequence[float],
        max_drift: float,
    ) -> PictureCheck:
        """Draw and score the pictures of one adapter."""
        models = {scale_name(scale): (ScaledAdapter(path, scale),) for scale in scales}
        drawn = self._drawn(prompts.kinds, {BASE: (), **models})
        return score_pictures(Drawn(trigger, prompts, drawn), scales, self._evaluator, max_drift)

    def check_stack(
        self, adapters: Mapping[str, ScaledAdapter], called: Mapping[str, Kinds], concepts: Mapping[str, PictureSource]
    ) -> StackCheck:
        """Draw and score adapters alone and together."""
        kinds = {GENERAL: next(iter(called.values()))[GENERAL]}
        kinds |= {trigger_kind(name): own[TRIGGER] for name, own in called.items() if TRIGGER in own}
        references = {name: self._evaluator.embed_images(pictures) for name, pictures in concepts.items()}
        return score_stacks(adapters, self._drawn(kinds, all_models(adapters)), references)

    def _drawn(self, prompts: Kinds, models: Models) -> dict[str, dict[str, KindPictures]]:
        kinds = {kind: tuple(prompt.text for prompt in texts) for kind, texts in prompts.items()}
        task = PictureTask(kinds, self._evaluator, self._config)
        batches = embedded_batches(task, models, self._pipeline, self._cache, self._processes, self._progress)
        return task.by_model(batches)


def _same_tokens(pipeline: Any) -> Callable[[str, str], bool]:
    """Return whether all text encoders of the pipeline read two prompts alike."""
    parts = (pipeline.components.get(name) for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
    tokenizers = [part for part in parts if part is not None]
    return lambda one, other: all(each(one).input_ids == each(other).input_ids for each in tokenizers)


def _check_arguments(
    adapters: Mapping[str, Any],
    pipeline: Any,
    encoder: Any,
    triggers: Sequence[str],
    class_words: Sequence[str],
    limit: int | None,
    scales: Sequence[float],
    max_drift: float,
) -> None:
    count = len(adapters) if isinstance(adapters, Mapping) else 0
    expected = f"paths by name, at least one, none of them called {BASE}"
    check_argument("check", "adapters", adapters, expected, lambda it: count and BASE not in it)
    for path in adapters.values():
        check_path("check", "adapters", path)
    expected = "a diffusers pipeline or None"
    check_argument("check", "pipeline", pipeline, expected, lambda it: it is None or hasattr(it, "get_list_adapters"))
    check_argument(
        "check", "encoder", encoder, "one, as there is a pipeline", lambda it: pipeline is None or it is not None
    )
    for name, words in (("triggers", triggers), ("class_words", class_words)):
        expected = f"a word for each of {count} adapters, or nothing"
        check_argument("check", name, words, expected, lambda it: not it or _are_words(it, count))
    check_argument("check", "limit", limit, "at least 1 or None", lambda it: it is None or it >= 1)
    check_argument("check", "scales", scales, "finite numbers that differ, at least one", _are_scales)
    check_argument("check", "max_drift", max_drift, "a number in (0, 1)", lambda it: 0.0 < it < 1.0)


def _check_stack(
    adapters: Mapping[str, Any], pipeline: Any, stack: bool, stack_scales: Sequence[float], concepts: Any
) -> None:
    count = len(adapters)
    expected = "False for a single adapter, and without a pipeline"
    check_argument("check", "stack", stack, expected, lambda it: not it or (count > 1 and pipeline is not None))
    check_argument(
        "check",
        "stack_scales",
        stack_scales,
        f"a finite number for each of {count} adapters, or nothing",
        lambda it: not it or (len(it) == count and all(map(math.isfinite, it))),
    )
    check_argument("check", "concepts", concepts, "pictures by adapter", lambda it: set(it or ()) <= set(adapters))
    if not stack:
        return
    for path in adapters.values():
        check_adapter(pipeline, path)
    merge_loras([read_lora(path, pipeline_models(pipeline)) for path in adapters.values()])


def _are_words(words: Any, count: int) -> bool:
    texts = [isinstance(word, str) and bool(word.strip()) for word in words]
    return not isinstance(words, str) and all(texts) and len(texts) == count


def _are_prompts(own: Any) -> bool:
    return own is None or all(
        texts and not isinstance(texts, str) and all(isinstance(text, str) for text in texts) for texts in own.values()
    )


def _are_scales(scales: Any) -> bool:
    names = [scale_name(scale) for scale in scales if math.isfinite(scale)]
    return len(set(names)) == len(scales) > 0
