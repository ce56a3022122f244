"""Tasks of lm-eval on a model of ours, through its Python API; the extra ``eval`` installs it."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.errors import ConfigError, SecuraError


def require_lm_eval() -> Any:
    """The package.

    Raises:
        SecuraError: It is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise SecuraError(
            f"--lm-eval: lm-eval cannot be imported ({error}): pip install 'secura_lightning[eval]'"
        ) from error
    return lm_eval


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str,
    include: Path | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Score a model on tasks of lm-eval.

    Args:
        model: The model, with adapters or without.
        tokenizer: Its tokenizer.
        tasks: Names, separated by commas.
        include: Folder with task files of one's own.
        limit: Rows of each task.

    Returns:
        ``{task: {metric: value}}``, with metrics named as lm-eval does (``acc,none``).

    Raises:
        ConfigError: There is no such task.
        SecuraError: lm-eval is not installed.
    """
    lm_eval = require_lm_eval()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise SecuraError(f"--lm-eval-include: no folder {include}")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        near = get_close_matches(unknown[0], manager.all_tasks, n=1) if unknown else []
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"--lm-eval: no task '{', '.join(unknown)}'{hint}")
    language_model = HFLM(pretrained=model, tokenizer=tokenizer)
    found = lm_eval.simple_evaluate(
        language_model, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=1000
    )
    plain = (int, float, str)
    return {
        task: {metric: value for metric, value in values.items() if isinstance(value, plain)}
        for task, values in found["results"].items()
    }
