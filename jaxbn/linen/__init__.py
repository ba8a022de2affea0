"""Batch normalization for flax.linen: the layers, and the statistics pass for any linen model."""

from jaxbn.linen.adapt import adapt as adapt
from jaxbn.linen.backward import update_backward as update_backward
from jaxbn.linen.capture import capture_moments as capture_moments
from jaxbn.linen.convert import convert_norms as convert_norms
from jaxbn.linen.diagnose import diagnose as diagnose
from jaxbn.linen.fold import fold as fold
from jaxbn.linen.freeze import affine_mask as affine_mask
from jaxbn.linen.freeze import freeze as freeze
from jaxbn.linen.freeze import freeze_layers as freeze_layers
from jaxbn.linen.freeze import summary as summary
from jaxbn.linen.kernels import map_kernel as map_kernel
from jaxbn.linen.methods import BatchRenorm as BatchRenorm
from jaxbn.linen.methods import DomainBatchNorm as DomainBatchNorm
from jaxbn.linen.methods import GhostBatchNorm as GhostBatchNorm
from jaxbn.linen.methods import MovingAverageBatchNorm as MovingAverageBatchNorm
from jaxbn.linen.modules import BatchNorm as BatchNorm
from jaxbn.linen.modules import Norm as Norm
from jaxbn.linen.postproc import install_moments as install_moments
from jaxbn.linen.postproc import move_averages as move_averages
from jaxbn.linen.postproc import postproc as postproc
from jaxbn.linen.registry import register_batch_norm as register_batch_norm
from jaxbn.linen.replace import replace as replace
from jaxbn.linen.steps import TrainState as TrainState
from jaxbn.linen.steps import make_steps as make_steps
