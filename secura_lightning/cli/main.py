"""The ``secura`` command: a light front door that imports torch only once a command needs it.

secura fit --config C.yaml      ->  cli.fit.main        train a sequence of tasks
secura sweep -c grid.yaml       ->  cli.sweep.main      run many of them, some at a time
secura plan --config C.yaml     ->  cli.plan.main       estimate the memory that it takes
secura inspect --config C.yaml  ->  cli.inspect.main    show what it would train on
secura compare RUN...           ->  cli.compare.main    one table over runs
secura configs ls | cp NAME     ->  cli.configs.main    configurations to start from
secura dial --ckpt RUN          ->  cli.dial.main       scale a run's change back to a floor on base knowledge
secura merge --ckpt F --out D   ->  cli.merge.main      write base + change as a Hugging Face folder
secura export --ckpt F --out D  ->  cli.export.main     write the change alone, for peft or for us
secura import --peft D --out E  ->  cli.import_peft.main  start from a change made elsewhere
secura eval --config C.yaml     ->  cli.eval.main       score any model on the configuration's tasks
secura chat --ckpt F            ->  cli.chat.main       talk to the base and the tuned model
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from secura_lightning._version import __version__
from secura_lightning.errors import SecuraError

# command -> (module with main(argv), one line of help)
COMMANDS = {
    "fit": ("secura_lightning.cli.fit", "train a sequence of tasks from a YAML configuration, or resume it"),
    "sweep": ("secura_lightning.cli.sweep", "run many configurations from one file, resumable"),
    "plan": ("secura_lightning.cli.plan", "estimate the memory of a configuration, from the model's config alone"),
    "inspect": ("secura_lightning.cli.inspect", "show the rows, lengths, overlap and plan of a configuration"),
    "compare": ("secura_lightning.cli.compare", "one table over runs: means over seeds, tests, pictures"),
    "configs": ("secura_lightning.cli.configs", "list the shipped configurations, or copy one"),
    "dial": ("secura_lightning.cli.dial", "scale a finished run's change back to a floor on base knowledge"),
    "merge": ("secura_lightning.cli.merge", "write a checkpoint's model as a Hugging Face folder"),
    "export": ("secura_lightning.cli.export", "write a checkpoint's adapter as a PEFT or safetensors folder"),
    "import": ("secura_lightning.cli.import_peft", "start from an existing PEFT LoRA or DoRA"),
    "eval": ("secura_lightning.cli.eval", "score a checkpoint, merged folder or any model on a configuration's tasks"),
    "chat": ("secura_lightning.cli.chat", "talk to the base and the tuned model side by side"),
}

CONFIGURED = ("fit", "sweep", "plan", "inspect", "dial", "eval")
"""Commands whose --config names a YAML file."""

USAGE = """usage: secura [--version] [--help] COMMAND ...

Continual fine-tuning of causal language models without forgetting.

commands:
{commands}

`secura COMMAND --help` lists a command's options. `--debug` after a command shows tracebacks.
"""


def usage() -> str:
    """The help text of the bare command."""
    return USAGE.format(commands="\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 something about the run is wrong, 2 the command line or configuration is wrong,
        130 interrupted, 141 its reader has left (``| head``).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"secura_lightning {__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        print(f"secura: no command '{name}'{hint} (`secura --help` lists them)", file=sys.stderr)
        return 2
    debug = "--debug" in rest
    return run(name, [arg for arg in rest if arg != "--debug"], debug)


def run(name: str, args: list[str], debug: bool = False) -> int:
    """Run command ``name``, turning expected errors into one line."""
    try:
        if name in CONFIGURED:
            from secura_lightning.cli.config_files import check_config_files

            check_config_files(args)
        code = int(importlib.import_module(COMMANDS[name][0]).main(args) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 141  # as of a program that SIGPIPE ended
    except KeyboardInterrupt:
        print(f"\nsecura {name}: interrupted", file=sys.stderr)
        return 130
    except SecuraError as error:
        if debug:
            traceback.print_exc()
        print(f"secura {name}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a folder that cannot be made, a full disk, a file that nobody may read
        if debug:
            traceback.print_exc()
        print(f"secura {name}: {_said(error)}", file=sys.stderr)
        return 1


def _said(error: OSError) -> str:
    """An error of the file system in one line: the path, and what is wrong with it."""
    if error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _reader_left() -> bool:
    """Whether whoever read the output (``| head``) has left; what is still to be printed is then dropped."""
    try:
        os.write(sys.stdout.fileno(), b"\n")  # a flush may have dropped what failed and have nothing left to write
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
