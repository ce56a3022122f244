"""Initialisation of every adapter on all linear modules of one Llama-3.1-8B block (hidden 4096, inner 14336).

Run:    OMP_NUM_THREADS=1 python -m benchmarks.init --json init.json
Quick:  OMP_NUM_THREADS=1 python -m benchmarks.init --quick

* SECURA and CURLoRA against one pass over the weights: the norms of all their rows, nothing else. They need the norms
  of the columns too, and gather the chosen columns, a cache line for each number.
* PiSSA against ``torch.linalg.svd`` of the same weights. A full SVD of one weight of each shape is timed once and
  counted as often as the block has that shape; the shapes' sum is the peer.
* LoRA-Null's statistics against plain forward passes of the same model over the same sequences. Beside the block's own
  218M multiplications a token, G = sum x x^T of its four inputs takes 256M, of which symmetry leaves 128M; in fp64 each
  costs a CPU two of fp32. So arithmetic alone makes 2.2 passes of it, and would make 1.6 in fp32: the target of 1.3 is
  below what any sum over all tokens takes.

On a CPU with one thread the time is this process' CPU time; contenders run in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from benchmarks._common import Row, Spread, clock, compare_paired, finish, paired, parser, tabulate
from secura_lightning.adapters import AdapterConfig, CURLoRAConfig, LoRAConfig, MiLoRAConfig, PiSSAConfig, SECURAConfig
from secura_lightning.adapters.numerics import module_generator
from secura_lightning.modeling.gram import stream_grams

RANK = 16


def block_model(hidden: int, inner: int, heads: int, kv_heads: int, device: str) -> PreTrainedModel:
    """A Llama of one block without a head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        use_cache=False,
    )
    with torch.device(device):
        return LlamaModel(config).requires_grad_(False).eval()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The block's linear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def build_all(config: AdapterConfig, layers: dict[str, nn.Linear]) -> Callable[[], None]:
    """Build an adapter on every layer and let it go."""

    def build() -> None:
        for name, layer in layers.items():
            config.build(name, layer, module_generator(0, name))

    return build


def one_pass(layers: dict[str, nn.Linear]) -> Callable[[], list[Tensor]]:
    """Read every weight once."""
    return lambda: [torch.linalg.vector_norm(layer.weight, dim=1) for layer in layers.values()]


def full_svd(layers: dict[str, nn.Linear], measure: Callable[[Callable[[], object]], float]) -> Spread:
    """Seconds of a full SVD of all layers, from one of each shape (a weight and its transpose count as one)."""
    shapes = Counter(tuple(sorted(layer.weight.shape)) for layer in layers.values())
    weights = {tuple(sorted(layer.weight.shape)): layer.weight.detach() for layer in layers.values()}
    total = 0.0
    for shape, count in shapes.items():
        total += count * measure(lambda w=weights[shape]: torch.linalg.svd(w, full_matrices=False))  # type: ignore[misc]
    return Spread.of([total])


def statistics(
    model: PreTrainedModel, layers: dict[str, nn.Linear], batch: int, length: int
) -> dict[str, Callable[[], object]]:
    """LoRA-Null's statistics over one batch, and the plain forward pass over it."""
    ids = torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(0))
    sequences, on_device = ids.tolist(), ids.to(next(model.parameters()).device)

    @torch.no_grad()
    def measure() -> None:
        stream_grams(model, dict(layers), sequences, lambda *_: None, batch_size=batch)

    @torch.no_grad()
    def forward() -> Tensor:
        hidden: Tensor = model(input_ids=on_device).last_hidden_state
        return hidden

    return {"LoRA-Null statistics": measure, "plain forward": forward}


def measure_all(sizes: tuple[int, int, int, int], batch: int, length: int, rounds: int, device: str) -> list[Row]:
    """All comparisons on one block."""
    model, measure = block_model(*sizes, device), clock(device)
    layers = linears(model)
    targets = {"targets": list(layers)}
    quick = {
        "one pass": one_pass(layers),
        "LoRA": build_all(LoRAConfig(rank=RANK, **targets), layers),
        "CURLoRA": build_all(CURLoRAConfig(rank=RANK, **targets), layers),
        "SECURA none": build_all(SECURAConfig(norm="none", **targets), layers),
        "SECURA row": build_all(SECURAConfig(norm="row", **targets), layers),
        "SECURA element": build_all(SECURAConfig(norm="element", **targets), layers),
    }
    times = paired(quick, rounds, measure=measure)
    times |= paired({"PiSSA randomized": build_all(PiSSAConfig(rank=RANK, **targets), layers)}, 1, 0, measure)
    times |= paired(statistics(model, layers, batch, length), min(rounds, 2), 1, measure)
    times["full SVD"] = full_svd(layers, measure)
    times |= paired({"MiLoRA": build_all(MiLoRAConfig(rank=RANK, **targets), layers)}, 1, 0, measure)
    tabulate(times, "s for the block")
    rows = [compare_paired("LoRA, s", times, "LoRA", "one pass")]
    for name in ("CURLoRA", "SECURA none", "SECURA row", "SECURA element"):
        rows.append(compare_paired(f"{name}, s", times, name, "one pass", 2.0))
    rows.append(compare_paired("PiSSA randomized, s", times, "PiSSA randomized", "full SVD", 1 / 8))
    rows.append(compare_paired("MiLoRA, s", times, "MiLoRA", "full SVD"))
    rows.append(compare_paired("LoRA-Null statistics, s", times, "LoRA-Null statistics", "plain forward", 1.3))
    return rows


def main() -> None:
    """Measure, print the table, and write it where asked."""
    options = parser(__doc__ or "").parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, batch, length = ((512, 1792, 8, 2), 2, 256) if options.quick else ((4096, 14336, 32, 8), 4, 512)
    rows = measure_all(sizes, batch, length, 3 if options.quick else 5, device)
    finish(rows, options.json, f"Initialisation of one block, hidden {sizes[0]}, inner {sizes[1]}, fp32")


if __name__ == "__main__":
    main()
