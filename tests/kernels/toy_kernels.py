"""Triton kernels with known resources and faults, on which the checks of compiled kernels are tested."""

import triton
import triton.language as tl


@triton.jit
def _shifted(x):
    return x + 1


@triton.jit
def plain_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """y = exp(x + 1): a few registers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size)
    tl.store(y_ptr + i, tl.exp(_shifted(x)), mask=i < size)


@triton.jit
def spilling_kernel(x_ptr, y_ptr, rounds, BLOCK: tl.constexpr):
    """Three accumulators of BLOCK values each that live through a loop: at 16384 they do not fit."""
    i = tl.arange(0, BLOCK)
    a, b, c = tl.load(x_ptr + i), tl.load(x_ptr + BLOCK + i), tl.load(x_ptr + 2 * BLOCK + i)
    for _ in range(rounds):
        a = a * b + c
        b = b * c + a
        c = c * a + b
    tl.store(y_ptr + i, a + b + c)


@triton.jit
def faulty_kernel(x_ptr, BLOCK: tl.constexpr):
    """A variable that changes its shape under a condition: refused by the compiler."""
    x = tl.load(x_ptr)
    if x > 0:
        x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), x)


@triton.jit
def forgotten_kernel(x_ptr):
    """Launched by nobody."""
    tl.store(x_ptr, 0.0)
