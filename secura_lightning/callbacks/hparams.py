"""TensorBoard's HPARAMS tab: what tells runs apart, beside the metrics that they are judged by.

TensorBoard takes the tab's columns from one run alone, whichever it meets first. So every run names the same columns,
those that mean something for any adapter and any strategy, and leaves a cell empty where one does not apply. The
metrics are the run's own curves: a run shows as soon as it begins, with the newest values.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger

from secura_lightning.adapters.describe import changed_settings, method_name, rebuild_adapter
from secura_lightning.callbacks.curves import describe
from secura_lightning.callbacks.tensorboard import writers
from secura_lightning.strategies.base import Strategy

# Columns, and whether they stand first: TensorBoard ticks only the first five, and sorts the rest by name.
COLUMNS: dict[str, tuple[type, bool, str]] = {
    "adapter": (str, True, "what is trained"),
    "lr": (float, True, "highest learning rate"),
    "norm": (str, True, "granularity of S-MagNorm"),
    "rank": (float, True, "rank of the change (c of SECURA)"),
    "strategy": (str, True, "what acts against forgetting; SEQ: nothing"),
    "adapter settings": (str, False, "settings of the adapter that are not its defaults"),
    "base": (str, False, "base model"),
    "batch size": (float, False, "rows of a micro-batch"),
    "seed": (float, False, "seed of everything"),
    "split": (str, False, "rows that are scored"),
    "steps": (float, False, "optimizer steps of the whole sequence"),
    "strategy settings": (str, False, "settings of the strategies"),
    "tasks": (str, False, "the sequence"),
    "trained (millions)": (float, False, "trained parameters"),
    "weight decay": (float, False, "the optimizer's weight decay"),
}

METRICS = {
    "continual/AP": "AP",
    "continual/learning_accuracy": "learning accuracy",
    "continual/forgetting": "forgetting",
    "continual/base_retention": "base retention",
    "base/perplexity": "base perplexity",
    "continual/BWT": "BWT",
}
"""Curves whose newest values are the tab's metrics, and what they are called there."""


def columns_of(meta: Mapping[str, Any], group: Mapping[str, Any], strategies: Sequence[Strategy]) -> dict[str, Any]:
    """A run's cells.

    Args:
        meta: The run's description, as ``continual.json`` has it.
        group: The optimizer's first group of parameters.
        strategies: The run's strategies.

    Returns:
        Values by column; None where a column means nothing for the run.
    """
    adapter, data = meta["adapter"], meta["data"]
    config = rebuild_adapter(adapter)
    acting = [type(strategy).__name__ for strategy in strategies if not strategy.serves]
    settings = [f"{type(one).__name__}.{key} {value}" for one in strategies for key, value in one.settings().items()]
    return {
        "adapter": method_name(config),
        "lr": group.get("initial_lr", group["lr"]),
        "norm": adapter.get("norm", "none"),
        "rank": adapter.get("rank", adapter.get("c")),
        "strategy": " + ".join(acting) or "SEQ",
        "adapter settings": changed_settings(config),
        "base": meta["base"]["base"],
        "batch size": data["batch_size"],
        "seed": meta["seed"],
        "split": meta["split"],
        "steps": sum(data["steps_per_task"]),
        "strategy settings": ", ".join(settings),
        "tasks": ", ".join(data["tasks"]),
        "trained (millions)": meta["trainable_parameters"] / 1e6,
        "weight decay": group.get("weight_decay"),
    }


def begin(loggers: Iterable[Logger], cells: Mapping[str, Any]) -> None:
    """Name the tab's columns and metrics, and fill in the run's cells."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    types = {str: api_pb2.DATA_TYPE_STRING, float: api_pb2.DATA_TYPE_FLOAT64}
    experiment = api_pb2.Experiment(time_created_secs=time.time())
    for name, (kind, first, meaning) in COLUMNS.items():
        experiment.hparam_infos.add(name=name, type=types[kind], differs=first, description=meaning)
    for tag, name in METRICS.items():
        experiment.metric_infos.add(name=api_pb2.MetricName(tag=tag), display_name=name, description=describe(tag))
    session = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in cells.items():
        if isinstance(value, str):
            session.hparams[name].string_value = value
        elif value is not None:
            session.hparams[name].number_value = value
    _write(loggers, metadata.EXPERIMENT_TAG, experiment=experiment)
    _write(loggers, metadata.SESSION_START_INFO_TAG, session_start_info=session)


def end(loggers: Iterable[Logger]) -> None:
    """Mark the run as finished."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    session = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    _write(loggers, metadata.SESSION_END_INFO_TAG, session_end_info=session)


def _write(loggers: Iterable[Logger], tag: str, **content: Any) -> None:
    """What tensorboard.plugins.hparams.summary writes, which needs TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    data = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    summary = Summary(value=[Summary.Value(tag=tag, metadata=data, tensor=metadata.NULL_TENSOR)])
    for writer in writers(loggers):
        writer._get_file_writer().add_summary(summary)
