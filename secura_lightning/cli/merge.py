"""``secura merge``: write a checkpoint's model, base + change, as a standard Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from secura_lightning.cli.checkpoints import rebuild
from secura_lightning.errors import SecuraError
from secura_lightning.modeling.load import load_tokenizer


def main(args: list[str]) -> int:
    """Merge one checkpoint.

    Raises:
        SecuraError: The checkpoint is damaged, its base has changed, or the output folder is not empty.
    """
    parser = argparse.ArgumentParser(prog="secura merge", description=__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint file of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be empty or absent")
    options = parser.parse_args(args)
    if options.out.exists() and any(options.out.iterdir()):
        raise SecuraError(f"--out: folder {options.out} is not empty")
    spec, model, adapters = rebuild(options.ckpt)
    if adapters.merge_():
        model.config.tie_word_embeddings = False  # only one of the pair changed; transformers would tie them again
    model.config.use_cache = True
    model.save_pretrained(options.out)
    load_tokenizer(spec).save_pretrained(options.out)
    print(f"wrote {options.out}")
    return 0
