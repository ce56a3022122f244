"""What the commands that write a result share: their parser, output folders that are whole or absent, uploads."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.export.check import PROBE_TEXTS
from secura_lightning.export.hub import check_repo, push
from secura_lightning.modeling.load import BaseSpec


class OneLineOptions(argparse.ArgumentParser):
    """``argparse`` that raises :class:`ConfigError` instead of printing its usage and exiting; no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise ``message`` as the one line that is printed."""
        raise ConfigError(f"{message} (`{self.prog} --help` lists the options)")


def add_checkpoint(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add ``--ckpt`` and ``--weights``."""
    parser.add_argument("--ckpt", type=Path, required=required, help="checkpoint file of a run, or an adapter folder")
    parser.add_argument(
        "--weights",
        choices=("long_term", "working"),
        help="memory of an I-LoRA run (default: the one that was judged)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--out``, ``--push`` and ``--public``."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be empty or absent")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this repository of the hub, too")
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")


def check_output(options: argparse.Namespace) -> None:
    """Refuse a bad ``--out`` or ``--push`` before any work is done.

    Raises:
        SecuraError: The folder is not empty, or a file is in its place.
        ConfigError: The repository's name cannot be one.
    """
    out: Path = options.out
    if out.exists() and not out.is_dir():
        raise SecuraError(f"--out: {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        raise SecuraError(f"--out: folder {out} is not empty")
    check_repo(options.push)
    if options.public and options.push is None:
        raise ConfigError("--public says who may see an upload: give --push OWNER/NAME too")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place at the end, or vanishes on an error: never half a result.

    Raises:
        SecuraError: It cannot be written.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        if out.is_dir():
            out.rmdir()  # it was empty
        os.replace(part, out)
    except OSError as error:
        raise SecuraError(f"--out: cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def upload(options: argparse.Namespace) -> None:
    """Do what ``--push`` says."""
    if options.push is not None:
        print(f"uploaded to {push(options.out, options.push, options.public)}")


def read_texts(path: Path | None) -> Sequence[str]:
    """The texts that logits are compared on: a file's, or the built-in ones.

    Raises:
        SecuraError: The file cannot be read.
    """
    if path is None:
        return PROBE_TEXTS
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise SecuraError(f"--text: cannot read {path}: {error}") from error


def place(model: PreTrainedModel, spec: BaseSpec) -> PreTrainedModel:
    """Move a model to the accelerator where there is one; bitsandbytes places a quantised one itself."""
    if spec.quantization == "none" and torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    return model


def size_of(folder: Path) -> str:
    """Size of a folder's files for people."""
    size = float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
