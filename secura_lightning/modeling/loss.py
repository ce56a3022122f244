"""Next-token cross-entropy, summed, so that the caller decides what to normalise by.

Two ways to the same number. :func:`summed_cross_entropy` takes logits ``[b, t, v]`` that someone else needs too.
:class:`ChunkedLoss` never holds them: the head sees the trained tokens alone, a chunk at a time, and each chunk's
gradient is taken while its logits exist::

    hidden [n, d] -> chunk [c, d] -> head -> logits [c, v] -> loss, d loss / d chunk -> the logits are freed

With a frozen head that costs what the plain loss costs: one product forward and one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from secura_lightning.data.encode import IGNORED
from secura_lightning.errors import ConfigError

CHUNK_LOGITS = 1 << 24  # logits of one chunk: 64 MiB in fp32, enough work to fill a GPU
LARGE_VOCABULARY = 16384  # from here on the logits outweigh a layer's activations
_CHECKED = 8  # tokens on which a model's own logits are compared with ours


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over trained tokens of -log p(token | before).

    Args:
        logits: ``[b, t, v]``; position i predicts label i + 1.
        labels: ``[b, t]``, :data:`IGNORED` where nothing is trained.

    Returns:
        A scalar in fp32 (or fp64 for fp64 logits).
    """
    targets = labels[:, 1:]
    trained = targets != IGNORED
    picked = logits[:, :-1][trained]  # [n, v]: prompts and padding never enter the softmax
    return _cross_entropy(picked, targets[trained])


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits if logits.dtype.itemsize > 4 else logits.float()
    return F.cross_entropy(logits, targets, reduction="sum")


class ChunkedLoss:
    """The summed cross-entropy of a model's trained tokens, without ``[tokens, vocabulary]`` logits.

    Args:
        model: A causal language model, with or without adapters, its head adapted or not.

    Raises:
        ConfigError: The model's logits are not its head's output, softcapped or scaled in a way that its config tells.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config = model.config.get_text_config()
        self.chunk = max(1, CHUNK_LOGITS // config.vocab_size)
        self.transform = logit_transform(config)
        self._check()

    @property
    def head(self) -> nn.Module:
        """The module that maps to the vocabulary, adapted or not."""
        return cast(nn.Module, self.model.get_output_embeddings())

    def __call__(self, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """Sum over trained tokens of -log p(token | before).

        Args:
            inputs: What the model is called with.
            labels: ``[b, t]``, :data:`IGNORED` where nothing is trained; label i + 1 is predicted at position i.

        Returns:
            A scalar in fp32 (or fp64 for an fp64 model).
        """
        return self.by_part(inputs, labels, [len(labels)])[0]

    def by_part(self, inputs: dict[str, Any], labels: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """:meth:`__call__` of each part of a batch, from one forward.

        Args:
            inputs: What the model is called with.
            labels: ``[b, t]``.
            sizes: Rows of each part, ``b`` in all; the parts stand one after another.

        Returns:
            A scalar for each part.
        """
        # Shifted, so that a token's target stands where it is predicted; the last position predicts nothing.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        trained = targets != IGNORED
        hidden, wanted = self._hidden(inputs, trained), targets[trained]  # [n, d] and [n], row after row
        # A count is read off the device: only where there is something to split.
        counts = [len(wanted)] if len(sizes) == 1 else [int(part.sum()) for part in trained.split(list(sizes))]
        parameters = [p for p in self.head.parameters() if p.requires_grad]
        return [
            chunked_cross_entropy(part, ids, self._score, parameters, self.chunk)
            for part, ids in zip(hidden.split(counts), wanted.split(counts), strict=True)
        ]

    def _score(self, hidden: Tensor) -> Tensor:
        return self.transform(self.head(hidden))

    def _hidden(self, inputs: dict[str, Any], kept: Tensor) -> Tensor:
        """What the head reads at the ``kept`` [b, t] positions, [n, d]."""
        seen: list[Tensor] = []

        def take(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            seen.append(hidden)
            return hidden[..., :0]  # the model goes on with logits over no words

        head = self.head
        # The whole model runs, so that every hook of it does (FSDP's gather the root's weights); only the head waits.
        own = head.__dict__.get("forward")
        head.__dict__["forward"] = take
        try:
            self.model(**inputs, logits_to_keep=kept)
        finally:
            if own is None:
                del head.__dict__["forward"]
            else:
                head.__dict__["forward"] = own
        return seen[0].reshape(-1, seen[0].shape[-1])

    def _check(self) -> None:
        """Ask the model itself whether its logits are what :meth:`_score` makes of its hidden states."""
        device = next(self.model.parameters()).device
        ids = torch.arange(_CHECKED, device=device).unsqueeze(0) % self.model.config.get_text_config().vocab_size
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                logits = self.model(input_ids=ids).logits.flatten(0, 1).float()
                ours = self._score(self._hidden({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))).float()
            fits = logits.shape == ours.shape and torch.allclose(logits, ours, rtol=1e-2, atol=1e-2)
        except (TypeError, IndexError, AttributeError):  # a forward without logits_to_keep, or without a head
            fits = False
        finally:
            for module in training:
                module.training = True
        if not fits:
            raise ConfigError(
                f"model.chunked_loss: {type(self.model).__name__} makes more of its head's output than its config "
                "tells; set model.chunked_loss: false"
            )


def choose_loss(model: PreTrainedModel, chunked: bool | None) -> ChunkedLoss | None:
    """The chunked loss where it is asked for, or None for the plain one.

    Args:
        model: The model.
        chunked: Yes or no; None: where the vocabulary is large and the model allows it.

    Raises:
        ConfigError: It is asked for, and the model does not allow it.
    """
    if chunked is False or (chunked is None and model.config.get_text_config().vocab_size < LARGE_VOCABULARY):
        return None
    try:
        return ChunkedLoss(model)
    except ConfigError:
        if chunked:
            raise
        return None


def logit_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What a model does to its head's output: softcapping (Gemma) or a scale (Cohere, Granite), as its config says."""
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale = factor / divisor

    def transform(logits: Tensor) -> Tensor:
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    score: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter] = (),
    chunk: int = 1024,
) -> Tensor:
    """Summed cross-entropy of ``score(hidden)``, ``chunk`` rows of logits at a time.

    Args:
        hidden: ``[n, d]``.
        targets: ``[n]`` token ids.
        score: From ``[c, d]`` to logits ``[c, v]``, row by row.
        parameters: What ``score`` trains.
        chunk: Rows whose logits exist together.

    Returns:
        A scalar in fp32 (or fp64 for fp64 logits). Its gradient reaches ``hidden`` and ``parameters``.
    """
    return cast(Tensor, _Chunked.apply(hidden, targets, score, chunk, *parameters))


def _value_and_slope(logits: Tensor, targets: Tensor, learns: bool) -> tuple[Tensor, Tensor | None]:
    """The summed cross-entropy of ``logits`` [c, v], and its slope softmax(logits) - onehot(targets) in their type.

    Autograd would keep the log-probabilities and write a matrix of zeros and one of gradients beside them; here the
    log-probabilities become the slope in place.
    """
    wide = logits.dtype if logits.dtype.itemsize > 4 else torch.float32
    scores = torch.log_softmax(logits, dim=-1, dtype=wide)
    loss = F.nll_loss(scores, targets, reduction="sum")
    if not learns:
        return loss, None
    scores.exp_()[torch.arange(len(targets), device=targets.device), targets] -= 1.0
    return loss, scores.to(logits.dtype)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, score: Callable[[Tensor], Tensor], chunk: int, *parameters: Tensor
    ) -> Tensor:
        need_hidden, wanted = ctx.needs_input_grad[0], [p for p in parameters if p.requires_grad]
        learns = need_hidden or any(ctx.needs_input_grad[4:])
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grads = [torch.zeros_like(p) for p in wanted] if learns else []
        total: Tensor | None = None
        for start in range(0, max(len(hidden), 1), chunk):
            rows = slice(start, start + chunk)
            with torch.set_grad_enabled(learns):
                part = hidden[rows].detach().requires_grad_(need_hidden)
                logits = score(part)
            loss, slope = _value_and_slope(logits.detach(), targets[rows], learns)
            total = loss if total is None else total + loss
            if learns:
                found = list(torch.autograd.grad(logits, ([part] if need_hidden else []) + wanted, slope))
                if grad_hidden is not None:
                    grad_hidden[rows] = found.pop(0)
                for sum_, grad in zip(grads, found, strict=True):
                    sum_ += grad
        ctx.save_for_backward(*([] if grad_hidden is None else [grad_hidden]), *grads)
        ctx.has_hidden, ctx.places = grad_hidden is not None, [p.requires_grad for p in parameters]
        assert total is not None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        grad_hidden = saved.pop(0) if ctx.has_hidden else None
        scaled = None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype)
        rest = [saved.pop(0) * grad if wanted else None for wanted in ctx.places]
        return scaled, None, None, None, *rest
