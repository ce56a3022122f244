"""``README.md`` of what is written: a model card with the run's settings and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from secura_lightning._version import __version__
from secura_lightning.modeling.load import POCKET, BaseSpec

MERGED_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""

PEFT_USE = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "FOLDER")"""

NATIVE_USE = """from secura_lightning import from_pretrained

model, tokenizer, adapters = from_pretrained("FOLDER")"""


def write_card(
    title: str,
    spec: BaseSpec,
    library: str,
    use: str,
    notes: Sequence[str],
    settings: Mapping[str, Any],
    results: str | None,
    training: Mapping[str, Any] | None = None,
) -> str:
    """The text of a card.

    Args:
        title: First heading.
        spec: The base that was trained on.
        library: ``transformers``, ``peft`` or ``secura_lightning``.
        use: Python lines that load it.
        notes: What was done, a sentence each.
        settings: Adapter settings by name.
        results: The run's table; None where nothing is known.
        training: What is known of the run's configuration.
    """
    head: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if spec.base != POCKET and spec.base.count("/") <= 1 and not spec.base.startswith((".", "/", "~")):
        head["base_model"] = spec.base  # a hub id; a local folder means nothing to others
    head["tags"] = ["secura_lightning", "continual-learning", str(settings.get("class", "adapter"))]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {title}\n",
        "\n".join(f"- {note}" for note in notes) + "\n",
        f"```python\n{use}\n```\n",
        "## Adapter\n\n" + _table(settings),
        "## Base\n\n" + _table({"base": spec.base, **_told(spec)}),
    ]
    if results is not None:
        parts.append(
            f"## Results of the run\n\nScores after each task; the first line is the base.\n\n```\n{results}\n```\n"
        )
    if training is not None:
        text = yaml.safe_dump(_present(training), sort_keys=False)
        parts.append(f"## Training\n\nFrom the run's configuration:\n\n```yaml\n{text}```\n")
    parts.append(f"Written by secura_lightning {__version__}.\n")
    return "\n".join(parts)


def _present(value: Any) -> Any:
    """Without nulls."""
    if isinstance(value, Mapping):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def _told(spec: BaseSpec) -> dict[str, Any]:
    kept = {key: value for key, value in spec.identity().items() if key != "base"}
    if spec.quantization == "none":
        kept = {key: value for key, value in kept.items() if key not in ("double_quant", "compute_dtype")}
    return {key: value for key, value in kept.items() if value is not None}


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items() if value is not None]
    return "\n".join(["| setting | value |", "|---|---|", *rows]) + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
