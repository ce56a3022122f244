"""One strategy, one file. A new file here is found by class name under ``trainer.callbacks``."""

from secura_lightning.discover import import_all

import_all(__name__)
