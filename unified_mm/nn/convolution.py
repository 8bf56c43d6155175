"""Stems that are convolutional networks: they see a whole picture, and give a grid of features.

A stem is a module, pixels [B, height, width, 3] -> features [B, down, across, channels], with

- `stride`: pixels on a side that a feature stands for; at the borders it may stand for fewer.
- `head`: a method, features -> features, that is cheap. What a frozen stem computes once and keeps
  (`training.features`) is what it gives before its head.

It is named by `model.modalities.image.stem`, its fields by `stem_options`. Each device has all of
its weights, which are few.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.nn.layers import partitioned

# EfficientNet-Lite's stages: expansion, channels, blocks, stride, side of the depthwise kernel.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
FIRST, LAST = 32, 1280  # channels of its first and of its last convolution, whatever its width
# What makes the variance of a ReLU of unit normals one again (Brock et al. 2021, section 2).
GAMMA = (2 / (1 - 1 / math.pi)) ** 0.5
Grid = Float[Array, "B height width channels"]
Features = Float[Array, "B down across features"]


class Convolution(nn.Module):
    """A convolution whose grid is that of its input divided by the stride, rounded up.

    Attributes:
      features: channels that come out.
      side: of the kernel.
      stride: steps of the kernel.
      standardised: whether each output's weights are used with a mean of 0 and a variance of
        1 / fan in, times a learned gain (Brock et al. 2021, equation 1).
    """

    features: int
    side: int = 1
    stride: int = 1
    standardised: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Grid) -> Features:
        inputs = x.shape[-1]
        start = partitioned(nn.initializers.he_normal(), None, None, None, None)
        kernel = self.param("kernel", start, (self.side, self.side, inputs, self.features))
        if self.standardised:
            gain = partitioned(nn.initializers.ones, None)
            kernel = standardise(kernel) * self.param("gain", gain, (self.features,))
        bias = self.param("bias", partitioned(nn.initializers.zeros, None), (self.features,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.side == self.stride == 1:
            y = x @ kernel[0, 0]
        else:
            y = jax.lax.conv_general_dilated(
                x, kernel, (self.stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return y + bias.astype(self.dtype)


class Depthwise(nn.Module):
    """A convolution of each channel by itself, on the grid that `Convolution` would give.

    It is a sum of shifted products: on a CPU, XLA's own grouped convolution takes nine times as
    long.
    """

    side: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Grid) -> Features:
        channels = x.shape[-1]
        start = partitioned(nn.initializers.normal(1 / self.side), None, None, None)
        kernel = self.param("kernel", start, (self.side, self.side, channels)).astype(self.dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros, None), (channels,))
        pads = jax.lax.padtype_to_pads(x.shape[1:3], (self.side,) * 2, (self.stride,) * 2, "SAME")
        x = jnp.pad(x.astype(self.dtype), ((0, 0), *pads, (0, 0)))
        y: Any = bias.astype(self.dtype)
        reach = [side - self.side + 1 for side in x.shape[1:3]]
        for row in range(self.side):
            for column in range(self.side):
                rows = slice(row, row + reach[0], self.stride)
                y = y + x[:, rows, column : column + reach[1] : self.stride] * kernel[row, column]
        return y


def standardise(kernel: Float[Array, "height width inputs outputs"]) -> Any:
    """Returns a kernel with each output's weights of mean 0 and variance 1 / fan in."""
    axes = (0, 1, 2)
    fan_in = math.prod(kernel.shape[:3])
    centred = kernel - kernel.mean(axes, keepdims=True)
    variance = jnp.square(centred).mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.maximum(variance * fan_in, 1e-4))


def relu6(x: Grid) -> Grid:
    return jnp.clip(x, 0, 6)


class InvertedResidual(nn.Module):
    """A block of EfficientNet-Lite: widened, convolved by channel, and narrowed.

    Its batch norms are folded into the convolutions before them.
    """

    expansion: int
    features: int
    stride: int
    side: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Grid) -> Features:
        y, inputs = x, x.shape[-1]
        if self.expansion > 1:
            y = relu6(Convolution(self.expansion * inputs, dtype=self.dtype, name="expand")(y))
        y = relu6(Depthwise(self.side, self.stride, self.dtype, name="depthwise")(y))
        y = Convolution(self.features, dtype=self.dtype, name="project")(y)
        return x + y if self.stride == 1 and inputs == self.features else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite (Tan & Le 2019, without squeeze and swish) to the last grid of features.

    Attributes:
      channel_factor, depth_factor: multiply the channels and the blocks of the stages in the middle
        of lite0: (1.0, 1.1) is lite1, (1.1, 1.2) lite2, (1.2, 1.4) lite3, (1.4, 1.8) lite4.
      with_head: whether the last convolution, to 1,280 channels, follows.
    """

    channel_factor: float = 1.0
    depth_factor: float = 1.0
    with_head: bool = True
    dtype: Any = jnp.float32

    stride = 32

    def setup(self) -> None:
        self.first = Convolution(FIRST, 3, 2, dtype=self.dtype)
        self.block = [
            InvertedResidual(*shape, self.dtype)
            for shape in lite_blocks(self.channel_factor, self.depth_factor)
        ]
        if self.with_head:
            self.last = Convolution(LAST, dtype=self.dtype)

    def __call__(self, pixels: Grid) -> Features:
        x = relu6(self.first(pixels))
        for block in self.block:
            x = block(x)
        return x

    def head(self, features: Grid) -> Features:
        return relu6(self.last(features)) if self.with_head else features


def lite_blocks(
    channel_factor: float = 1.0, depth_factor: float = 1.0
) -> list[tuple[int, int, int, int]]:
    """Returns expansion, channels, stride and side of each block of an EfficientNet-Lite."""
    found = []
    for number, (expansion, channels, blocks, stride, side) in enumerate(STAGES):
        if 0 < number < len(STAGES) - 1:
            blocks = math.ceil(blocks * depth_factor)
        features = in_eights(channels * channel_factor)
        found += [(expansion, features, stride if i == 0 else 1, side) for i in range(blocks)]
    return found


def in_eights(channels: float) -> int:
    """Returns the multiple of 8 that is nearest to `channels` and at least 0.9 of it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 * (nearest < 0.9 * channels)


class NFNet(nn.Module):
    """A residual network without norms (Brock et al. 2021), the encoder that Flamingo names.

    The weights are standardised, and each block is told what variance it gets. Large learning rates
    want `train.adaptive_clip`.

    Attributes:
      channels, blocks: of each stage; each halves the grid of the one before it.
      alpha: scale of what a block adds.
    """

    channels: tuple[int, ...] = (64, 128, 256)
    blocks: tuple[int, ...] = (1, 2, 3)
    alpha: float = 0.2
    dtype: Any = jnp.float32

    @property
    def stride(self) -> int:
        """Pixels on a side that a feature stands for."""
        return 2 ** (1 + len(self.channels))

    def setup(self) -> None:
        if len(self.blocks) != len(self.channels) or min(self.blocks, default=0) < 1:
            raise ValueError(
                f"stem_options: channels={self.channels} and blocks={self.blocks} must have a "
                "number for each stage, and each stage a block"
            )
        self.first = Convolution(self.channels[0] // 2, 3, 2, True, self.dtype)
        stages, variance = [], 1.0
        for features, blocks in zip(self.channels, self.blocks, strict=True):
            for number in range(blocks):
                stride = 1 if number else 2
                stages.append(NormFree(features, stride, self.alpha, variance**0.5, self.dtype))
                # The first block of a stage begins with what it gets at a variance of one.
                variance = (variance if number else 1.0) + self.alpha**2
        self.block = stages
        self.spread = variance**0.5

    def __call__(self, pixels: Grid) -> Features:
        x = self.first(pixels)
        for block in self.block:
            x = block(x)
        return GAMMA * nn.relu(x / self.spread)

    def head(self, features: Grid) -> Features:
        return features


class NormFree(nn.Module):
    """A block of NFNet: `x + alpha * gain * branch(relu(x / spread))`, its gain at first zero.

    Attributes:
      features: channels that come out.
      stride: of its grid.
      alpha: scale of the branch.
      spread: standard deviation of its input at the start of training.
    """

    features: int
    stride: int
    alpha: float
    spread: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Grid) -> Features:
        y = GAMMA * nn.relu(x / self.spread)
        inner = self.features // 2
        if self.stride > 1 or x.shape[-1] != self.features:
            x = nn.avg_pool(y, (2, 2), (2, 2), "SAME", False) if self.stride > 1 else y
            x = Convolution(self.features, 1, 1, True, self.dtype, name="shortcut")(x)
        y = Convolution(inner, 1, 1, True, self.dtype, name="narrow")(y)
        for name, stride in (("middle_0", self.stride), ("middle_1", 1)):
            y = GAMMA * nn.relu(y)
            y = Convolution(inner, 3, stride, True, self.dtype, name=name)(y)
        y = Convolution(self.features, 1, 1, True, self.dtype, name="widen")(GAMMA * nn.relu(y))
        gain = self.param("gain", nn.initializers.zeros, ())
        return x + self.alpha * gain.astype(self.dtype) * y
