"""An adapter in Hugging Face's Trainer: inject before the Trainer is built, save the adapter alone, load it again.

python examples/hf_trainer.py --out adapter           # the embedded pocket model, offline
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from secura_lightning import LoRAConfig, from_pretrained, inject, save_adapters
from secura_lightning.adapters import AdapterSet
from secura_lightning.modeling.load import BaseSpec, fingerprint, load_model, load_tokenizer

FACTS = [f"The number {word} is called {name}." for word, name in
         (("ten", "a decade"), ("twelve", "a dozen"), ("twenty", "a score"), ("hundred", "a century"))]  # fmt: skip


class Rows(torch.utils.data.Dataset):
    """Texts as rows of the Trainer, every token trained."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
        self.ids = [tokenizer(text)["input_ids"] for text in texts]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(self.ids[i])
        return {"input_ids": ids, "labels": ids}


class AdapterHooks(TrainerCallback):
    """Lets adapters act after every step and at the end, as SECURA's fusion needs; LoRA does nothing there."""

    def __init__(self, adapters: AdapterSet) -> None:
        self.adapters = adapters

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After every optimizer step."""
        self._settle(self.adapters.after_step(state.global_step).reset, kwargs.get("optimizer"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """When the task is over."""
        self._settle(self.adapters.end_task().reset, kwargs.get("optimizer"))

    def _settle(self, reset: list[torch.nn.Parameter], optimizer: Any) -> None:
        for parameter in reset:
            optimizer.state.pop(parameter, None)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Train, save and load.

    Returns:
        The first and the last logged loss.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    options = parser.parse_args(arguments)
    spec = BaseSpec(base=options.base)
    model, tokenizer = load_model(spec), load_tokenizer(spec)
    identity = fingerprint(model)  # before adapters are in

    adapters = inject(model, LoRAConfig(rank=8, targets=["q_proj", "v_proj"]), seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            scratch,
            max_steps=options.steps,
            learning_rate=1e-2,
            per_device_train_batch_size=1,
            logging_steps=1,
            save_strategy="no",  # the adapter is saved below; the Trainer would save the base with it
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        trainer = Trainer(model, settings, train_dataset=Rows(tokenizer, FACTS), callbacks=[AdapterHooks(adapters)])
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    save_adapters(adapters, options.out, spec, identity)
    again, tokenizer, _ = from_pretrained(options.out)
    ids = torch.tensor([tokenizer(FACTS[0])["input_ids"]])
    with torch.no_grad():
        difference = (again(ids).logits - model.cpu().eval()(ids).logits).abs().max().item()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; saved to {options.out}; loaded again: {difference:.1e} apart")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
