"Sparse products in Triton: one row a program of one warp, entries and gathers on their way by the pipeliner."
import triton, triton.language as tl
from flash_sinkhorn_hessian.kernels_softmin import in_turn
from flash_sinkhorn_hessian.kernels_truncated import columns_at

@triton.jit(do_not_specialize=["n", "k", "tiles"])
def flow_kernel(crow_ptr, col_ptr, val_ptr, V_ptr, scale_ptr, p_ptr, e_ptr, out_ptr, next_ptr, dots_ptr, gate_ptr, n, k, tiles,
                KV: tl.constexpr, NE: tl.constexpr, NS: tl.constexpr, EARLY: tl.constexpr, PRE: tl.constexpr, PAD: tl.constexpr, SCALE: tl.constexpr, SUB: tl.constexpr, NEXT: tl.constexpr, DOTS: tl.constexpr, GATE: tl.constexpr, SHORT: tl.constexpr, F: tl.constexpr, CHAIN: tl.constexpr):
    in_turn(CHAIN)
    row = tl.program_id(0).to(tl.int64); c = tl.arange(0, KV)
    begin = tl.load(crow_ptr + row); end = tl.load(crow_ptr + row + 1)
    if GATE: end = tl.where(tl.load(gate_ptr) > 0, end, begin)
    if PAD:
        begin = tl.multiple_of(begin, 8); end = tl.multiple_of(end, 8)
    cell = row*KV + c; size = tl.load(scale_ptr + row); p = tl.load(p_ptr + cell)
    if EARLY: acc = tl.zeros([KV], F)
    else: acc = tl.zeros([NE, KV], F)
    if PRE == 0:
        for e in tl.range(begin, end, NE, num_stages=NS):
            at = e + tl.arange(0, NE); inside = at < end
            j = columns_at(col_ptr, at, inside, SHORT); w = tl.load(val_ptr + at, mask=inside, other=0.0)
            t = w[:, None].to(F)*tl.load(V_ptr + (j*KV)[:, None] + c[None, :], mask=inside[:, None], other=0.0)
            if EARLY: acc += tl.sum(t, 0)
            else: acc += t
    else:
        at = begin + tl.arange(0, NE); inside = at < end
        j = tl.load(col_ptr + at, mask=inside, other=0); w = tl.load(val_ptr + at, mask=inside, other=0.0)
        if PRE == 2:
            at += NE; inside = at < end
            j1 = tl.load(col_ptr + at, mask=inside, other=0); w1 = tl.load(val_ptr + at, mask=inside, other=0.0)
        for e in range(begin, end, NE):
            at += NE; inside = at < end
            jn = tl.load(col_ptr + at, mask=inside, other=0); wn = tl.load(val_ptr + at, mask=inside, other=0.0)
            live = e + tl.arange(0, NE) < end; jj = j.to(tl.int32) & 0xFFFF
            t = w[:, None]*tl.load(V_ptr + (jj*KV)[:, None] + c[None, :], mask=live[:, None], other=0.0)
            if EARLY: acc += tl.sum(t, 0)
            else: acc += t
            if PRE == 2:
                j = j1; w = w1; j1 = jn; w1 = wn
            else:
                j = jn; w = wn
    if EARLY: out = acc.to(tl.float64)
    else: out = tl.sum(acc, 0).to(tl.float64)
    if SCALE: out *= size
    if SUB: out = p - out
    tl.store(out_ptr + cell, out)
    if NEXT: tl.store(next_ptr + cell, (out*size).to(F))
    if DOTS:
        at = row*2*KV + c
        tl.store(dots_ptr + at, p*out); tl.store(dots_ptr + at + KV, out*tl.load(e_ptr + row))
