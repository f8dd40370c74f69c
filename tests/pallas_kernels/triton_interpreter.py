# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of JAX functions on a CPU, by Triton's own interpreter.

For processes started with TRITON_INTERPRET=1, which Triton reads when it is imported. Inputs lie
between margins of NaN (or of senselessly large integers) and outputs start as NaN, so reading or
writing outside of an array, and not writing an element, all show.
"""

import math
import threading
import warnings

import jax
import numpy as np
import pytest
import triton.language
from triton.runtime import interpreter

from pallas_kernels import triton_call

_MARGIN = 4096
_interpreting = threading.Lock()  # it replaces parts of Triton while a kernel runs


def _poison(dtype) -> float | int:
    dtype = np.dtype(dtype)
    return np.nan if dtype.kind in "fV" else 2 ** (8 * dtype.itemsize - 2) + 7


class _Tensor:
    """What the interpreter wants of a tensor, on a numpy array."""

    def __init__(self, values: np.ndarray):
        self._fill = _poison(values.dtype)
        self._memory = np.full(values.size + 2 * _MARGIN, self._fill, values.dtype)
        self.values = self._memory[_MARGIN : _MARGIN + values.size].reshape(values.shape)
        self.values[...] = values
        self.dtype = values.dtype

    def data_ptr(self) -> int:
        return self.values.ctypes.data

    def margins_are_whole(self) -> bool:
        margins = np.concatenate([self._memory[:_MARGIN], self._memory[-_MARGIN:]])
        return np.array_equal(margins, np.full_like(margins, self._fill), equal_nan=True)

    # the interpreter copies tensors from the device and back: these are where they belong
    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        pass

    def copy_(self, *_):
        pass

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.values.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.values.itemsize for s in self.values.strides)


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone, `triton_call` interprets."""
    patch.setattr(triton_call, "triton_call", _call)
    patch.setattr(triton_call, "require", lambda: None)
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index_too(tensor, scope):
        # numpy 2.4 no longer converts arrays of one entry, as which triton 3.6 keeps its scalars
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch.setattr(interpreter, "_patch_lang_tensor", patch_index_too)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
    patch.setattr(interpreter.InterpreterBuilder, "create_si_to_fp", _integers_to_floats)
    patch.setattr(interpreter.InterpretedFunction, "__call__", _call_inside)


_patched: set[int] = set()


def _call_inside(function, *args, **kwargs):
    """A kernel's call of another function. Triton would replace all functions of its language again
    each time, which takes longer than most of them: the launch did that for kernels' own modules,
    and once is enough for Triton's."""
    names = function.fn.__globals__
    if triton.language not in names.values() and id(names) not in _patched:
        interpreter._patch_lang(function.fn)
        _patched.add(id(names))
    return function.rewrite()(*args, **kwargs)


def _dot(_, a, b, accumulator, *__):
    """Triton 3.6 multiplies the bit patterns of bfloat16 as if they were numbers."""
    a, b = (_float32(x) for x in (a, b))
    return interpreter.TensorHandle(a @ b + accumulator.data, accumulator.dtype.scalar)


def _integers_to_floats(builder, source, dtype):
    """bfloat16, again, is not a type of numpy's."""
    if dtype.scalar.name != "bf16":
        return builder.cast_impl(source, dtype)
    wide = interpreter.TensorHandle(source.data.astype(np.float32), triton.language.float32)
    return builder.cast_impl(wide, dtype)


def _float32(handle) -> np.ndarray:
    if handle.dtype.scalar.name == "bf16":
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _call(
    kernel, *args, out_shape, grid, num_warps, num_stages, capability, name,
    input_output_aliases=None, zeroed_outputs=(), **constants,
):  # fmt: skip
    del num_warps, num_stages, capability, name

    def run(*arrays):
        outputs = [_Tensor(np.full(x.shape, _poison(x.dtype), x.dtype)) for x in out_shape]
        for taken, output in (input_output_aliases or {}).items():
            outputs[output] = _Tensor(np.asarray(arrays[taken]))
        for output in zeroed_outputs:
            outputs[output].values[...] = 0
        arrays = iter([_Tensor(np.asarray(x)) for x in arrays])
        inputs = [next(arrays) if isinstance(x, jax.Array) else x for x in args]
        inputs = [float(x) if isinstance(x, np.float32) else x for x in inputs]
        with _interpreting, np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # as on a GPU, NaN is no error
            kernel[grid](*inputs, *outputs, **constants)
        assert all(x.margins_are_whole() for x in outputs)
        return tuple(x.values.copy() for x in outputs)

    assert math.prod(grid) > 0
    return jax.pure_callback(run, tuple(out_shape), *(x for x in args if isinstance(x, jax.Array)))
