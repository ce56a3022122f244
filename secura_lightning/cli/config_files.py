"""``--config`` files, looked at before a command reads them: the parser of ``fit`` takes the last of two equal keys."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from secura_lightning.study.settings import read_yaml


def check_config_files(args: Sequence[str]) -> None:
    """Refuse a configuration file that is no text, no YAML, or holds a key twice.

    A ``--config`` that is no file is left to the command, which says what it wants.

    Args:
        args: A command's arguments.

    Raises:
        ConfigError: One of its files is such a file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", nargs="?", default=[])  # one without a file is no error here
    for file in parser.parse_known_args(args)[0].config:
        if file and os.path.isfile(file):
            read_yaml(Path(file))
