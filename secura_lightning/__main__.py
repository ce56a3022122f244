"""``python -m secura_lightning`` is ``secura``."""

import sys

from secura_lightning.cli.main import main

sys.exit(main())
