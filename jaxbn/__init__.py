"""Batch normalization as pure functions: train, estimate the population statistics, evaluate with them."""

from jaxbn.core.averaging import Averaging as Averaging
from jaxbn.core.averaging import constant as constant
from jaxbn.core.averaging import cumulative as cumulative
from jaxbn.core.averaging import horizon as horizon
from jaxbn.core.averaging import scheduled as scheduled
from jaxbn.core.moments import Moments as Moments
from jaxbn.core.moments import batch_moments as batch_moments
from jaxbn.core.moments import merge as merge
from jaxbn.core.moments import merge_over as merge_over
from jaxbn.core.moments import pool as pool
from jaxbn.methods.base import NormParams as NormParams
from jaxbn.methods.base import NormTransform as NormTransform
from jaxbn.methods.batch_norm import BatchNormState as BatchNormState
from jaxbn.methods.batch_norm import batch_norm as batch_norm
from jaxbn.population.estimators import Estimator as Estimator
from jaxbn.population.estimators import mean_of_batches as mean_of_batches
from jaxbn.population.estimators import moving_average as moving_average
from jaxbn.population.estimators import pooled as pooled
from jaxbn.population.frozen import Frozen as Frozen
from jaxbn.population.frozen import Info as Info
from jaxbn.population.frozen import LayerInfo as LayerInfo
from jaxbn.population.layers import LayerKind as LayerKind
from jaxbn.population.report import LayerChange as LayerChange
from jaxbn.population.report import Report as Report
from jaxbn.population.steps import Steps as Steps
from jaxbn.population.steps import step_if as step_if
