"""Real scans: one module per public data set, and a loader for your own folder.

The course runs without them, because its default data are generated. A data set is looked for in `$MEDSEG_DATA_DIR`, or else in
the cache, where a download puts it. `downloads` holds the functions that fetch data sets, by name. `store` keeps a cohort on disk,
ready for sampling.
"""

from functools import partial

from ._cohort import Cohort, case_names
from ._store import store, stored
from .brats import brats2015, brats2017
from .brats2013_deepmedic import brats2013_deepmedic, download_brats2013_deepmedic
from .isbi2012 import download_isbi2012, isbi2012
from .lits import lits
from .msd import TASKS, download_msd, msd
from .nifti_folder import nifti_folder
from .promise12 import download_promise12, promise12

downloads = {
    "brats2013_deepmedic": download_brats2013_deepmedic,
    "isbi2012": download_isbi2012,
    "promise12": download_promise12,
    **{name: partial(download_msd, name) for name in TASKS},
}

__all__ = [
    "Cohort",
    "brats2013_deepmedic",
    "brats2015",
    "brats2017",
    "case_names",
    "download_brats2013_deepmedic",
    "download_isbi2012",
    "download_msd",
    "download_promise12",
    "downloads",
    "isbi2012",
    "lits",
    "msd",
    "nifti_folder",
    "promise12",
    "store",
    "stored",
]
