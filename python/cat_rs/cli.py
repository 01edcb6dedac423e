"""The command line: `cat-rs COMMAND --option ...`."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cat_rs.errors import CatRsError
from cat_rs.options import add_options, from_mapping, given_options, read_config_file, suggestion

EXIT_ERROR = 2
# A shell reports a program ended by signal N as 128 + N.
EXIT_SIGNAL = 128


@dataclass(frozen=True)
class _Command:
    """A sub-command; its module defines `Settings` and `run`."""

    module: str
    help: str
    description: str
    positionals: str = ""


_COMMANDS = {
    "demo": _Command(
        "cat_rs.commands.demo",
        "train plain LoRA and CAT on the bundled emoji model, and compare",
        "Trains an adapter without and one with the preservation term on pictures of one emoji, evaluates both, "
        "prints the table, and writes results.json, contact_sheet.png, curves.png and the pictures.",
    ),
    "train": _Command(
        "cat_rs.commands.train",
        "train a LoRA from a folder of pictures",
        "Trains a LoRA with Contrastive Adapter Training: with the trigger in the prompt the model learns the concept "
        "(L_diff), without it the model keeps predicting what the base model predicts (L_cat). "
        "pipe.load_lora_weights(output_dir) reads the result.",
    ),
    "preserve": _Command(
        "cat_rs.commands.preserve",
        "draw the pictures that preserve a base model, for all trainings on it",
        "Draws pictures with the base model, and writes their latents and embedded prompts as a preservation set, at "
        "which cat-rs train --preserve-set takes the preservation term. A build that was killed goes on where it "
        "stopped.",
        "build ",
    ),
    "generate": _Command(
        "cat_rs.commands.generate",
        "draw pictures, with or without an adapter",
        "Draws one picture for each prompt and seed.",
    ),
    "evaluate": _Command(
        "cat_rs.commands.evaluate",
        "compare adapters with the base model: KPS, identity, diversity",
        "Draws the same prompts and seeds with the base model and with each adapter, and scores what was learned and "
        "what was kept: UPS, TPS and KPS (this project's reading of the paper's score), identity, prompt similarity, "
        "drift and diversity, each with its 95 % interval.",
    ),
    "report": _Command(
        "cat_rs.commands.report",
        "one page from evaluations and trainings: pictures, charts, tables",
        "Reads folders that cat-rs evaluate, demo, train and check wrote, or a results.json alone, and writes "
        "report.html, one file that needs no other: pictures of all models side by side, what was learned against "
        "what was kept, training curves, tables, settings. report.png is the page as a picture, report.json its "
        "figures.",
        "RUN... ",
    ),
    "convert": _Command(
        "cat_rs.commands.convert",
        "write an adapter in the format of diffusers, PEFT or kohya",
        "Reads an adapter of any of the formats and writes it in another, with its scales and what it tells of its "
        "making. The formats and the models they have names for are those of cat_rs.load_lora and cat_rs.save_lora.",
        "INPUT OUTPUT ",
    ),
    "merge": _Command(
        "cat_rs.commands.merge",
        "several adapters as one file, exactly their sum",
        "Writes the sum of several adapters, each at its scale, as one file: ranks add up, nothing is approximated. "
        "A single adapter is written with its scale folded in.",
        "ADAPTER... ",
    ),
    "check": _Command(
        "cat_rs.commands.check",
        "what is in any adapter file, what it does to a model, and how strong it may be",
        "Needs no training data. Prints ranks, scales, sizes and effective ranks of an adapter's layers, and names "
        "the layers that are out of line: NaN, zeros, duplicates, spikes, another scale than the others, layers that "
        "the model does not have. With a model, it draws prompts of several kinds (with the trigger, without it, "
        "false triggers, ...) at several scales, and says what changes, beside what another seed changes; with "
        "--stack several adapters together. cat-rs report makes a page of the results.",
        "ADAPTER... ",
    ),
    "info": _Command(
        "cat_rs.commands.info",
        "versions, build, operations and processor features",
        "Prints what is installed and what this build can do; add it to bug reports.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: Without the program's name; those of the process if None.

    Returns:
        The exit status: 0, 2 after an error (printed as one line), 128 + N after the signal N.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Hints of the libraries below, such as which of their optional parts are missing, are not news to our user.
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path need not be text: its bytes that are not UTF-8 are printed as escapes.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _run(_parse(given))
    except KeyboardInterrupt:
        print("cat-rs: interrupted", file=sys.stderr)
        return EXIT_SIGNAL + signal.SIGINT
    except (CatRsError, OSError, ImportError) as error:
        if "--debug" in given:
            traceback.print_exc()
        print(f"cat-rs: {_message(error)}", file=sys.stderr)
        number = getattr(error, "signal_number", None)
        return EXIT_ERROR if number is None else EXIT_SIGNAL + number
    return 0


def _message(error: Exception) -> str:
    """Return the error's text in one line."""
    hint = "; pip install 'cat-rs[train]' brings it" if isinstance(error, ModuleNotFoundError) else ""
    return " ".join(str(error).split()) + hint


def _parse(given: Sequence[str]) -> argparse.Namespace:
    """Find the command first, because each command's options live in its module, which is slow to import."""
    parser = argparse.ArgumentParser(
        prog="cat-rs", description="Contrastive Adapter Training: LoRAs that keep the base model's knowledge."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    named = next((word for word in given if word in _COMMANDS), None)
    for name, command in _COMMANDS.items():
        options = commands.add_parser(
            name,
            usage=f"cat-rs {name} {command.positionals}[--config FILE] [options]",
            help=command.help,
            description=command.description,
            allow_abbrev=False,
        )
        if name == named:
            _add_command_options(options, command)
    parsed, unknown = parser.parse_known_args(given)
    if unknown:
        hint = suggestion(unknown[0], _module(_COMMANDS[parsed.command]).Settings)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return parsed


def _add_command_options(parser: argparse.ArgumentParser, command: _Command) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of options; the command line wins over it")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error, too")
    add_options(parser, _module(command).Settings)


def _run(parsed: argparse.Namespace) -> None:
    module = _module(_COMMANDS[parsed.command])
    values: dict[str, Any] = {} if parsed.config is None else read_config_file(parsed.config)
    values |= given_options(parsed, module.Settings)
    source = f"cat-rs {parsed.command}" if parsed.config is None else os.fspath(parsed.config)
    module.run(from_mapping(module.Settings, values, source))


def _module(command: _Command) -> Any:
    return importlib.import_module(command.module)


if __name__ == "__main__":
    sys.exit(main())
