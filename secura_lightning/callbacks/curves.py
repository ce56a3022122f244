"""Every curve that a run can log: its unit and its meaning, in one place.

``docs/tensorboard.md`` lists all of them. Tests hold that runs log no curve that is missing here, and that the page
says the same.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple


class Curve(NamedTuple):
    """What a curve shows."""

    unit: str
    meaning: str


CURVES = {
    "task/*": Curve("0 to 1", "the task's own metric on its scored rows, before the first task and after each"),
    "base/*": Curve("0 to 1", "accuracy on one kind of the base-knowledge probe's questions"),
    "base/accuracy": Curve("0 to 1", "accuracy on all of the probe's questions"),
    "base/perplexity": Curve("1 or more", "perplexity of the probe's texts, weighted by tokens; low is good"),
    "continual/AP": Curve("0 to 1", "average performance: mean score of the tasks learned so far"),
    "continual/AIA": Curve("0 to 1", "average incremental accuracy: mean of AP after each task"),
    "continual/BWT": Curve("-1 to 1", "backward transfer: mean change of earlier tasks since each was learned"),
    "continual/BWT_trace": Curve("-1 to 1", "the same sum divided by all tasks, as TRACE does"),
    "continual/forgetting": Curve("-1 to 1", "mean loss of earlier tasks against their best score; low is good"),
    "continual/FWT": Curve("-1 to 1", "forward transfer: mean gain on a task before it is trained, over the base"),
    "continual/learning_accuracy": Curve("0 to 1", "mean score of each task right after it was learned"),
    "continual/base_retention": Curve("0 to 1", "mean over kinds of min(1, accuracy now / accuracy of the base)"),
    "continual/base_delta": Curve("-1 to 1", "mean over kinds of accuracy now - accuracy of the base"),
    "train/loss": Curve("nats", "cross-entropy of the fresh rows' answer tokens"),
    "train/replay_loss": Curve("nats", "the same on the replayed rows, from the second task on"),
    "train/lr": Curve("", "learning rate; every task restarts the schedule"),
    "train/task": Curve("1 to T", "number of the task that is being trained"),
    "train/padding_efficiency": Curve("0 to 1", "share of the batch that is text and not padding"),
    "train/skipped_steps": Curve("steps", "steps left out so far because a gradient was not finite"),
    "throughput/tokens_per_second": Curve("1/s", "tokens trained on, replayed ones too, evaluations left out"),
    "throughput/mfu": Curve("0 to 1", "share of the GPU's peak operations that the model's own take"),
    "throughput/peak_memory_gb": Curve("GiB", "most GPU memory held so far"),
    "telemetry/relative_change/q10": Curve("ratio", "||dW|| / ||W0||: a tenth of the modules moved less"),
    "telemetry/relative_change/median": Curve("ratio", "||dW|| / ||W0||: half of the modules moved less"),
    "telemetry/relative_change/q90": Curve("ratio", "||dW|| / ||W0||: nine tenths of the modules moved less"),
    "telemetry/relative_change/max": Curve("ratio", "||dW|| / ||W0|| of the module that moved most"),
    "telemetry/restraint": Curve("1 or more", "mean divisor M of S-MagNorm; 1: nothing is limited"),
    "telemetry/null_leakage": Curve("0 to 1", "LoRA-Null: share of the calibration inputs that the basis lets through"),
    "telemetry/frozen_truncation": Curve("ratio", "LoRA-Null sequence: share that frozen_rank cuts off"),
    "telemetry/row_ratio": Curve("ratio", "SECURA at a fusion: mean relative change of the rows before the norm"),
    "telemetry/moved_rows": Curve("0 to 1", "SECURA at a fusion: share of the rows above the restraint's edge"),
    "telemetry/restrained_rows": Curve("0 to 1", "SECURA at a fusion: share of the rows that the restraint shrank"),
    "telemetry/slow_fast_distance": Curve("ratio", "I-LoRA: ||working - long-term|| / ||working||"),
    "ewc/penalty": Curve("nats", "EWC's penalty on what moved"),
    "ewc/share": Curve("0 to 1", "its gradient's share of the norms of both gradients"),
    "l2sp/penalty": Curve("nats", "L2-SP's penalty on what moved"),
    "l2sp/share": Curve("0 to 1", "its gradient's share of the norms of both gradients"),
    "lwf/distillation": Curve("nats", "LwF: divergence from the adapter as the task began"),
    "derpp/logits": Curve("", "DER++: mean squared distance of replayed answers' logits from their old ones"),
    "ilora/consistency": Curve("", "I-LoRA: mean squared distance of both memories' hidden states"),
    "agem/cosine": Curve("-1 to 1", "A-GEM: cosine of the step's gradient and that of past rows"),
    "agem/projected": Curve("0 or 1", "A-GEM: 1 where the gradient was projected, the cosine being negative"),
    "guard/retention": Curve("0 to 1", "RetentionGuard: retention as it watches it, on its own questions"),
    "guard/floor": Curve("0 to 1", "RetentionGuard: the floor that retention is held to"),
    "guard/scale": Curve("0 to 1", "RetentionGuard: share of the task's change that was kept"),
    "guard/steps": Curve("steps", "RetentionGuard: optimizer steps of the task that were kept"),
}


def curve(tag: str) -> Curve | None:
    """What a curve shows; the entry of just this name, else the pattern that it fits, else None."""
    found = CURVES.get(tag)
    return found or next((CURVES[pattern] for pattern in CURVES if fnmatchcase(tag, pattern)), None)


def describe(tag: str) -> str:
    """One line on a curve; empty for one that is not ours."""
    found = curve(tag)
    if found is None:
        return ""
    return f"{found.meaning} ({found.unit})" if found.unit else found.meaning
