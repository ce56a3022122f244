"""Errors that a user can act on.

The command line prints them as one line, without a traceback unless ``--debug`` is given, and exits with ``exit_code``.
Every message names the YAML key (or the file and line) and the fix.
"""

from __future__ import annotations


class SecuraError(Exception):
    """Something about the run is wrong: data, a checkpoint, a model folder. Exit code 1."""

    exit_code = 1


class ConfigError(SecuraError):
    """The configuration is wrong: an unknown key, a rank above the dimensions, a refused combination. Exit code 2."""

    exit_code = 2
