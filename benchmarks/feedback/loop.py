"""Do rounds of feedback keep the judge's score rising, and do conservative ensembles keep it from falling?

The demo's world, whose judge is a classifier that neither policy nor reward model ever sees. One run makes what all
begin with: a policy, and a reward model of few rankings whose members are models of their own. From there PPO goes with
a small KL coefficient as far as the reward leads it:

    mean, worst, mean-variance    of the members, which stay as they are
    three rounds                  the mean; members trained again after 1, 3 and 5 sevenths of the steps, on judgments
                                  of the newest policy's completions too (`feedback.rounds`)

Snapshots along a run are measured on held-out prompts that all share. Runs of one seed have the same prompts and random
numbers. A finished run is not repeated.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":
    # The folder of this file makes way: its modules are the package `feedback`.
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Drawing

from feedback.intervals import interval
from harness.bench import Figure, Measured, Options, main, say
from harness.demo import DEMO, rlhf_run
from rlhf.evaluate.plots import LOOK
from rlhf.evaluate.results import Point, read_frontier
from rlhf.settings.loader import load_settings
from rlhf.settings.paths import RunPaths
from rlhf.supervisor.group import child_environment
