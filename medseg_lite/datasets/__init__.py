"""Real scans: one module per public data set, and a loader for the reader's own folder.

Nothing here is needed to run the course, whose default data are generated. Data sets are looked for under
`$MEDSEG_DATA_DIR`, or in the cache where a download puts them. `downloads` holds what can be fetched, by name.
"""

from ._cohort import Cohort
from ._store import store, stored
from .brats2013_deepmedic import brats2013_deepmedic, download_brats2013_deepmedic
from .isbi2012 import download_isbi2012, isbi2012
from .lits import lits
from .msd import msd
from .nifti_folder import NiftiFolder, nifti_folder
from .promise12 import promise12

downloads = {"brats2013_deepmedic": download_brats2013_deepmedic}

__all__ = [
    "Cohort", "NiftiFolder", "brats2013_deepmedic", "download_brats2013_deepmedic", "download_isbi2012", "downloads",
    "isbi2012", "lits", "msd", "nifti_folder", "promise12", "store", "stored",
]  # fmt: skip
