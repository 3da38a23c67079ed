"""Makes Triton's interpreter faster for tests: most of its time goes into types that it makes anew for each value.

Types are what they were and values are not touched; only what was computed once is remembered. Written for Triton 3.6.
"""

from __future__ import annotations

import functools
import math


def remember_types() -> None:
    """Let the interpreter of this process remember shapes and dtypes. Idempotent."""
    import triton.language.core as tl
    from triton.runtime import interpreter

    if hasattr(interpreter._get_np_dtype, "cache_info"):
        return
    pointer = interpreter._get_np_dtype(tl.pointer_type(tl.float32))
    dtype_of = functools.cache(interpreter._get_np_dtype)

    def np_dtype(tt_dtype):
        scalar = tt_dtype.element_ty if isinstance(tt_dtype, tl.block_type) else tt_dtype
        return pointer if isinstance(scalar, tl.pointer_type) else dtype_of(scalar)

    np_dtype.cache_info = dtype_of.cache_info
    interpreter._get_np_dtype = np_dtype

    make_block = tl.block_type.__init__

    blocks: dict[tuple, dict] = {}

    def block(element_ty, shape: tuple[int, ...]) -> dict:
        key = (element_ty.name, getattr(element_ty, "address_space", None), shape)  # pointers have no hash
        if key not in blocks:
            made = object.__new__(tl.block_type)
            make_block(made, element_ty, list(shape))
            blocks[key] = vars(made)
        return blocks[key]

    def ints(shape) -> tuple[int, ...]:
        values = shape.values if type(shape) is tl.tuple else shape
        return tuple([size.value if type(size) is tl.constexpr else size for size in values])

    def init_block(self, element_ty, shape) -> None:
        self.__dict__.update(block(element_ty, ints(shape)))

    tl.block_type.__init__ = init_block

    @functools.cache
    def sizes(shape: tuple[int, ...]):
        return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(size) for size in shape])

    def init_tensor(self, handle, type) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = sizes(ints(type.shape) if type.is_block() else ())

    tl.tensor.__init__ = init_tensor
