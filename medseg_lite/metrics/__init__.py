"""Agreement of a segmentation with the truth: overlap, surface distance, volume.

Every metric takes `(prediction, truth)`, two arrays of the same shape and of any number of dimensions that are True (or
1) inside the object. Torch tensors are accepted on any device. Surface metrics also take `spacing`, the voxel size in
mm along each axis.

Empty objects. Cases without a lesion, and predictions that find nothing, decide many an average. Each metric returns:

| metric                                | both empty       | only the prediction | only the truth | full truth |
|---------------------------------------|------------------|---------------------|----------------|------------|
| dice, jaccard, precision, sensitivity | `empty`, 1       | 0                   | 0              |            |
| specificity                           |                  |                     |                | `empty`, 1 |
| assd, boundary_distance, hausdorff    | nan              | nan                 | nan            |            |
| volume_difference                     | 0                | -100                | nan            |            |

The default `empty=1.0` is the rule of Kayalibay's published code. `empty=0.0` is that of the BRATS 2015 platform, which
counts cases without enhancing tumour as 0 (Kamnitsas et al. 2017, footnote 3). Both are in use, and averages made with
one cannot be compared with averages made with the other.
"""

from .operating import best_threshold, operating_points
from .overlap import dice, jaccard, precision, sensitivity, specificity, volume_difference
from .partitions import partition_scores, v_info, v_rand
from .surfaces import assd, boundary_distance, count_borders, hausdorff, slice_inconsistency, surface, surface_distances
from .tables import DEFAULT_METRICS, as_regions, evaluate, evaluate_cohort, read_table, regions, write_table

__all__ = [
    "DEFAULT_METRICS",
    "as_regions",
    "assd",
    "best_threshold",
    "boundary_distance",
    "count_borders",
    "dice",
    "evaluate",
    "evaluate_cohort",
    "hausdorff",
    "jaccard",
    "operating_points",
    "partition_scores",
    "precision",
    "read_table",
    "regions",
    "sensitivity",
    "slice_inconsistency",
    "specificity",
    "surface",
    "surface_distances",
    "v_info",
    "v_rand",
    "volume_difference",
    "write_table",
]
