"""Work in batches, shared among processes and kept in a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from cat_rs.evaluation.cache import Store
from cat_rs.evaluation.errors import EvaluationFileError, EvaluationInputError
from cat_rs.evaluation.fingerprint import text_hash
from cat_rs.processes import Processes

T = TypeVar("T")


def completed(
    keys: Sequence[str],
    make: Callable[[Sequence[int], Callable[[int, T], None]], None],
    store: Store[T] | None,
    processes: Processes,
) -> list[T]:
    """Return the item of every key: the one in the store, or a new one.

    The processes take the missing items in turns. Which of them made an item does not change it, so the result is that
    of a single process. Collective: every process calls it with the same keys, and gets all items.

    Args:
        keys: What decides each item; equal keys are one item.
        make: Makes the items with the given numbers, and passes on each with its number as soon as it is there.
        store: Where items are looked up and written; without one they are sent around.
        processes: Those that share the work.

    Raises:
        EvaluationInputError: The processes have different keys.
        EvaluationFileError: The store cannot be read or written, or is not the same for all processes.
    """
    if len(set(processes.gathered(text_hash(list(keys))))) > 1:
        raise EvaluationInputError(
            "processes: expected the same model, adapters, prompts and settings in all of them, got others in some"
        )
    numbers = {key: number for number, key in reversed(list(enumerate(keys)))}
    items: dict[str, T] = {}

    def missing_keys() -> list[str]:
        if store is not None:
            items.update((key, item) for key in numbers if (item := store.read(key)) is not None)
        return [key for key in dict.fromkeys(keys) if key not in items]

    # One process looks: another would already see what a third has just written.
    missing = processes.on_main(missing_keys)
    mine = [numbers[key] for key in missing[processes.rank :: processes.count]]

    def make_mine() -> dict[str, T]:
        made: dict[str, T] = {}

        def keep(number: int, item: T) -> None:
            made[keys[number]] = item
            if store is not None:
                store.write(keys[number], item)

        make(mine, keep)
        items.update(made)
        return made if store is None else {}

    for made in processes.together(make_mine):
        items.update(made)
    if store is not None:
        processes.together(lambda: items.update((key, _read_back(store, key)) for key in numbers if key not in items))
    return [items[key] for key in keys]


def _read_back(store: Store[T], key: str) -> T:
    """Return an item that another process has written, or that was there before."""
    item = store.read(key)
    if item is None:
        raise EvaluationFileError(
            f"cache: expected a folder that all processes share, got {store.folder} without {store.path(key).name}, "
            f"which another process has just read or written"
        )
    return item
