"""Batch normalization for flax.nnx: the layers, and the statistics pass for any NNX model."""

from jaxbn.nnx.capture import capture_moments as capture_moments
from jaxbn.nnx.modules import BatchNorm as BatchNorm
from jaxbn.nnx.postproc import install_moments as install_moments
from jaxbn.nnx.postproc import postproc as postproc
