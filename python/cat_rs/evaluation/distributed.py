"""Batches that are split among ranks and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from cat_rs.evaluation.disk_cache import Store
from cat_rs.evaluation.errors import EvaluationFileError, EvaluationInputError
from cat_rs.evaluation.fingerprint import text_hash
from cat_rs.processes import Processes

T = TypeVar("T")


def compute_missing(
    keys: Sequence[str],
    compute: Callable[[Sequence[int], Callable[[int, T], None]], None],
    store: Store[T] | None,
    processes: Processes,
) -> list[T]:
    """Return the item of every key: the one in the store, or a new one.

    The ranks take the missing items in turns. An item is the same on any rank, so the result is that of a single
    process. Collective: every rank calls it with the same keys, and gets all items.

    Args:
        keys: What determines each item; equal keys are one item.
        compute: Computes the items with the given numbers, and adds each with its number as soon as it is done.
        store: Where items are looked up and written; without one, ranks exchange them.
        processes: The ranks.

    Raises:
        EvaluationInputError: The ranks have different keys.
        EvaluationFileError: The store cannot be read or written, or is not the same for all ranks.
    """
    if len(set(processes.all_gather_object(text_hash(list(keys))))) > 1:
        raise EvaluationInputError(
            "processes: expected the same model, adapters, prompts and settings in all of them, got others in some"
        )
    numbers = {key: number for number, key in reversed(list(enumerate(keys)))}
    items: dict[str, T] = {}

    def missing_keys() -> list[str]:
        if store is not None:
            items.update((key, item) for key in numbers if (item := store.read(key)) is not None)
        return [key for key in dict.fromkeys(keys) if key not in items]

    # Rank 0 looks for all: another rank would already see what a third has just written.
    missing = processes.on_main(missing_keys)
    own = [numbers[key] for key in missing[processes.rank :: processes.world_size]]

    def compute_own() -> dict[str, T]:
        computed: dict[str, T] = {}

        def add(number: int, item: T) -> None:
            computed[keys[number]] = item
            if store is not None:
                store.write(keys[number], item)

        compute(own, add)
        items.update(computed)
        return computed if store is None else {}

    for computed in processes.on_all(compute_own):
        items.update(computed)
    if store is not None:
        processes.on_all(lambda: items.update((key, _read_back(store, key)) for key in numbers if key not in items))
    return [items[key] for key in keys]


def _read_back(store: Store[T], key: str) -> T:
    """Return an item that another rank has written, or that was there already."""
    item = store.read(key)
    if item is None:
        raise EvaluationFileError(
            f"cache: expected a folder that all processes share, got {store.folder} without {store.path(key).name}, "
            f"which another process has just read or written"
        )
    return item
