"""One process of several, started by torchrun: runs the jobs of a JSON file one after another.

A job is ``["fit", argument, ...]``: what `secura` gets on its command line. Starting a process costs more than a run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from secura_lightning.cli.main import main


def run(file: Path) -> int:
    """Run all jobs; stop at the first that fails."""
    for job in json.loads(file.read_text()):
        code = main(job)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
