"""``secura export``: write a checkpoint's adapter alone, as a PEFT LoRA folder or as our own safetensors folder.

--format peft loads with peft anywhere: exact where the change has low rank (LoRA, rsLoRA, LoRA-Null, PiSSA, MiLoRA,
CURLoRA, DoRA, norm: none and row), else by truncated SVD to --tolerance (norm: element, full fine-tuning).
--format safetensors is exact for every adapter and loads with secura_lightning.from_pretrained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.adapters import AdapterSet, describe_adapter, inject
from secura_lightning.cli.checkpoints import read_identity, rebuild, results_of, training_of
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
from secura_lightning.export.card import NATIVE_USE, PEFT_USE, write_card
from secura_lightning.export.check import default_tolerance, largest_difference, probe_logits
from secura_lightning.export.lowrank import LowRank
from secura_lightning.export.peft import export_peft, read_peft
from secura_lightning.export.saved import load_adapters, save_adapters
from secura_lightning.modeling.load import BaseSpec, load_tokenizer

EPILOG = """examples:
  secura export --ckpt RUN/checkpoints/last.ckpt --out adapter                          # PEFT
  secura export --ckpt RUN/checkpoints/last.ckpt --out adapter --tolerance 0.2          # norm: element, by SVD
  secura export --ckpt RUN/checkpoints/last.ckpt --out adapter --format safetensors
"""


def _parser() -> argparse.ArgumentParser:
    parser = OneLineOptions(prog="secura export", description=__doc__, epilog=EPILOG)
    add_checkpoint(parser)
    add_output(parser)
    parser.add_argument("--format", choices=("peft", "safetensors"), default="peft", help="what to write (peft)")
    parser.add_argument("--tolerance", type=float, default=0.05,
                        help="largest relative error of a truncated SVD, module by module (0.05)")  # fmt: skip
    parser.add_argument("--rank", type=int, help="rank of a truncated SVD (default: the smallest that suffices)")
    parser.add_argument("--text", type=Path, help="text file whose logits are compared, instead of the built-in text")
    return parser


def main(args: list[str]) -> int:
    """Export one checkpoint's adapter.

    Raises:
        ConfigError: The command line is wrong.
        SecuraError: The checkpoint is damaged, the change has no such form, or what was written computes another one.
    """
    options = _parser().parse_args(args)
    check_output(options)
    if not 0 <= options.tolerance < 1:
        raise ConfigError(f"--tolerance is {options.tolerance}; it must be at least 0 and below 1")
    if options.rank is not None and options.rank < 1:
        raise ConfigError(f"--rank is {options.rank}; it must be at least 1")
    texts = read_texts(options.text)
    spec, model, adapters = rebuild(options.ckpt, options.weights)
    identity = read_identity(options.ckpt)
    config, tokenizer = adapters.config, load_tokenizer(spec)
    live = probe_logits(model, tokenizer, texts)
    with new_folder(options.out) as folder:
        if options.format == "peft":
            notes, exact = _write_peft(adapters, folder, spec, options)
        else:
            save_adapters(adapters, folder, spec, identity["base_fingerprint"], identity["seed"])
            notes, exact = [f"Adapter of one fine-tuning run on {spec.base}, exactly as trained."], True
        adapters.remove_()
        difference = _check(folder, options.format, model, tokenizer, live, texts, exact)
        notes.append(f"Largest logit difference from the live model on probe text: {difference:.3g}.")
        use = (PEFT_USE if options.format == "peft" else NATIVE_USE).replace("{base}", spec.base)
        use = use.replace("FOLDER", options.push or options.out.name)
        library = "peft" if options.format == "peft" else "secura_lightning"
        described, results = describe_adapter(config), results_of(options.ckpt)
        training = training_of(options.ckpt)
        card = write_card(options.out.name, spec, library, use, notes, described, results, training)
        (folder / "README.md").write_text(card, encoding="utf-8")
    for note in notes:
        print(note)
    print(f"wrote {options.out} ({size_of(options.out)})")
    upload(options)
    return 0


def _write_peft(
    adapters: AdapterSet, folder: Path, spec: BaseSpec, options: argparse.Namespace
) -> tuple[list[str], bool]:
    """Write, and say what each kind of change became."""
    with tqdm(total=len(adapters.layers), desc="exporting", unit=" modules", leave=False, disable=None) as bar:
        found = export_peft(
            adapters, folder, spec.base, spec.revision, options.rank, options.tolerance, progress=bar.update
        )
    return [*_told(found), *_base_note(spec)], all(part.error == 0 for part in found.values())


def _told(found: dict[str, LowRank]) -> list[str]:
    exact = [part.rank for part in found.values() if part.error == 0]
    near = [(part.rank, part.error, name) for name, part in found.items() if part.error > 0]
    notes = []
    if exact:
        notes.append(f"{len(exact)} modules exactly, at rank {_span(exact)}.")
    if near:
        rank, error, name = max(near, key=lambda entry: entry[1])
        notes.append(
            f"{len(near)} modules by truncated SVD, at rank {_span([entry[0] for entry in near])}: relative error of "
            f"the change at most {error:.4f} ({name}, rank {rank})."
        )
    return notes


def _span(ranks: Sequence[int]) -> str:
    return str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def _base_note(spec: BaseSpec) -> list[str]:
    if spec.quantization == "none":
        return []
    return [f"Trained on {spec.quantization} weights: on another base it computes something slightly different."]


def _check(
    folder: Path,
    form: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    live: Sequence[Tensor],
    texts: Sequence[str],
    exact: bool,
) -> float:
    """Read what was written back onto the base, and compare."""
    if form == "peft":
        config, tensors, _ = read_peft(folder)
        inject(model, config).load_state_dict(tensors)
    else:
        load_adapters(model, folder, strict=False)  # the base was checked when the checkpoint was read
    difference = largest_difference(probe_logits(model, tokenizer, texts), live)
    allowed = default_tolerance(model.dtype)
    if exact and not difference <= allowed:
        raise SecuraError(
            f"the exported adapter's logits are up to {difference:.3g} from the live model's, above {allowed:.3g}; "
            "nothing was kept"
        )
    return difference
