"""The unit of data that every task, metric and evaluation speaks: one prompt with its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One example, already rendered to text.

    The model reads ``prompt`` and is trained (and scored) on ``answer``. Neither carries the white space between them:
    the encoder joins them with the task's ``separator``.

    Attributes:
        id: Unique within the task, stable over runs; predictions and overlap checks refer to it.
        prompt: The full text before the answer, without trailing white space.
        answer: The reference answer, never empty. For multiple choice it is one of ``choices``.
        choices: The candidate answers of a multiple-choice row, in order; empty for free answers.
        kind: The group that a row is scored in (kinds of facts in a probe); empty where there is only one.
        aliases: Other answers that are just as right; none for multiple choice.
    """

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    kind: str = ""
    aliases: tuple[str, ...] = ()
