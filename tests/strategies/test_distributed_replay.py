"""Two real processes: every rank has a shard and draws of its own; what is trained, and its average, is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from secura_lightning.strategies.ilora import ILoRA
from tests.distributed.conftest import finished, run_jobs, write
from tests.integration.test_resume import assert_same

pytestmark = pytest.mark.slow
STEPS = [3, 3, 2]


class SameOnAllRanks(Callback):
    """Fails where ranks hold other adapters, or another long-term memory, than rank 0."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = [value.clone() for value in pl_module.state_dict().values()]
        for callback in trainer.callbacks:
            if isinstance(callback, ILoRA):
                found += [value.clone() for value in callback.memory.values.values()]
        mine = torch.cat([value.flatten().double() for value in found])
        first = mine.clone()
        dist.broadcast(first, 0)
        assert trainer.world_size == 2
        assert torch.equal(mine, first)


def changes(*strategies: dict[str, Any]) -> dict[str, Any]:
    same = {"class_path": f"{__name__}.SameOnAllRanks"}
    return {
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
        "trainer.accumulate_grad_batches": 2,
        "trainer.callbacks": [*strategies, same],
        "data.batch_size": 2,
        "data.steps_per_task": STEPS,
        "data.probe": None,
        "forgetting.limit": 2,
    }


def listed(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


def ranks(checkpoint: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return checkpoint["callbacks"][name]["ranks"]


def test_two_processes_replay_from_shards_of_their_own_and_stay_one_model(tmp_path: Path) -> None:
    runs = {
        "er": changes(listed("ReplayBuffer", capacity=20), listed("ER")),
        "ilora": changes(listed("ReplayBuffer", capacity=20), listed("ILoRA", decay=0.8)),
        "all": changes(listed("DERPP", top_k=4), listed("LwF", tokens="all"), listed("AGEM", reference_rows=3)),
    }
    lines = [write(tmp_path, name, settings) for name, settings in runs.items()]
    after_two = tmp_path / "runs" / "ilora" / "version_0" / "checkpoints" / "task2-second.ckpt"
    again = [*write(tmp_path, "again", runs["ilora"]), "--ckpt_path", str(after_two)]
    run_jobs(tmp_path, [*lines, again])

    for name in runs:
        checkpoint = finished(tmp_path, name).checkpoint
        one, other = ranks(checkpoint, "ReplayBuffer")
        rows, others = ({tuple(row) for row in shard["table"][:, 1:3].tolist()} for shard in (one, other))
        assert rows
        assert others
        assert not rows & others
        assert not torch.equal(one["generator"], other["generator"])
        drawing = "AGEM" if name == "all" else {"er": "ER", "ilora": "ILoRA"}[name]
        draws = ranks(checkpoint, drawing)
        assert not torch.equal(draws[0]["generator"], draws[1]["generator"])
        assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    whole, resumed = finished(tmp_path, "ilora").checkpoint, finished(tmp_path, "again").checkpoint
    for part in ("state_dict", "rng"):
        assert_same(resumed[part], whole[part], part)
    for name in ("ReplayBuffer", "ILoRA"):
        assert_same(resumed["callbacks"][name], whole["callbacks"][name], name)
