"""Build the API reference with pdoc: ``python docs/reference.py [FOLDER]`` (default: ``site``).

pdoc alone sees neither what the package imports at its first use nor, beside ``__all__``, its modules: both are named
to it here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from pkgutil import walk_packages

import pdoc

import secura_lightning


def main(folder: Path) -> None:
    """Write one page a module, and an index."""
    for name in secura_lightning.__all__:
        setattr(secura_lightning, name, getattr(secura_lightning, name))
    prefix = f"{secura_lightning.__name__}."
    found = [module.name for module in walk_packages(secura_lightning.__path__, prefix)]
    public = [name for name in found if not any(part.startswith("_") for part in name.split("."))]
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(secura_lightning.__name__, *public, output_directory=folder)
    print(f"wrote {folder}: {len(public) + 1} pages")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
