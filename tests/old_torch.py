"""A file of EfficientNet-Lite's weights, random ones, as torch wrote them of old; without torch."""

import hashlib
import io
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest

from unified_mm.nn.convolution import STAGES, lite_blocks
from unified_mm.pretrained.torch_file import OLD_NUMBER

STORAGE = type("FloatStorage", (), {"__module__": "torch"})


def rebuilt(*_):
    """Stands for torch's own, which no file is read with here."""


rebuilt.__module__, rebuilt.__qualname__ = "torch._utils", "_rebuild_tensor_v2"


class Tensor:
    def __init__(self, values):
        self.values = np.ascontiguousarray(values, np.float32)

    def __reduce__(self):
        stride = tuple(step // 4 for step in self.values.strides)
        return rebuilt, (Storage(self), 0, self.values.shape, stride, False, OrderedDict())


class Storage:
    def __init__(self, of):
        self.of = of


def old_file(tensors, more=None):
    """The bytes of a file in the layout of old."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.FloatStorage, utils._rebuild_tensor_v2 = STORAGE, rebuilt
    found = OrderedDict((name, Tensor(values)) for name, values in tensors.items())
    content, kept = io.BytesIO(), {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, Storage):
                return None
            kept[str(id(value.of))] = value.of.values
            return ("storage", STORAGE, str(id(value.of)), "cpu", value.of.values.size, None)

    rebuilt.__name__ = "_rebuild_tensor_v2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        head = (OLD_NUMBER, 1001, {"little_endian": True, "protocol_version": 1001})
        for each in (*head, {**found, **(more or {})}):
            Pickler(content, protocol=2).dump(each)
        Pickler(content, protocol=2).dump(sorted(kept))
    for key in sorted(kept):
        content.write(kept[key].size.to_bytes(8, "little") + kept[key].tobytes())
    return content.getvalue()


def weights(seed=0):
    """Random tensors in the layout of lite0."""
    rng, found = np.random.default_rng(seed), {}

    def add(name, norm, outputs, inputs, side):
        found[f"{name}.weight"] = rng.normal(size=(outputs, inputs, side, side))
        for each in ("weight", "bias", "running_mean", "running_var"):
            found[f"{norm}.{each}"] = rng.uniform(0.5, 1.5, outputs)
        found[f"{norm}.num_batches_tracked"] = np.zeros(())

    add("_conv_stem", "_bn0", 32, 3, 3)
    inputs = 32
    for number, (expansion, outputs, _, side) in enumerate(lite_blocks()):
        block, inner = f"_blocks.{number}.", inputs * expansion
        if expansion > 1:
            add(f"{block}_expand_conv", f"{block}_bn0", inner, inputs, 1)
        add(f"{block}_depthwise_conv", f"{block}_bn1", inner, 1, side)
        add(f"{block}_project_conv", f"{block}_bn2", outputs, inner, 1)
        inputs = outputs
    add("_conv_head", "_bn1", 1280, STAGES[-1][1], 1)
    return {**found, "_fc.weight": np.zeros((2, 1280)), "_fc.bias": np.zeros(2)}


def written(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(content).hexdigest()[:8]
    path = folder / f"efficientnet-lite0-{digest}.pth"
    path.write_bytes(content)
    return path
