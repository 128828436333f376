"""The base in training: a transformers model whose linear layers read the very NF4 bytes that are served.

Start with `load_base` in `model`; `linear` has the layers and their gradients, `head_loss` the loss over a large
vocabulary, and `on_gpu` bitsandbytes' layers for a GPU. The room may import kernels, models and the extra's libraries
(transformers, bitsandbytes), and no other room of training. Training multiplies decoded weights in floating point; it
does not use the server's integer products.
"""

from guanaco.server.training.quantized.head_loss import HeadLoss
from guanaco.server.training.quantized.linear import ServedLinear
from guanaco.server.training.quantized.model import base_fingerprint, load_base
from guanaco.server.training.quantized.on_gpu import load_base_on

__all__ = ["HeadLoss", "ServedLinear", "base_fingerprint", "load_base", "load_base_on"]
