"""The operators that a graph may hold: functions of tensors, without effects, that networks are made of.

Those that torch.export gives for the families of benchmarks/families.py are among them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

_ATEN = """
_native_batch_norm_legit_no_training.default _softmax.default _to_copy.default _unsafe_view.default
abs.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default add.Scalar add.Tensor
addcmul.default addmm.default alias.default amax.default amin.default arange.default arange.start
arange.start_step argmax.default avg_pool1d.default avg_pool2d.default avg_pool3d.default
baddbmm.default batch_norm.default bitwise_not.default bmm.default cat.default chunk.default
clamp.default clamp_max.default clamp_min.default clone.default col2im.default
constant_pad_nd.default contiguous.default conv1d.default conv2d.default conv3d.default
conv_transpose2d.input convolution.default copy.default cos.default cumsum.default detach.default
div.Scalar div.Tensor div.Tensor_mode dropout.default einsum.default elu.default embedding.default
eq.Scalar eq.Tensor erf.default exp.default expand.default flatten.using_ints flip.default
floor.default full.default full_like.default gather.default ge.Scalar gelu.default glu.default
group_norm.default gt.Scalar gt.Tensor hardsigmoid.default hardswish.default hardtanh.default
im2col.default index.Tensor index_select.default instance_norm.default layer_norm.default le.Scalar
leaky_relu.default linalg_vector_norm.default linear.default log.default log_softmax.int
logical_and.default logical_not.default lt.Scalar lt.Tensor masked_fill.Scalar matmul.default
max.dim max_pool2d.default max_pool2d_with_indices.default maximum.default mean.default mean.dim
min.dim minimum.default mish.default mm.default movedim.int mul.Scalar mul.Tensor narrow.default
ne.Scalar ne.Tensor neg.default new_full.default new_ones.default new_zeros.default ones.default
ones_like.default pad.default permute.default pixel_shuffle.default pixel_unshuffle.default
pow.Tensor_Scalar prelu.default reciprocal.default relu.default relu6.default repeat.default
repeat_interleave.self_int reshape.default roll.default round.default rsqrt.default rsub.Scalar
scalar_tensor.default select.int select_scatter.default selu.default sigmoid.default silu.default
sin.default slice.Tensor slice_scatter.default softmax.int softplus.default split.Tensor
split_with_sizes.default sqrt.default square.default squeeze.default squeeze.dim squeeze.dims
stack.default std.correction sub.Scalar sub.Tensor sum.default sum.dim_IntList sym_size.int
tanh.default to.dtype transpose.int type_as.default unbind.int unflatten.int unsqueeze.default
upsample_bicubic2d.vec upsample_bilinear2d.vec upsample_nearest2d.vec var.correction
var_mean.correction view.default where.self zeros.default zeros_like.default
"""
ATEN = frozenset(f"aten.{name}" for name in _ATEN.split())
# Arithmetic on sizes, and the parts of what gives several tensors.
SIZES: dict[str, Callable[..., Any]] = {
    f"operator.{function.__name__}": function
    for function in (
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.mod,
        operator.neg,
        operator.getitem,
    )
}
