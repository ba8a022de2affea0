"""Batch normalization for flax.linen: the layers, and the statistics pass for any linen model."""

from jaxbn.linen.capture import capture_moments as capture_moments
from jaxbn.linen.modules import BatchNorm as BatchNorm
from jaxbn.linen.postproc import install_moments as install_moments
from jaxbn.linen.postproc import postproc as postproc
