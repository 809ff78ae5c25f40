"""Numbers that compare sets of samples.

Alignment (distance to the teacher's sample from the same noise) is the primary measure of a
student; the Fréchet distance alone misleads, because samples that are sharper and less diverse than
the data can win it. Report diversity beside it.

Features are read in blocks, so they may lie in files (np.memmap) and be larger than the memory of the machine. Moments
and scores are float64 on the host. Neighbours and kernels are computed on the accelerator.
"""

from pflow_jax.evaluation.metrics.inception_score import InceptionScore as InceptionScore
from pflow_jax.evaluation.metrics.inception_score import inception_score as inception_score
from pflow_jax.evaluation.metrics.interval import FrechetInterval as FrechetInterval
from pflow_jax.evaluation.metrics.interval import frechet_interval as frechet_interval
from pflow_jax.evaluation.metrics.kernel import KernelDistance as KernelDistance
from pflow_jax.evaluation.metrics.kernel import kernel_distance as kernel_distance
from pflow_jax.evaluation.metrics.kernel import whole_kernel_distance as whole_kernel_distance
from pflow_jax.evaluation.metrics.moments import SAMPLES_PER_FEATURE as SAMPLES_PER_FEATURE
from pflow_jax.evaluation.metrics.moments import Moments as Moments
from pflow_jax.evaluation.metrics.moments import MomentSums as MomentSums
from pflow_jax.evaluation.metrics.moments import frechet_distance as frechet_distance
from pflow_jax.evaluation.metrics.neighbours import PRDC as PRDC
from pflow_jax.evaluation.metrics.neighbours import PrecisionRecall as PrecisionRecall
from pflow_jax.evaluation.metrics.neighbours import prdc as prdc
from pflow_jax.evaluation.metrics.neighbours import precision_recall as precision_recall
from pflow_jax.evaluation.metrics.paired import PairedEstimate as PairedEstimate
from pflow_jax.evaluation.metrics.paired import paired_bootstrap as paired_bootstrap
from pflow_jax.evaluation.metrics.paired import ratio_of_means as ratio_of_means
from pflow_jax.evaluation.metrics.rows import Joined as Joined
from pflow_jax.evaluation.metrics.samples import accuracy as accuracy
from pflow_jax.evaluation.metrics.samples import alignment_errors as alignment_errors
from pflow_jax.evaluation.metrics.samples import diversity as diversity
