"""The parameter lists of known models: names and shapes, in the order of the forward pass."""

from __future__ import annotations

from itertools import pairwise

Shapes = dict[str, tuple[int, ...]]


def mlp(sizes: tuple[int, ...] = (784, 512, 512, 10)) -> Shapes:
    """A multi-layer perceptron (0.67 M parameters by default)."""
    shapes: Shapes = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        shapes[f"layer{layer}.weight"] = (fan_out, fan_in)
        shapes[f"layer{layer}.bias"] = (fan_out,)
    return shapes


def resnet50() -> Shapes:
    """ResNet-50 (He et al. 2015): 161 tensors, 25,557,032 parameters, 102 MB in float32."""
    shapes: Shapes = {}

    def convolution(name: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)
        shapes[f"{name}.norm.weight"] = (out,)
        shapes[f"{name}.norm.bias"] = (out,)

    convolution("stem", 64, 3, 7)
    channels = 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], 1):
        for block in range(blocks):
            name = f"stage{stage}.{block}"
            convolution(f"{name}.conv1", width, channels, 1)
            convolution(f"{name}.conv2", width, width, 3)
            convolution(f"{name}.conv3", 4 * width, width, 1)
            if block == 0:
                convolution(f"{name}.shortcut", 4 * width, channels, 1)
            channels = 4 * width
    shapes["fc.weight"] = (1000, 2048)
    shapes["fc.bias"] = (1000,)
    return shapes


def bert_base() -> Shapes:
    """BERT-base, uncased (Devlin et al. 2018), with pooler: 199 tensors, 109,482,240 parameters, 438 MB in float32."""
    shapes: Shapes = {
        "embeddings.word": (30522, 768),
        "embeddings.position": (512, 768),
        "embeddings.type": (2, 768),
        "embeddings.norm.weight": (768,),
        "embeddings.norm.bias": (768,),
    }
    for layer in range(12):
        name = f"layer{layer}"
        for part in ("query", "key", "value", "attention"):
            shapes[f"{name}.{part}.weight"] = (768, 768)
            shapes[f"{name}.{part}.bias"] = (768,)
        for part, (out, into) in (("up", (3072, 768)), ("down", (768, 3072))):
            shapes[f"{name}.{part}.weight"] = (out, into)
            shapes[f"{name}.{part}.bias"] = (out,)
        for part in ("norm1", "norm2"):
            shapes[f"{name}.{part}.weight"] = (768,)
            shapes[f"{name}.{part}.bias"] = (768,)
    shapes["pooler.weight"] = (768, 768)
    shapes["pooler.bias"] = (768,)
    return shapes


MODELS = {"mlp": mlp, "resnet50": resnet50, "bert-base": bert_base}
