"""``secura merge``: write a checkpoint's model, base + change, as a standard Hugging Face folder.

The change is added in fp32 and rounded once, one layer after another. The written folder is then loaded in plain
transformers and compared with the live model on probe text: it stands only if its logits are the same.
"""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.adapters import AdapterSet, describe_adapter
from secura_lightning.cli.checkpoints import rebuild, results_of, training_of
from secura_lightning.cli.options import (
    OneLineOptions,
    add_checkpoint,
    add_output,
    check_output,
    new_folder,
    read_texts,
    size_of,
    upload,
)
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.export.card import MERGED_USE, write_card
from secura_lightning.export.check import default_tolerance, largest_difference, least_tolerance, probe_logits
from secura_lightning.export.merging import Onto, check_biases, full_precision_base, merge_live, merge_quantized
from secura_lightning.modeling.load import BaseSpec, load_tokenizer

EPILOG = """examples:
  secura merge --ckpt lightning_logs/quickstart/version_0/checkpoints/last.ckpt --out merged
  secura merge --ckpt RUN/checkpoints/last.ckpt --out merged --onto dequantized      # a 4-bit run
  secura merge --ckpt RUN/checkpoints/last.ckpt --out merged --push me/my-model
"""


def _parser() -> argparse.ArgumentParser:
    parser = OneLineOptions(prog="secura merge", description=__doc__, epilog=EPILOG)
    add_checkpoint(parser)
    add_output(parser)
    parser.add_argument("--onto", choices=("base", "dequantized"),
                        help="of a 4-bit or 8-bit run: add the change to the original weights (default), or to the "
                        "values that the run computed with")  # fmt: skip
    parser.add_argument("--tolerance", type=float,
                        help="largest logit difference from the live model (default: by the weights' type, and at most "
                        "half of the difference that the change itself makes; of a quantised run by the weights' type "
                        "plus twice the difference between the two bases themselves)")  # fmt: skip
    parser.add_argument("--text", type=Path, help="text file whose logits are compared, instead of the built-in text")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file (5GB)")
    return parser


def main(args: list[str]) -> int:
    """Merge one checkpoint.

    Raises:
        ConfigError: The command line is wrong.
        SecuraError: The checkpoint is damaged, its base has changed, the output folder is not empty, or the merged
            model is not the live one.
    """
    options = _parser().parse_args(args)
    check_output(options)
    if not re.fullmatch(r"[0-9.]+ ?[KMGT]?B", options.max_shard_size):
        raise ConfigError(f"--max-shard-size is {options.max_shard_size}; give a size such as 5GB or 500MB")
    if options.tolerance is not None and options.tolerance < 0:
        raise ConfigError(f"--tolerance is {options.tolerance}; it must be at least 0")
    texts = read_texts(options.text)
    spec, model, adapters = rebuild(options.ckpt, options.weights)
    check_biases(adapters)
    onto = _onto(options.onto, spec)
    tokenizer = load_tokenizer(spec)
    settings, results = describe_adapter(adapters.config), results_of(options.ckpt)
    training = training_of(options.ckpt)
    live = probe_logits(model, tokenizer, texts)
    with adapters.disabled():
        untouched = probe_logits(model, tokenizer, texts)
    effect = largest_difference(live, untouched)
    target, apart = _merge(model, adapters, tokenizer, texts, onto, spec, untouched)
    del model, adapters, untouched
    allowed, why = _allowed(options.tolerance, target.dtype, effect, apart)
    with new_folder(options.out) as folder:
        target.config.use_cache = True  # training turned it off
        target.save_pretrained(folder, max_shard_size=options.max_shard_size)
        tokenizer.save_pretrained(folder)
        del target
        gc.collect()
        difference = _check(folder, spec, tokenizer, live, texts, allowed, why)
        notes = _notes(spec, onto, difference, allowed, effect, apart)
        use = MERGED_USE.replace("FOLDER", options.push or options.out.name)
        card = write_card(f"{options.out.name}", spec, "transformers", use, notes, settings, results, training)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"largest logit difference from the live model: {difference:.3g} (limit {allowed:.3g}: {why})")
    print(f"largest logit difference that the change itself makes: {effect:.3g}")
    print(f"wrote {options.out} ({size_of(options.out)}){'' if onto is None else f', merged onto the {_name(onto)}'}")
    upload(options)
    return 0


def _onto(wanted: Onto | None, spec: BaseSpec) -> Onto | None:
    if spec.quantization == "none":
        if wanted is not None:
            raise ConfigError(
                f"--onto {wanted}: the run's base is not quantised, so there is one base alone; leave it out"
            )
        return None
    return wanted or "base"


def _name(onto: Onto) -> str:
    return "original base" if onto == "base" else "dequantised base"


def _merge(
    model: PreTrainedModel,
    adapters: AdapterSet,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    onto: Onto | None,
    spec: BaseSpec,
    untouched: Sequence[Tensor],
) -> tuple[PreTrainedModel, float | None]:
    """The merged model; and how far the quantised base and the one merged into are apart without any change."""
    with tqdm(total=len(adapters.layers), desc="merging", unit=" modules", leave=False, disable=None) as bar:
        if onto is None:
            return merge_live(model, adapters, bar.update), None
        target = full_precision_base(spec, model, onto)
        apart = largest_difference(untouched, probe_logits(target, tokenizer, texts))
        return merge_quantized(target, adapters, onto, bar.update), apart


def _allowed(tolerance: float | None, dtype: torch.dtype, effect: float, apart: float | None) -> tuple[float, str]:
    """The largest difference that is accepted, and why; ``effect`` is what the change itself does to the logits."""
    if tolerance is not None:
        return tolerance, "--tolerance"
    kind = str(dtype).removeprefix("torch.")
    if apart is not None:
        return default_tolerance(dtype) + 2 * apart, f"{kind} weights, and the bases alone are {apart:.3g} apart"
    half = max(effect / 2, least_tolerance(dtype))
    if half < default_tolerance(dtype):
        return half, f"half of what the change does, in {kind} weights"
    return default_tolerance(dtype), f"{kind} weights"


def _check(
    folder: Path,
    spec: BaseSpec,
    tokenizer: PreTrainedTokenizerBase,
    live: Sequence[Tensor],
    texts: Sequence[str],
    allowed: float,
    why: str,
) -> float:
    """Load what was written as anyone would, and compare."""
    shared: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "dtype": "auto"}
    merged = AutoModelForCausalLM.from_pretrained(folder, **shared).eval()
    difference = largest_difference(probe_logits(merged, tokenizer, texts), live)
    if not difference <= allowed:
        raise SecuraError(
            f"the merged model's logits are up to {difference:.3g} from the live model's, above {allowed:.3g} ({why}); "
            "nothing was kept; --tolerance accepts more"
        )
    return difference


def _notes(
    spec: BaseSpec, onto: Onto | None, difference: float, allowed: float, effect: float, apart: float | None
) -> list[str]:
    base = f"{spec.base}" + (f" at revision {spec.revision}" if spec.revision else "")
    if onto is None:
        notes = [f"Base + change of one fine-tuning run on {base}, summed in fp32 and rounded once to {spec.dtype}."]
    else:
        notes = [
            f"Change of a fine-tuning run on the {spec.quantization} weights of {base}, added to the **{_name(onto)}** "
            f"in fp32 and rounded once to {spec.dtype}.",
            f"Without any change the {spec.quantization} base and this one have logits up to {apart:.3g} apart.",
        ]
    notes.append(
        f"Largest logit difference from the live model on probe text: {difference:.3g} (at most {allowed:.3g}); the "
        f"change itself makes one of {effect:.3g}."
    )
    return notes
