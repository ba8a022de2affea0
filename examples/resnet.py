"""Residual networks of He et al. in linen and NNX with jaxbn's layers; the default is ResNet-50.

A bottleneck block is `y = relu(norm(conv(...)) + shortcut)`. The norm, the sum and the ReLU are one call of a layer,
`BatchNorm(activation=relu)(x, residual=shortcut)`. The stride is in the 3x3 convolution (ResNet v1.5). The scale of the
last norm of a block is initialized to zero, so that each block starts as the identity (Goyal et al., 2017). Statistics
and logits are float32 for any `dtype` of the activations. Stages (3, 4, 23, 3) make a ResNet-101.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

import jaxbn.linen
import jaxbn.nnx

MOMENTUM = 0.9  # of the running averages; PyTorch calls it 0.1
EXPANSION = 4  # output features of a block, as a multiple of the features of its 3x3 convolution
RESNET_50 = (3, 4, 6, 3)

_CONV = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_DENSE = nn.initializers.normal(0.01)
_ZEROS = nn.initializers.zeros


class Place(NamedTuple):
    """The configuration of one block."""

    width: int  # features of the 3x3 convolution
    stride: int
    project: bool  # whether a 1x1 convolution in the shortcut changes the number of features


def places(stages: Sequence[int], width: int) -> Iterator[Place]:
    """The blocks in order; every stage after the first halves the image and doubles the width."""
    for stage, blocks in enumerate(stages):
        for block in range(blocks):
            yield Place(width * 2**stage, 2 if stage and not block else 1, project=not block)


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max pooling with stride 2."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def identity(x: jax.Array) -> jax.Array:
    """The shortcut of blocks that keep the number of features."""
    return x


class LinenBlock(nn.Module):
    """A bottleneck block."""

    place: Place
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=_CONV)
        norm = functools.partial(
            jaxbn.linen.BatchNorm, use_running_average=not train, momentum=MOMENTUM, dtype=self.dtype
        )
        width, stride, project = self.place
        y = norm(name="norm1", activation=jax.nn.relu)(conv(width, (1, 1), name="conv1")(x))
        y = conv(width, (3, 3), strides=stride, padding=1, name="conv2")(y)
        y = conv(EXPANSION * width, (1, 1), name="conv3")(norm(name="norm2", activation=jax.nn.relu)(y))
        if project:
            x = conv(EXPANSION * width, (1, 1), strides=stride, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x)
        # One call for norm, sum and ReLU: they share one read and one write of the activations.
        return norm(name="norm3", activation=jax.nn.relu, scale_init=_ZEROS)(y, residual=x)


class LinenResNet(nn.Module):
    """Maps images `[N, H, W, 3]` to logits `f32[N, num_classes]`.

    Attributes:
        stages: Number of blocks in each stage.
        num_classes: Number of logits.
        width: Features of the first convolution.
        dtype: Dtype of the activations; parameters are float32.
    """

    stages: Sequence[int] = RESNET_50
    num_classes: int = 1000
    width: int = 64
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=_CONV)
        norm = functools.partial(jaxbn.linen.BatchNorm, momentum=MOMENTUM, dtype=self.dtype, activation=jax.nn.relu)
        x = conv(self.width, (7, 7), strides=2, padding=3, name="conv")(x)
        x = max_pool(norm(use_running_average=not train, name="norm")(x))
        for i, place in enumerate(places(self.stages, self.width)):
            x = LinenBlock(place, self.dtype, name=f"blocks_{i}")(x, train)
        return nn.Dense(self.num_classes, kernel_init=_DENSE, name="head")(x.mean((1, 2), dtype=jnp.float32))


class NnxBlock(nnx.Module):
    """A bottleneck block."""

    def __init__(self, features: int, place: Place, dtype: DTypeLike, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, dtype=dtype, kernel_init=_CONV, rngs=rngs)
        norm = functools.partial(jaxbn.nnx.BatchNorm, momentum=MOMENTUM, dtype=dtype, rngs=rngs)
        width, stride, project = place
        self.conv1 = conv(features, width, (1, 1))
        self.norm1 = norm(width, activation=jax.nn.relu)
        self.conv2 = conv(width, width, (3, 3), strides=stride, padding=1)
        self.norm2 = norm(width, activation=jax.nn.relu)
        self.conv3 = conv(width, EXPANSION * width, (1, 1))
        self.norm3 = norm(EXPANSION * width, activation=jax.nn.relu, scale_init=_ZEROS)
        self.shortcut: Callable[[jax.Array], jax.Array]
        if project:
            resize = conv(features, EXPANSION * width, (1, 1), strides=stride)
            self.shortcut = nnx.Sequential(resize, norm(EXPANSION * width))
        else:
            self.shortcut = identity

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(self.conv1(x))
        y = self.norm2(self.conv2(y))
        return self.norm3(self.conv3(y), residual=self.shortcut(x))


class NnxResNet(nnx.Module):
    """The same network in NNX; `train()` and `eval()` select the statistics.

    Args:
        stages: Number of blocks in each stage.
        num_classes: Number of logits.
        width: Features of the first convolution.
        dtype: Dtype of the activations; parameters are float32.
        rngs: Keys for the initializers.
    """

    def __init__(
        self,
        stages: Sequence[int] = RESNET_50,
        num_classes: int = 1000,
        width: int = 64,
        dtype: DTypeLike = jnp.bfloat16,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(3, width, (7, 7), 2, padding=3, use_bias=False, dtype=dtype, kernel_init=_CONV, rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(width, momentum=MOMENTUM, dtype=dtype, activation=jax.nn.relu, rngs=rngs)
        features, blocks = width, []
        for place in places(stages, width):
            blocks.append(NnxBlock(features, place, dtype, rngs))
            features = EXPANSION * place.width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(features, num_classes, kernel_init=_DENSE, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = max_pool(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2), dtype=jnp.float32))
