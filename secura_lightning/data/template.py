"""Prompt templates: text with ``{column}`` fields, as YAML holds them."""

from __future__ import annotations

import string
from collections.abc import Sequence

from secura_lightning.data.read import Record, lookup, suggest, text_of
from secura_lightning.errors import ConfigError


class Template:
    """Text with fields in braces, filled from a record's columns.

    Unlike ``str.format``, a field names a column and nothing else (dots reach into nested values, see
    :func:`~secura_lightning.data.read.lookup`), and no value is ever read as a template. ``{{`` and ``}}`` are braces.

    Args:
        text: The template.
        key: The YAML key that it comes from, for messages.
        known: The fields that exist; None where these are the columns of a file.

    Raises:
        ConfigError: The braces do not match, a field is empty, formatted or unknown.
    """

    def __init__(self, text: str, key: str, known: Sequence[str] | None = None) -> None:
        self.text = text
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"{key}: {error} in {text!r}; write {{{{ or }}}} for a brace") from error
        self._parts = [(literal, field) for literal, field, _, _ in parts]
        for _, field, form, conversion in parts:
            if field is None:
                continue
            if not field or form or conversion:
                raise ConfigError(f"{key}: a field is a column's name in braces, like {{question}}; got {text!r}")
            if known is not None and field not in known:
                raise ConfigError(f"{key}: no field '{field}'{suggest(field, known, 'the fields are')}")

    @property
    def fields(self) -> list[str]:
        """The fields, in order."""
        return [field for _, field in self._parts if field is not None]

    def render(self, record: Record) -> str:
        """The text with every field filled in, white space around the values left out.

        Raises:
            SecuraError: A column is absent, null, or holds no text.
        """
        filled: list[str] = []
        for literal, field in self._parts:
            filled.append(literal)
            if field is not None:
                filled.append(text_of(lookup(record, field), field).strip())
        return "".join(filled)


def prompt_template(text: str, task: str, known: Sequence[str] | None = None) -> Template:
    """The template of a prompt, which must not end in white space (that is the separator's part).

    Args:
        text: The template.
        task: The task's name, for messages.
        known: The fields that exist; None where these are the columns of a file.

    Raises:
        ConfigError: It does, or :class:`Template` refuses it.
    """
    if text != text.rstrip():
        raise ConfigError(
            f"task '{task}': init_args.template ends in white space: {text!r}; put what separates prompt and answer "
            "into init_args.separator"
        )
    return Template(text, f"task '{task}': init_args.template", known)
