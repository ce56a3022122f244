"""The Fisher information of one backward is that of a loop over single sequences, for every adapter."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters import AdapterConfig, AdapterSet, FullConfig, LoRAConfig, SECURAConfig, inject
from secura_lightning.data.encode import Encoded
from secura_lightning.errors import SecuraError
from secura_lightning.strategies.fisher import SquaredGradients, empirical_fisher
from tests.adapters.toy import IDS, VARIANTS, VOCABULARY, WIDTH, ToyModel, adapted, move

pytestmark = pytest.mark.filterwarnings("ignore:LoRA-Null trains on a random basis")

CASES: dict[str, AdapterConfig] = {
    **{name: config for name, config in VARIANTS.items() if not name.startswith("LoRANullSequence")},
    **{f"SECURA-base-{norm}": SECURAConfig(norm=norm, fusion="base") for norm in ("none", "row")},
    "SECURA-unfused": SECURAConfig(fusion="none"),
    "Full-everything": FullConfig(targets="everything"),
}
TARGETS = torch.randint(0, VOCABULARY, IDS.shape, generator=torch.Generator().manual_seed(6))


def loss_of(model: nn.Module, rows: slice) -> Tensor:
    return F.cross_entropy(model(IDS[rows]).flatten(0, 1), TARGETS[rows].flatten(), reduction="sum")


def looped(model: nn.Module, adapters: AdapterSet) -> dict[str, Tensor]:
    """Plain autograd: one backward of the whole model for each sequence, by the anchors."""
    totals = {name: torch.zeros_like(value).detach() for name, value in adapters.anchors().items()}
    for n in range(len(IDS)):
        with ExitStack() as stack:
            shared: dict[int, Tensor] = {}
            leaves: dict[str, Tensor] = {}
            kept = []
            for name, layer in adapters.layers.items():
                own = layer.anchors()
                kept.append(own)
                for key, value in own.items():
                    if id(value) not in shared:
                        shared[id(value)] = leaves[f"{name}.{key}"] = value.detach().clone().requires_grad_()
                stack.enter_context(layer.at({key: shared[id(value)] for key, value in own.items()}))
            found = torch.autograd.grad(loss_of(model, slice(n, n + 1)), list(leaves.values()), allow_unused=True)
        for name, value in zip(leaves, found, strict=True):
            if value is not None:
                totals[name] += value.square()
    return totals


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "detached" in name else name for name in CASES]
)
def test_one_backward_equals_a_loop_of_single_sequences(name: str) -> None:
    model, adapters = adapted(CASES[name], torch.float64)
    adapters.end_task()  # so that fused tensors are not zero
    move(adapters, seed=9)
    model.eval()
    squares = SquaredGradients(adapters)
    squares.add(lambda: loss_of(model, slice(None)), len(IDS))
    expected = looped(model, adapters)
    assert squares.sums.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(squares.sums[key], value, rtol=1e-9, atol=1e-14, msg=key)
    assert sum(value.sum() for value in expected.values()) > 0
    assert all(parameter.grad is None for parameter in adapters.trainable_parameters())


def test_of_a_dense_fused_change_is_that_of_the_weight_itself() -> None:
    config = SECURAConfig(norm="element", fusion="base", c=8, a=12, targets=["q_proj", "o_proj"])
    model, adapters = adapted(config, torch.float64)
    adapters.end_task()
    move(adapters, seed=9)
    squares = SquaredGradients(adapters)
    squares.add(lambda: loss_of(model, slice(None)), len(IDS))
    names = list(adapters.layers)
    adapters.merge_()
    for name in names:
        weight = model.get_submodule(name).weight.requires_grad_()
        expected = sum(
            torch.autograd.grad(loss_of(model, slice(n, n + 1)), weight)[0].square() for n in range(len(IDS))
        )
        torch.testing.assert_close(squares.sums[f"{name}.fused_dense"], expected, rtol=1e-7, atol=1e-12)


class LogisticModel(nn.Module):
    """One matrix from the last token's embedding to logits, with the interface of a causal language model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 3).double()
        self.head = nn.Linear(3, 5, bias=False).double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))


ROWS = [Encoded([1, 2], 1), Encoded([3, 4, 0], 1), Encoded([2, 2], 1)]


def test_of_logistic_regression_is_the_closed_form() -> None:
    model = LogisticModel()
    adapters = inject(model, FullConfig(targets=["head"]))
    fisher = empirical_fisher(model, adapters, ROWS, batch_size=2)["head.tuned_weight"]
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for row in ROWS:
        gradient = torch.zeros(5, 3, dtype=torch.float64)
        for token, target in zip(row.ids[:-1], row.ids[1:], strict=True):
            x = model.embed.weight[token].detach()
            gradient += torch.outer((model.head.base.weight.detach() @ x).softmax(0) - torch.eye(5)[target], x)
        expected += gradient.square() / len(ROWS)
    torch.testing.assert_close(fisher, expected)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_does_not_depend_on_padding_or_on_the_batch(batch_size: int) -> None:
    from secura_lightning.modeling.load import BaseSpec, load_model

    torch.manual_seed(0)
    model = load_model(BaseSpec(init="random", dtype="float64"))
    adapters = inject(model, LoRAConfig(rank=2, dropout=0.5, targets=["q_proj", "down_proj"]))
    move(adapters)
    rows = [Encoded(list(range(5, 5 + n)), 2) for n in (4, 9, 6)]
    training = [module.training for module in model.modules()]
    fisher = empirical_fisher(model, adapters, rows, pad=0, batch_size=batch_size)
    assert training == [module.training for module in model.modules()]
    # Each row alone and unpadded, by the mean of its loss's squares through plain autograd.
    model.eval()
    parameters = dict(adapters.named_parameters())
    expected = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = model(input_ids=ids).logits[0, row.n_prompt - 1 : -1]
        loss = F.cross_entropy(logits, ids[0, row.n_prompt :], reduction="sum")
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            expected[name] += gradient.square() / len(rows)
    for name, value in expected.items():
        torch.testing.assert_close(fisher[name], value, rtol=1e-8, atol=1e-14)


def test_square_of_the_batch_mean_is_smaller() -> None:
    """The mistake that the definition warns of: with independent gradients it loses about the batch size."""
    model, adapters = adapted(LoRAConfig(rank=2), torch.float64)
    squares = SquaredGradients(adapters)
    squares.add(lambda: loss_of(model, slice(None)), len(IDS))
    total = sum(value.sum() for value in squares.sums.values()) / len(IDS)
    gradients = torch.autograd.grad(loss_of(model, slice(None)) / len(IDS), adapters.trainable_parameters())
    assert sum(gradient.square().sum() for gradient in gradients) < 0.9 * total


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_of_a_compiled_model_is_that_of_the_plain_one() -> None:
    model, adapters = adapted(LoRAConfig(rank=2), torch.float64)
    plain, compiled = SquaredGradients(adapters), SquaredGradients(adapters)
    plain.add(lambda: loss_of(model, slice(None)), len(IDS))
    for layer in model.layers:
        layer.compile(backend="eager")
    loss_of(model, slice(None))
    compiled.add(lambda: loss_of(model, slice(None)), len(IDS))
    torch.testing.assert_close(compiled.sums, plain.sums)


def test_tokens_that_are_not_grouped_by_sequence_are_refused() -> None:
    class Flat(ToyModel):
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embed(ids)
            return self.lm_head(self.layers[0].o_proj(hidden.view(-1, WIDTH)[:, :56]).view(hidden.shape))

    model = Flat()
    adapters = inject(model, LoRAConfig(targets=["o_proj"]))
    squares = SquaredGradients(adapters)
    with pytest.raises(SecuraError, match="o_proj gets its tokens as"):
        squares.add(lambda: loss_of(model, slice(None)), len(IDS))
