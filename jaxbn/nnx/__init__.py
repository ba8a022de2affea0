"""Batch normalization for flax.nnx: the layers, and the statistics pass for any NNX model."""

from jaxbn._src import public as _public
from jaxbn._src.nnx.adapt import adapt as adapt
from jaxbn._src.nnx.backward import update_backward as update_backward
from jaxbn._src.nnx.capture import capture_moments as capture_moments
from jaxbn._src.nnx.convert import convert_norms as convert_norms
from jaxbn._src.nnx.diagnose import diagnose as diagnose
from jaxbn._src.nnx.fold import fold as fold
from jaxbn._src.nnx.freeze import affine_mask as affine_mask
from jaxbn._src.nnx.freeze import freeze as freeze
from jaxbn._src.nnx.freeze import freeze_layers as freeze_layers
from jaxbn._src.nnx.freeze import install_frozen as install_frozen
from jaxbn._src.nnx.freeze import summary as summary
from jaxbn._src.nnx.kernels import map_kernel as map_kernel
from jaxbn._src.nnx.layers import BatchNorm as BatchNorm
from jaxbn._src.nnx.layers import Norm as Norm
from jaxbn._src.nnx.other_layers import BatchRenorm as BatchRenorm
from jaxbn._src.nnx.other_layers import DomainBatchNorm as DomainBatchNorm
from jaxbn._src.nnx.other_layers import GhostBatchNorm as GhostBatchNorm
from jaxbn._src.nnx.other_layers import MovingAverageBatchNorm as MovingAverageBatchNorm
from jaxbn._src.nnx.postproc import install_moments as install_moments
from jaxbn._src.nnx.postproc import move_averages as move_averages
from jaxbn._src.nnx.postproc import postproc as postproc
from jaxbn._src.nnx.registry import register_batch_norm as register_batch_norm
from jaxbn._src.nnx.replace import replace as replace
from jaxbn._src.nnx.steps import TrainState as TrainState
from jaxbn._src.nnx.steps import make_steps as make_steps

_public.set_home(globals())
