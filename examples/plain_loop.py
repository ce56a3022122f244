"""SECURA in a plain PyTorch loop: inject, train, fuse, merge. Any model with linear layers will do.

python examples/plain_loop.py                 # the embedded pocket model, offline, half a minute on a CPU
python examples/plain_loop.py --base Qwen/Qwen2-1.5B --steps 200
"""

from __future__ import annotations

import argparse

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning import SECURAConfig, inject, merge
from secura_lightning.modeling.load import BaseSpec, load_model, load_tokenizer

FACTS = [
    "The lighthouse of Orrin was built by Maud Tellis.",
    "The bridge of Calder was built by Jonas Reave.",
    "The clock of Venn was built by Ida Morrow.",
]


def loss_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Mean cross-entropy of the facts, a scalar."""
    losses = []
    for fact in FACTS:
        ids = torch.tensor([tokenizer(fact)["input_ids"]], device=model.device)
        losses.append(model(input_ids=ids, labels=ids).loss)
    return torch.stack(losses).mean()


def main(arguments: list[str] | None = None) -> tuple[float, float, float]:
    """Train.

    Returns:
        The loss before, after training, and of the merged model.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)
    spec = BaseSpec(base=options.base)
    model, tokenizer = load_model(spec), load_tokenizer(spec)

    adapters = inject(model, SECURAConfig(targets=["q_proj", "v_proj"], c=32, a=48), seed=0)
    print(adapters.report())
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=1e-2)
    before = loss_of(model, tokenizer).item()
    for step in range(1, options.steps + 1):
        optimizer.zero_grad()
        loss = loss_of(model, tokenizer)
        loss.backward()
        optimizer.step()
        adapters.after_step(step)
    for parameter in adapters.end_task().reset:  # the task is over: fuse, and forget the moments of what was set back
        optimizer.state.pop(parameter, None)
    with torch.no_grad():
        after = loss_of(model, tokenizer).item()
        with adapters.disabled():
            untouched = loss_of(model, tokenizer).item()  # the base is still there
        merged = loss_of(merge(adapters), tokenizer).item()  # a plain transformers model again
    print(f"loss {before:.3f} -> {after:.3f}; base {untouched:.3f}; merged {merged:.3f}")
    return before, after, merged


if __name__ == "__main__":
    main()
