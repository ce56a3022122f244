"""``secura import``: turn an existing PEFT LoRA or DoRA into an adapter folder that a run can start from.

Writes adapter.safetensors, adapter.json and start.yaml; the last sets model.adapter and model.start, so that
`secura fit --config YOURS.yaml --config OUT/start.yaml` goes on from the imported adapter.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from secura_lightning.adapters import AdapterConfig, describe_adapter
from secura_lightning.cli.options import OneLineOptions, new_folder
from secura_lightning.errors import SecuraError
from secura_lightning.export.peft import read_peft
from secura_lightning.export.saved import write_adapter

START = "start.yaml"
EPILOG = """examples:
  secura import --peft some_lora --out imported
  secura fit --config my.yaml --config imported/start.yaml
"""


def _parser() -> argparse.ArgumentParser:
    parser = OneLineOptions(prog="secura import", description=__doc__, epilog=EPILOG)
    parser.add_argument("--peft", type=Path, required=True, help="folder of a PEFT LoRA or DoRA")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be empty or absent")
    parser.add_argument("--base", help="base model that it belongs to (default: the one that the folder names)")
    return parser


def main(args: list[str]) -> int:
    """Import one PEFT folder.

    Raises:
        ConfigError: The command line is wrong.
        SecuraError: The folder is no LoRA or DoRA, or is damaged, or the output folder is not empty.
    """
    options = _parser().parse_args(args)
    if options.out.is_file() or (options.out.is_dir() and any(options.out.iterdir())):
        raise SecuraError(f"--out: {options.out} is there already; give an empty or new folder")
    config, tensors, named = read_peft(options.peft)
    base = options.base or named
    with new_folder(options.out) as folder:
        write_adapter(folder, config, tensors, None if base is None else {"base": base})
        (folder / START).write_text(start_yaml(config, options.out), encoding="utf-8")
    modules = len({name.rpartition(".")[0] for name in tensors})
    kind = type(config).__name__.removesuffix("Config")
    print(f"{kind} on {modules} modules of {base or 'an unnamed base'}: wrote {options.out}")
    print(f"start from it: secura fit --config YOURS.yaml --config {options.out / START}")
    return 0


def start_yaml(config: AdapterConfig, folder: Path) -> str:
    """The keys that make a run start from an adapter folder."""
    settings: dict[str, Any] = describe_adapter(config)
    adapter = {"class_path": settings.pop("class"), "init_args": settings}
    text = yaml.safe_dump({"model": {"adapter": adapter, "start": str(folder)}}, sort_keys=False)
    return f"# Start from the adapter in this folder: secura fit --config YOURS.yaml --config {folder / START}\n{text}"
