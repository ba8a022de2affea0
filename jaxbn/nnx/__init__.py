"""Batch normalization for flax.nnx: the layers, and the statistics pass for any NNX model."""

from jaxbn.nnx.adapt import adapt as adapt
from jaxbn.nnx.backward import update_backward as update_backward
from jaxbn.nnx.capture import capture_moments as capture_moments
from jaxbn.nnx.convert import convert_norms as convert_norms
from jaxbn.nnx.diagnose import diagnose as diagnose
from jaxbn.nnx.fold import fold as fold
from jaxbn.nnx.freeze import affine_mask as affine_mask
from jaxbn.nnx.freeze import freeze as freeze
from jaxbn.nnx.freeze import freeze_layers as freeze_layers
from jaxbn.nnx.freeze import install_frozen as install_frozen
from jaxbn.nnx.freeze import summary as summary
from jaxbn.nnx.kernels import map_kernel as map_kernel
from jaxbn.nnx.methods import BatchRenorm as BatchRenorm
from jaxbn.nnx.methods import DomainBatchNorm as DomainBatchNorm
from jaxbn.nnx.methods import GhostBatchNorm as GhostBatchNorm
from jaxbn.nnx.methods import MovingAverageBatchNorm as MovingAverageBatchNorm
from jaxbn.nnx.modules import BatchNorm as BatchNorm
from jaxbn.nnx.modules import Norm as Norm
from jaxbn.nnx.postproc import install_moments as install_moments
from jaxbn.nnx.postproc import move_averages as move_averages
from jaxbn.nnx.postproc import postproc as postproc
from jaxbn.nnx.registry import register_batch_norm as register_batch_norm
from jaxbn.nnx.replace import replace as replace
from jaxbn.nnx.steps import TrainState as TrainState
from jaxbn.nnx.steps import make_steps as make_steps
