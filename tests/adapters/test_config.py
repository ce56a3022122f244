"""The command line finds every adapter by its class name, with help for each setting."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from secura_lightning.adapters import AdapterConfig, LoRAConfig
from secura_lightning.adapters.describe import summarize_adapter
from tests.adapters.toy import all_config_classes


class Holder:
    """Stands for whatever takes an adapter."""

    def __init__(self, adapter: AdapterConfig) -> None:
        self.adapter = adapter


def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(Holder, "model")
    return made


every_class = pytest.mark.parametrize("cls", all_config_classes(), ids=lambda c: c.__name__)


@every_class
def test_every_setting_is_checked_by_its_type(cls: type[AdapterConfig]) -> None:
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(cls, "adapter")
    assert "Unvalidated" not in made.format_help()


@every_class
def test_yaml_names_the_class_alone(cls: type[AdapterConfig]) -> None:
    entry = {"class_path": cls.__name__, "init_args": {"targets": ["q_proj", "v_proj"], "exclude": r"layers\.0"}}
    made = parser()
    adapter = made.instantiate(made.parse_object({"model": {"adapter": entry}})).model.adapter
    assert adapter == cls(targets=["q_proj", "v_proj"], exclude=r"layers\.0")  # type: ignore[call-arg]


@every_class
def test_unknown_setting_is_refused(cls: type[AdapterConfig]) -> None:
    with pytest.raises(ArgumentError, match="rnak"):
        parser().parse_args([f"--model.adapter={cls.__name__}", "--model.adapter.rnak=3"])


@every_class
def test_every_setting_has_a_docstring_and_a_default(cls: type[AdapterConfig]) -> None:
    documented: set[str] = set()
    for parent in cls.__mro__:
        if not dataclasses.is_dataclass(parent):
            continue
        body = ast.parse(inspect.getsource(parent)).body[0].body  # type: ignore[attr-defined]
        for node, following in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
                documented.add(node.target.id)  # type: ignore[union-attr]
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    assert {field.name for field in fields} <= documented
    assert all(field.default is not dataclasses.MISSING for field in fields)


def test_the_summary_names_what_was_changed_and_counts_what_is_long() -> None:
    sizes = {f"layers.{i}.q_proj": {"rank": 4} for i in range(3)}
    assert summarize_adapter(LoRAConfig()) == "LoRA"
    assert summarize_adapter(LoRAConfig(norm="row", per_target={"q": {"rank": 4}})) == (
        "LoRA (per_target {'q': {'rank': 4}}, norm row)"
    )
    assert summarize_adapter(LoRAConfig(per_target=sizes)) == "LoRA (per_target of 3 names)"
