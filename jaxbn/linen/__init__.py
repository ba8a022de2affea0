"""Batch normalization for flax.linen: the layers, and the statistics pass for any linen model."""

from jaxbn._src import public as _public
from jaxbn._src.linen.adapt import adapt as adapt
from jaxbn._src.linen.backward import update_backward as update_backward
from jaxbn._src.linen.capture import capture_moments as capture_moments
from jaxbn._src.linen.convert import convert_norms as convert_norms
from jaxbn._src.linen.diagnose import diagnose as diagnose
from jaxbn._src.linen.fold import fold as fold
from jaxbn._src.linen.freeze import affine_mask as affine_mask
from jaxbn._src.linen.freeze import freeze as freeze
from jaxbn._src.linen.freeze import freeze_layers as freeze_layers
from jaxbn._src.linen.freeze import summary as summary
from jaxbn._src.linen.kernels import map_kernel as map_kernel
from jaxbn._src.linen.layers import BatchNorm as BatchNorm
from jaxbn._src.linen.layers import Norm as Norm
from jaxbn._src.linen.other_layers import BatchRenorm as BatchRenorm
from jaxbn._src.linen.other_layers import DomainBatchNorm as DomainBatchNorm
from jaxbn._src.linen.other_layers import GhostBatchNorm as GhostBatchNorm
from jaxbn._src.linen.other_layers import MovingAverageBatchNorm as MovingAverageBatchNorm
from jaxbn._src.linen.postproc import install_moments as install_moments
from jaxbn._src.linen.postproc import move_averages as move_averages
from jaxbn._src.linen.postproc import postproc as postproc
from jaxbn._src.linen.registry import register_batch_norm as register_batch_norm
from jaxbn._src.linen.replace import replace as replace
from jaxbn._src.linen.steps import TrainState as TrainState
from jaxbn._src.linen.steps import make_steps as make_steps

_public.set_home(globals())
