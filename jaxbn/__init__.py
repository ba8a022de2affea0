"""Batch normalization for JAX and Flax as pure functions: train, estimate the population statistics, evaluate.

A method is a factory that returns a `NormTransform` of pure functions: `batch_norm`, `batch_renorm`,
`moving_average_batch_norm`, `ghost_batch_norm` and `domain_batch_norm`. `postproc`, `diagnose` and `freeze` run models
of such functions. The layers and everything that runs a Flax model are in `jaxbn.linen` and `jaxbn.nnx`, files and
export in `jaxbn.serving`, and reference vectors in `jaxbn.testing`. These four are imported when they are first used,
so `import jaxbn` is enough.
"""

import typing as _typing

from jaxbn._src import public as _public
from jaxbn._src.diagnostics.diagnosis import Diagnosis as Diagnosis
from jaxbn._src.diagnostics.diagnosis import Finding as Finding
from jaxbn._src.diagnostics.diagnosis import LayerDiagnosis as LayerDiagnosis
from jaxbn._src.framework.layers import LayerKind as LayerKind
from jaxbn._src.framework.mixing import mix as mix
from jaxbn._src.framework.processes import check_replicas as check_replicas
from jaxbn._src.framework.steps import Steps as Steps
from jaxbn._src.framework.steps import step_if as step_if
from jaxbn._src.inference.fold_report import FoldReport as FoldReport
from jaxbn._src.inference.fold_report import LayerFold as LayerFold
from jaxbn._src.inference.frozen import Frozen as Frozen
from jaxbn._src.inference.frozen import Info as Info
from jaxbn._src.inference.frozen import LayerInfo as LayerInfo
from jaxbn._src.methods.batch_norm import BatchNormState as BatchNormState
from jaxbn._src.methods.batch_norm import batch_norm as batch_norm
from jaxbn._src.methods.batch_renorm import BatchRenormState as BatchRenormState
from jaxbn._src.methods.batch_renorm import batch_renorm as batch_renorm
from jaxbn._src.methods.batch_renorm_schedules import renorm_ramp as renorm_ramp
from jaxbn._src.methods.batch_renorm_schedules import renorm_switch as renorm_switch
from jaxbn._src.methods.domain_batch_norm import DomainBatchNormState as DomainBatchNormState
from jaxbn._src.methods.domain_batch_norm import domain_batch_norm as domain_batch_norm
from jaxbn._src.methods.ghost_batch_norm import GhostBatchNormState as GhostBatchNormState
from jaxbn._src.methods.ghost_batch_norm import ghost_batch_norm as ghost_batch_norm
from jaxbn._src.methods.moving_average_batch_norm import MovingAverageBatchNormState as MovingAverageBatchNormState
from jaxbn._src.methods.moving_average_batch_norm import moving_average_batch_norm as moving_average_batch_norm
from jaxbn._src.methods.protocol import NormParams as NormParams
from jaxbn._src.methods.protocol import NormTransform as NormTransform
from jaxbn._src.numerics import checkpoint_policies as checkpoint_policies
from jaxbn._src.numerics.averages import Averaging as Averaging
from jaxbn._src.numerics.averages import constant as constant
from jaxbn._src.numerics.averages import cumulative as cumulative
from jaxbn._src.numerics.averages import horizon as horizon
from jaxbn._src.numerics.averages import scheduled as scheduled
from jaxbn._src.numerics.moments import Moments as Moments
from jaxbn._src.numerics.moments import batch_moments as batch_moments
from jaxbn._src.numerics.moments import merge as merge
from jaxbn._src.numerics.moments import merge_over as merge_over
from jaxbn._src.numerics.moments import pool as pool
from jaxbn._src.numerics.weight_standardization import centralize_kernel as centralize_kernel
from jaxbn._src.numerics.weight_standardization import standardize_kernel as standardize_kernel
from jaxbn._src.pytree.capture import capture_moments as capture_moments
from jaxbn._src.pytree.diagnose import diagnose as diagnose
from jaxbn._src.pytree.freeze import freeze as freeze
from jaxbn._src.pytree.freeze import summary as summary
from jaxbn._src.pytree.postproc import install_moments as install_moments
from jaxbn._src.pytree.postproc import move_averages as move_averages
from jaxbn._src.pytree.postproc import postproc as postproc
from jaxbn._src.statistics.estimators import Estimator as Estimator
from jaxbn._src.statistics.estimators import mean_of_batches as mean_of_batches
from jaxbn._src.statistics.estimators import moving_average as moving_average
from jaxbn._src.statistics.estimators import pooled as pooled
from jaxbn._src.statistics.layer_change import LayerChange as LayerChange
from jaxbn._src.statistics.pass_report import Report as Report

if _typing.TYPE_CHECKING:  # type checkers and editors do not run `__getattr__`
    from jaxbn import linen as linen
    from jaxbn import nnx as nnx
    from jaxbn import serving as serving
    from jaxbn import testing as testing

    __version__: str
else:
    __getattr__, __dir__ = _public.lazy(globals(), "linen", "nnx", "serving", "testing")

_public.set_home(globals())
