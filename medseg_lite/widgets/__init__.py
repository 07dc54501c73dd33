"""Interactive views for notebooks, drawn in the browser; each shows a static picture where no kernel or browser is at hand."""

from .be_the_network import BeTheNetwork
from .block_switchboard import BlockSwitchboard
from .compare_segmentations import CompareSegmentations
from .crf_explorer import CRFExplorer
from .feature_explorer import FeatureExplorer
from .gain_offset import GainOffset
from .kernel_editor import KernelEditor
from .learning_rate import LearningRate
from .loss_bench import LossBench
from .operating_point import OperatingPoint
from .segment_dial import SegmentDial
from .segment_yourself import SegmentYourself
from .signal_explorer import SignalExplorer
from .slice_viewer import SliceViewer
from .training_monitor import TrainingMonitor
from .training_scrubber import TrainingScrubber
from .valley import Valley
from .vote_tree import VoteTree
from .vrand_explorer import VRandExplorer

__all__ = [
    "BeTheNetwork",
    "BlockSwitchboard",
    "CRFExplorer",
    "CompareSegmentations",
    "FeatureExplorer",
    "GainOffset",
    "KernelEditor",
    "LearningRate",
    "LossBench",
    "OperatingPoint",
    "SegmentDial",
    "SegmentYourself",
    "SignalExplorer",
    "SliceViewer",
    "TrainingMonitor",
    "TrainingScrubber",
    "VRandExplorer",
    "Valley",
    "VoteTree",
]
