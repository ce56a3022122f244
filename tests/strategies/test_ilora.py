"""I-LoRA: a long-term memory that really follows, holds the working one back, and is what the run is judged by."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from secura_lightning.adapters import AdapterConfig, CURLoRAConfig, LoRAConfig, SECURAConfig, inject
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.strategies.er import ER
from secura_lightning.strategies.ilora import ILoRA, take_weights
from secura_lightning.strategies.memory import Memory
from tests.adapters.toy import IDS, VARIANTS, ToyModel, adapted, move
from tests.strategies.tiny import fit, tensors

pytestmark = pytest.mark.filterwarnings("ignore:LoRA-Null trains on a random basis")
CLOSED_FORM: dict[str, AdapterConfig] = {
    "lora": LoRAConfig(),
    "curlora": CURLoRAConfig(),
    "secura": SECURAConfig(),
    "secura-fused-every-2": SECURAConfig(fusion_every=2),
    "secura-base-row": SECURAConfig(fusion="base", norm="row"),
    "secura-base-element": SECURAConfig(fusion="base", norm="element"),
}


def anchors(adapters: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in adapters.anchors().items()}


@pytest.mark.parametrize("config", CLOSED_FORM.values(), ids=CLOSED_FORM.keys())
def test_memory_moves_and_follows_the_closed_form(config: AdapterConfig) -> None:
    """d^k theta_0 + (1 - d) sum_j d^(k - j) theta_j, through fusions."""
    _, adapters = adapted(config, torch.float64)
    memory, decay = Memory(adapters), 0.9
    start = anchors(adapters)
    states = []
    for step in range(1, 6):
        move(adapters, size=0.1, seed=step)
        memory.follow(decay)
        states.append(anchors(adapters))
        adapters.after_step(step)
        if step == 3:
            adapters.end_task()
    for name, value in memory.values.items():
        expected = decay**5 * start[name]
        for j, state in enumerate(states, start=1):
            expected = expected + (1 - decay) * decay ** (5 - j) * state[name]
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        assert not torch.equal(value, start[name])
        assert not torch.allclose(value, states[-1][name])


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_model_answers_with_the_memory_and_then_with_its_own_tensors(config: AdapterConfig) -> None:
    model, adapters = adapted(config, torch.float64)
    old = model(IDS)
    memory = Memory(adapters)
    move(adapters, seed=8)
    own, state = model(IDS), copy.deepcopy(adapters.state_dict())
    assert not torch.allclose(own, old)
    with memory.active():
        torch.testing.assert_close(model(IDS), old)
    assert torch.equal(model(IDS), own)
    assert all(torch.equal(value, state[name]) for name, value in adapters.state_dict().items())
    assert 0 < float(memory.distance()) < 10
    memory.write()
    torch.testing.assert_close(model(IDS), old)
    twin = ToyModel().to(torch.float64)
    inject(twin, config, seed=5).load_state_dict(adapters.state_dict())
    torch.testing.assert_close(twin(IDS), old)


class Judged(Callback):
    """Keeps what an evaluation sees: the model's answers within ``evaluating``, and the long-term memory."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Any) -> None:
        ilora = next(callback for callback in trainer.callbacks if isinstance(callback, ILoRA))
        ids, model = torch.arange(3, 12).unsqueeze(0), pl_module.model
        with torch.no_grad():
            with ilora.evaluating(pl_module):
                judged = model(input_ids=ids).logits
            with ilora.memory.active():
                slow = model(input_ids=ids).logits
            self.seen.append((judged, slow, model(input_ids=ids).logits))


def long_term(trainer: Trainer) -> dict[str, Tensor]:
    ilora = next(callback for callback in trainer.callbacks if isinstance(callback, ILoRA))
    assert ilora.memory is not None
    return ilora.memory.values


SHORT: dict[str, Any] = {"data": {"steps_per_task": [3, 2]}}


def test_run_is_judged_by_the_memory_that_the_settings_name(tmp_path: Path) -> None:
    for evaluate_with in ("long_term", "working"):
        judge = Judged()
        fit(tmp_path, [ILoRA(decay=0.5, evaluate_with=evaluate_with), judge], **SHORT)  # type: ignore[arg-type]
        for judged, slow, fast in judge.seen:
            assert torch.equal(judged, slow if evaluate_with == "long_term" else fast)
            assert not torch.equal(slow, fast)


def test_memory_of_a_run_is_the_average_of_its_steps(tmp_path: Path) -> None:
    class Steps(Callback):
        kept: list[dict[str, Tensor]] = []  # noqa: RUF012

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.kept.append(tensors(trainer))

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.kept.append(tensors(trainer))

    steps = Steps()
    trainer = fit(tmp_path, [ILoRA(decay=0.8), steps], **SHORT)
    for name, value in long_term(trainer).items():
        expected = steps.kept[0][name]
        for state in steps.kept[1:]:
            expected = 0.8 * expected + 0.2 * state[name]
        torch.testing.assert_close(value, expected)


def test_warmup_forgets_the_start_at_once() -> None:
    assert [min(k / (k + 1), 0.6) for k in range(4)] == [0, 0.5, 0.6, 0.6]
    ilora = ILoRA(decay=0.6, warmup=True)
    _, adapters = adapted(LoRAConfig())
    ilora.memory = Memory(adapters)
    move(adapters, seed=5)
    trainer: Any = type("T", (), {"accumulate_grad_batches": 1, "log_every_n_steps": 0, "global_step": 1})
    ilora.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    assert all(torch.equal(value, adapters.anchors()[name]) for name, value in ilora.memory.values.items())
    assert ilora.steps == 1


@pytest.mark.slow
def test_consistency_holds_the_working_memory_back(tmp_path: Path) -> None:
    def moved(consistency: float, **settings: Any) -> tuple[float, dict[str, Tensor]]:
        trainer = fit(
            tmp_path, [ILoRA(decay=0.99, consistency=consistency, **settings)], data={"steps_per_task": [3, 4]}
        )
        ilora = next(callback for callback in trainer.callbacks if isinstance(callback, ILoRA))
        assert ilora.memory is not None
        return float(ilora.memory.distance()), tensors(trainer)

    free, without = moved(0.0)
    er = tensors(fit(tmp_path, [ER()], data={"steps_per_task": [3, 4]}))
    # The same replay but for the seed of its draws, which goes by the strategy's name.
    assert er.keys() == without.keys()
    assert moved(1e3)[0] < free
    for layers in ("all", "logits"):
        assert moved(1e3, layers=layers)[0] < free


def test_take_weights_moves_adapters_to_the_memory_that_was_judged() -> None:
    model, adapters = adapted(LoRAConfig())
    slow, memory = model(IDS), Memory(adapters)
    move(adapters, seed=8)
    fast = model(IDS)
    checkpoint = {
        "callbacks": {"ILoRA": {"long_term": memory.values}},
        "strategies": {"ILoRA": {"evaluate_with": "working"}},
    }
    take_weights(adapters, checkpoint)
    assert torch.equal(model(IDS), fast)
    take_weights(adapters, checkpoint, "long_term")
    torch.testing.assert_close(model(IDS), slow)
    move(adapters, seed=9)
    checkpoint["strategies"]["ILoRA"]["evaluate_with"] = "long_term"  # type: ignore[assignment]
    take_weights(adapters, checkpoint)
    torch.testing.assert_close(model(IDS), slow)
    take_weights(adapters, {"callbacks": {}})
    with pytest.raises(SecuraError, match="--weights long_term: the run had no ILoRA"):
        take_weights(adapters, {"callbacks": {}}, "long_term")


@pytest.mark.slow
def test_works_on_a_4_bit_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = fit(
        tmp_path, [ILoRA()], model={"base": "pocket", "quantization": "nf4", "compute_dtype": "float32"}, **SHORT
    )
    assert all(torch.isfinite(value).all() for value in tensors(trainer).values())
    assert long_term(trainer).keys() == tensors(trainer).keys()


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": -0.1}, {"consistency": -1.0}])
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.callbacks\.ILoRA\.{next(iter(settings))}"):
        ILoRA(**settings)
