"""Results on their way from registers to memory: in long rows through shared memory and TMA, or value by value."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma


@gluon.jit
def write(acc, out, out_desc, stage, bias, m0, n0, rm, rn, end, N, C: gl.constexpr):
    """Sums [rows, tokens] plus bias, rounded once, to out [tokens up to `end`, N]: by TMA, or from registers."""
    n = n0 + rn
    if C.BIAS:
        acc += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    y = acc.to(out.dtype.element_ty)
    if C.TMA_OUT:
        # 16 bytes of a row are what a warp's registers hold together; shared memory makes long rows of them.
        if C.EXPERTS == 0 or m0 + C.BM <= end:
            _write_pieces(y, out_desc, stage, m0, n0)
        else:
            _write_registers(y, out, m0 + rm, n, end, N)
    else:
        _write_registers(y, out, m0 + rm, n, end, N)


@gluon.jit
def _write_registers(y, out, m, n, end, N):
    valid = (m < end)[None, :] & (n < N)[:, None]
    gl.store(out + m.to(gl.int64)[None, :] * N + n[:, None], y, mask=valid)


@gluon.jit
def _write_pieces(y, out_desc, stage, m0, n0):
    """Token by token piece: as many tokens as the buffer [tokens, rows] holds."""
    PIECE: gl.constexpr = stage.shape[0]
    if y.shape[1] > PIECE:
        HALF: gl.constexpr = y.shape[1] // 2
        low, high = gl.split(y.reshape([y.shape[0], 2, HALF]).permute((0, 2, 1)))
        _write_pieces(low, out_desc, stage, m0, n0)
        _write_pieces(high, out_desc, stage, m0 + HALF, n0)
    else:
        tma.store_wait(0)
        gl.thread_barrier()
        stage.permute((1, 0)).store(y)
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out_desc, [m0, n0], stage)
