"""Step time and peak memory of every adapter, side by side with peft and with the direct dense construction.

Run:    OMP_NUM_THREADS=1 python -m benchmarks.adapters --json adapters.json
Quick:  OMP_NUM_THREADS=1 python -m benchmarks.adapters --quick
Some:   OMP_NUM_THREADS=1 python -m benchmarks.adapters --only "our LoRA" "our SECURA element"

A step is forward, backward and AdamW over the trained tensors of a Llama-shaped stack (no embedding, no head, squared
outputs as the loss) on 4 x 512 vectors. All contenders run once in every round, and a ratio is the median of the
rounds' ratios. On a CPU with one thread the time is this process' CPU time, so that other work on the machine hardly
enters. With a CUDA device, the shapes are those of Qwen2-1.5B and Llama-3.1-8B, four layers each, in bf16 and NF4.

Peak memory is what a whole training process needs: base, adapter, optimizer state and the most that torch's allocator
held beside them at any moment of a step (the profiler's allocation events on a CPU, so buffers that oneDNN allocates
for itself are not in it; ``max_memory_allocated`` on a GPU).

SECURA's `element` costs per weight, not per token: the 256 tokens of `--quick` overstate it in time and in memory.

The dense constructions are what one would write first: W0 + norm(C K R) as a tensor in plain autograd.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaModel, PreTrainedModel, Qwen2Config, Qwen2Model

from benchmarks._common import Row, clock, compare, compare_paired, finish, paired, parser, tabulate
from secura_lightning.adapters import (
    AdapterConfig,
    CURLoRAConfig,
    DoRAConfig,
    LoRAConfig,
    LoRANullConfig,
    PiSSAConfig,
    SECURAConfig,
    inject,
)
from secura_lightning.adapters.delta import DeltaConfig, DeltaLayer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
RANK, ALPHA, DROPOUT = 8, 16, 0.05


@dataclass(frozen=True)
class Shape:
    """A stack and what runs through it."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    bias: bool = False
    layers: int = 4
    batch: int = 4
    length: int = 512
    dtype: torch.dtype = torch.float32
    nf4: bool = False

    def build(self, device: str) -> PreTrainedModel:
        """The stack with random weights."""
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": 8,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "use_cache": False,
        }
        with torch.device(device):
            model = Qwen2Model(Qwen2Config(**sizes)) if self.bias else LlamaModel(LlamaConfig(**sizes))
        model = model.to(self.dtype).requires_grad_(False).train()
        if self.nf4:
            _to_nf4(model, self.dtype)
        return model


QUICK = Shape("hidden 256, 2 layers, 2 x 128 tokens, fp32", 256, 704, 4, 4, layers=2, batch=2, length=128)
CPU = Shape("hidden 1024, 4 layers, 4 x 512 tokens, fp32", 1024, 2816, 16, 16)


def gpu_shapes() -> list[Shape]:
    """Qwen2-1.5B and Llama-3.1-8B, each in bf16 and NF4."""
    shapes = []
    for nf4 in (False, True):
        kind: dict[str, Any] = {"dtype": torch.bfloat16, "nf4": nf4}
        what = "NF4" if nf4 else "bf16"
        shapes.append(Shape(f"Qwen2-1.5B shape, 4 layers, 4 x 512 tokens, {what}", 1536, 8960, 12, 2, True, **kind))
        shapes.append(Shape(f"Llama-3.1-8B shape, 4 layers, 4 x 512 tokens, {what}", 4096, 14336, 32, 8, **kind))
    return shapes


def _to_nf4(model: nn.Module, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                packed = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, dtype, quant_type="nf4"
                )
                packed.load_state_dict(child.state_dict())
                setattr(parent, name, packed.to(child.weight.device).requires_grad_(False))


# ------------------------------------------------------------------------------------------------------- contenders

Adapt = Callable[[PreTrainedModel], nn.Module]


def ours(config: AdapterConfig) -> Adapt:
    """This package's adapter."""

    def adapt(model: PreTrainedModel) -> nn.Module:
        for layer in inject(model, config).layers.values():
            layer.calibrated = True  # LoRA-Null on its random basis costs the same
        return model

    return adapt


def peft(targets: list[str], **settings: Any) -> Adapt:
    """peft's adapter."""

    def adapt(model: PreTrainedModel) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        made: nn.Module = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **settings)
        )
        return made

    return adapt


def dense(config: DeltaConfig) -> Adapt:
    """The same function as this package's adapter, by the dense weight in plain autograd."""

    def adapt(model: PreTrainedModel) -> nn.Module:
        for layer in inject(model, config).layers.values():
            assert isinstance(layer, DeltaLayer)
            layer.forward = _DenseForward(layer)  # type: ignore[method-assign]
        return model

    return adapt


class _DenseForward:
    def __init__(self, layer: DeltaLayer) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        base = layer.base.weight.detach()
        left, right = layer.factors()
        delta = left @ right
        if layer.norm.granularity == "row":
            delta = layer.norm.row_scale(delta.square().sum(1), layer.reference_norm).unsqueeze(1) * delta
        elif layer.norm.granularity == "element":
            delta = layer.norm.element_change(base.float(), delta, layer.floor)
        return F.linear(x, base + delta.to(base.dtype), layer.base.bias)


def contenders(shape: Shape) -> dict[str, Adapt]:
    """By name; names of ours begin with ``our``."""
    lora = {"rank": RANK, "alpha": float(ALPHA), "targets": LINEARS}
    found: dict[str, Adapt] = {
        "our LoRA": ours(LoRAConfig(**lora)),
        "peft LoRA": peft(LINEARS),
        "our DoRA": ours(DoRAConfig(**lora)),
        "peft DoRA": peft(LINEARS, use_dora=True),
        "our DoRA, dropout": ours(DoRAConfig(**lora, dropout=DROPOUT)),
        "peft DoRA, dropout": peft(LINEARS, use_dora=True, lora_dropout=DROPOUT),
        "our PiSSA": ours(PiSSAConfig(rank=RANK, targets=LINEARS)),
        "our LoRA-Null v2": ours(LoRANullConfig(rank=RANK, targets=LINEARS)),
        "our CURLoRA": ours(CURLoRAConfig(rank=16, targets=LINEARS)),
        "our SECURA none": ours(SECURAConfig(norm="none", targets=LINEARS)),
        "our SECURA row": ours(SECURAConfig(norm="row", targets=LINEARS)),
        "our SECURA element": ours(SECURAConfig(norm="element", targets=LINEARS)),
        "our LoRA q,v": ours(LoRAConfig(**{**lora, "targets": QV})),
        "our SECURA element q,v": ours(SECURAConfig(norm="element", targets=QV)),
    }
    if not shape.nf4:  # neither starts from, or builds, a packed weight
        found |= {
            "peft PiSSA": peft(LINEARS, init_lora_weights="pissa_niter_4"),
            "dense CURLoRA": dense(CURLoRAConfig(rank=16, targets=LINEARS)),
            "dense SECURA none": dense(SECURAConfig(norm="none", targets=LINEARS)),
            "dense SECURA element": dense(SECURAConfig(norm="element", targets=LINEARS)),
        }
    return found


TIME_TARGETS: list[tuple[str, str, float | None]] = [
    ("our LoRA", "peft LoRA", 1.0),
    ("our DoRA", "peft DoRA", 1.0),
    ("our DoRA, dropout", "peft DoRA, dropout", 0.9),
    ("our PiSSA", "peft PiSSA", None),
    ("our CURLoRA", "our LoRA", 1.1),
    ("our SECURA none", "our LoRA", 1.1),
    ("our SECURA row", "our LoRA", 1.1),
    ("our SECURA element", "our LoRA", 1.4),
    ("our SECURA element q,v", "our LoRA q,v", 1.1),
    ("our LoRA-Null v2", "our LoRA", None),
    ("our CURLoRA", "dense CURLoRA", None),
    ("our SECURA none", "dense SECURA none", None),
    ("our SECURA element", "dense SECURA element", None),
]
MEMORY_TARGETS: list[tuple[str, str, float | None]] = [
    ("our LoRA", "peft LoRA", None),
    ("our DoRA", "peft DoRA", None),
    ("our DoRA, dropout", "peft DoRA, dropout", None),
    ("our CURLoRA", "our LoRA", None),
    ("our SECURA none", "our LoRA", None),
    ("our SECURA row", "our LoRA", None),
    ("our SECURA element", "our LoRA", 1.1),
    ("our SECURA element q,v", "our LoRA q,v", 1.1),
    ("our SECURA element", "dense SECURA element", None),
]


# -------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Contender:
    """A model with an adapter, ready to take training steps."""

    model: nn.Module
    inputs: Tensor
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def __call__(self) -> None:
        """One step: forward, backward, optimizer."""
        output = self.model(inputs_embeds=self.inputs).last_hidden_state
        output.float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def held(self) -> int:
        """Bytes of base, adapter and optimizer state."""
        states = (t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
        tensors = itertools.chain(self.model.parameters(), self.model.buffers(), states)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def peak(self) -> float:
        """Most MiB that training needs at any moment; the optimizer has its state by now."""
        if self.inputs.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self()
            return (self.held() + torch.cuda.max_memory_allocated() - before) / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self()
        return (self.held() + max(_running_bytes(profiler), default=0)) / 2**20


def _running_bytes(profiler: Any) -> Iterator[int]:
    """Bytes allocated since the start of the profile, after every allocation and release."""
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    yield from itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))


def measure(shape: Shape, device: str, rounds: int, only: Sequence[str] = ()) -> list[Row]:
    """Build the contenders of one shape (those of ``only``, or all), measure them, and compare."""
    torch.manual_seed(1)
    inputs = torch.randn(shape.batch, shape.length, shape.hidden, device=device, dtype=shape.dtype)
    chosen = {name: adapt for name, adapt in contenders(shape).items() if not only or name in only}
    built = {name: Contender(adapt(shape.build(device)), inputs) for name, adapt in chosen.items()}
    print(f"{shape.name}: {len(built)} contenders, {rounds} rounds", file=sys.stderr)
    times = paired(built, rounds, measure=clock(device))
    peaks = {name: one.peak() for name, one in built.items()}
    tabulate(times, f"{shape.name}; s a step")
    rows = [
        compare_paired(f"{one}, s a step", times, one, peer, target)
        for one, peer, target in TIME_TARGETS
        if one in times and peer in times
    ]
    rows += [
        compare(f"{one}, peak MiB", peaks[one], peer, peaks[peer], target)
        for one, peer, target in MEMORY_TARGETS
        if one in peaks and peer in peaks
    ]
    return rows


def main() -> None:
    """Measure, print the table, and write it where asked."""
    options = parser(__doc__ or "")
    options.add_argument("--rounds", type=int, help="rounds that count (5; 3 with --quick; 20 on a GPU)")
    options.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="contenders to measure, such as our LoRA"
    )
    chosen = options.parse_args()
    unknown = sorted(set(chosen.only) - set(contenders(QUICK)))
    if unknown:
        options.error(f"--only names {unknown[0]!r}; there are {', '.join(contenders(QUICK))}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen.quick:
        shapes, rounds = [QUICK], 3
    else:
        shapes, rounds = (gpu_shapes(), 20) if device == "cuda" else ([CPU], 5)
    for shape in shapes:
        rows = measure(shape, device, chosen.rounds or rounds, chosen.only)
        path = chosen.json
        if path and len(shapes) > 1:
            path = f"{path.removesuffix('.json')}-{shapes.index(shape)}.json"
        finish(rows, path, f"Training step, {shape.name}")
        print()


if __name__ == "__main__":
    main()
