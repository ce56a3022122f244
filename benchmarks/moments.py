"""What a smaller form of LoRA-Null's second moments costs in leakage, on a real model and real text.

Run:    OMP_NUM_THREADS=1 python -m benchmarks.moments --model DIR --rank 8 --rows gsm8k/test.jsonl

LoRA-Null over a sequence keeps G = G_0 + G_1 + ... of every input. Here G_0 is that of 64 samples of the model, rounded
or truncated to each form, and G_1 that of 64 rows of a file, added in fp64. A form's leakage is ||X P|| / ||X|| of its
basis P, over both texts; its ratio is against the basis of the exact sum, over all inputs of the model's linear layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from secura_lightning.modeling.gram import stream_grams
from secura_lightning.modeling.sample import sample

NUMBER, LENGTH = 64, 100

Form = Callable[[Tensor, Tensor, int], Tensor]
"""(G_0, G_1, rank) -> P [in, rank]."""


def bottom(gram: Tensor, rank: int) -> Tensor:
    """The ``rank`` eigenvectors of smallest eigenvalue."""
    return torch.linalg.eigh(gram).eigenvectors[:, :rank]


def rounded(dtype: torch.dtype) -> Form:
    """G_0 kept in ``dtype``."""
    return lambda kept, new, rank: bottom(kept.to(dtype).double() + new, rank)


def pooled(share: int) -> Form:
    """Both restricted to the in/share emptiest directions of G_0."""

    def form(kept: Tensor, new: Tensor, rank: int) -> Tensor:
        pool = bottom(kept, len(kept) // share)
        return pool @ bottom(pool.t() @ (kept + new) @ pool, rank)

    return form


def top_and_diagonal(share: int) -> Form:
    """The in/share largest eigenpairs of G_0, and the diagonal of the rest."""

    def form(kept: Tensor, new: Tensor, rank: int) -> Tensor:
        values, vectors = torch.linalg.eigh(kept)
        top, size = vectors[:, -(len(kept) // share) :], values[-(len(kept) // share) :]
        low = (top * size) @ top.t()
        return bottom(low + (kept - low).diagonal().diag() + new, rank)

    return form


FORMS: dict[str, Form] = {
    "fp32": rounded(torch.float32),
    "bf16": rounded(torch.bfloat16),
    "pool of in/2": pooled(2),
    "pool of in/4": pooled(4),
    "top in/2 and diagonal": top_and_diagonal(2),
    "top in/4 and diagonal": top_and_diagonal(4),
}


def moments(model: PreTrainedModel, sequences: list[list[int]]) -> dict[str, Tensor]:
    """G divided by its trace, by the first layer that reads the input."""
    layers: dict[str, nn.Module] = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    }
    found: dict[str, Tensor] = {}

    def take(names: list[str], gram: Tensor) -> None:
        found[names[0]] = gram / gram.trace()

    stream_grams(model, layers, sequences, take)
    return found


def leakage(gram: Tensor, basis: Tensor) -> float:
    """||X P|| / ||X||."""
    return float(((basis * (gram @ basis)).sum() / gram.trace()).clamp_min(0).sqrt())


@torch.no_grad()
def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--rank", type=int, default=16, help="of the basis")
    parser.add_argument("--rows", required=True, type=Path, help="JSONL file: the text of a second task")
    chosen = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    rows = [json.loads(line) for line in chosen.rows.read_text(encoding="utf-8").splitlines()[:NUMBER]]
    texts = [" ".join(map(str, row.values())) for row in rows]
    base = moments(model, sample(model, tokenizer, NUMBER, LENGTH, seed=1))
    task = moments(model, [tokenizer(text)["input_ids"][:LENGTH] for text in texts])
    exact: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in FORMS}
    for name, kept in base.items():
        total = kept + task[name]
        exact.append(leakage(total, bottom(total, chosen.rank)))
        for form, basis in FORMS.items():
            ratios[form].append(leakage(total, basis(kept, task[name], chosen.rank)) / exact[-1])
    print(f"leakage of the exact sum: median {statistics.median(exact):.4f}, {min(exact):.4f} to {max(exact):.4f}")
    for form, values in ratios.items():
        print(f"{form:<22} median {statistics.median(values):.4f}, at most {max(values):.4f}")


if __name__ == "__main__":
    main()
