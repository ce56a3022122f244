"""One task, one file. A new file here is found by class name in YAML; there is nothing to register."""

from secura_lightning.discover import import_all

import_all(__name__)
