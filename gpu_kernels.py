"Sparse products below Triton, variants."
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
import triton.language as tl

@gluon.jit
def cols_at(col_ptr, at, live, SHORT: tl.constexpr):
    j = gl.load(col_ptr + at, mask=live, other=0).to(gl.int32)
    if SHORT: j = j & 0xFFFF
    else: j = j.to(gl.int64)
    return j

@gluon.jit(do_not_specialize=["n", "tiles", "per", "stride"])
def rows_kernel(crow_ptr, col_ptr, val_ptr, V_ptr, scale_ptr, p_ptr, e_ptr, out_ptr, next_ptr, dots_ptr, gate_ptr, order_ptr, n, tiles, per, stride,
                W: tl.constexpr, KV: tl.constexpr, NE: tl.constexpr, VE: tl.constexpr, VC: tl.constexpr, SCALE: tl.constexpr, SUB: tl.constexpr, NEXT: tl.constexpr, DOTS: tl.constexpr, GATE: tl.constexpr, SHORT: tl.constexpr, ALIGNED: tl.constexpr, CYCLIC: tl.constexpr, ORDER: tl.constexpr, DT: tl.constexpr, CHAIN: tl.constexpr):
    T: gl.constexpr = KV//VC; L: gl.constexpr = gl.BlockedLayout([1, VE, VC], [1, 32//T, T], [W, 1, 1], [2, 1, 0]); E: gl.constexpr = gl.SliceLayout(2, L); O: gl.constexpr = gl.SliceLayout(1, L); C: gl.constexpr = gl.SliceLayout(0, O)
    if CHAIN:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid = gl.program_id(0); b = (pid // tiles).to(gl.int64); tile = pid % tiles; c = gl.arange(0, KV, C); entry = gl.arange(0, NE, gl.SliceLayout(0, E))
    dot = gl.zeros([KV], gl.float64, C); dot_e = gl.zeros([KV], gl.float64, C)
    for g in range(per):
        if CYCLIC: first = (g*tiles + tile)*W
        else: first = (tile*per + g)*W
        i = first + gl.arange(0, W, gl.SliceLayout(1, E)); live = i < n; row = b*n + i
        io = first + gl.arange(0, W, gl.SliceLayout(1, O)); ok = io < n; ro = b*n + io
        if ORDER:
            row = gl.load(order_ptr + row, mask=live, other=0); ro = gl.load(order_ptr + ro, mask=ok, other=0)
        begin = gl.load(crow_ptr + row, mask=live, other=0); end = gl.load(crow_ptr + row + 1, mask=live, other=0)
        if GATE: end = gl.where(gl.load(gate_ptr) > 0, end, begin)
        cell = ro[:, None]*KV + c[None, :]
        if SCALE: size = gl.load(scale_ptr + ro, mask=ok, other=0.0)
        if SUB: p = gl.load(p_ptr + cell, mask=ok[:, None], other=0.0)
        acc = gl.zeros([W, NE, KV], gl.float32, L); steps = (gl.max(end - begin, 0) + NE - 1)//NE
        if ALIGNED:
            begin = gl.multiple_of(begin, 8); end = gl.multiple_of(end, 8)
        at = begin[:, None] + entry[None, :]; inside = at < end[:, None]
        j = cols_at(col_ptr, at, inside, SHORT); w = gl.load(val_ptr + at, mask=inside, other=0.0)
        for _ in range(steps):
            at += NE; ahead = at < end[:, None]
            j_next = cols_at(col_ptr, at, ahead, SHORT); w_next = gl.load(val_ptr + at, mask=ahead, other=0.0)
            acc += w[:, :, None]*gl.load(V_ptr + (j*KV)[:, :, None] + c[None, None, :], mask=inside[:, :, None], other=0.0).to(gl.float32)
            inside = ahead; j = j_next; w = w_next
        out = gl.sum(acc, 1).to(gl.float64)
        if SCALE: out *= size[:, None]
        if SUB:
            out = p - out
            if DOTS:
                dot += gl.sum(p*out, 0); dot_e += gl.sum(out*gl.load(e_ptr + ro, mask=ok, other=0.0)[:, None], 0)
        gl.store(out_ptr + cell, out, mask=ok[:, None])
        if NEXT: gl.store(next_ptr + cell, (out*size[:, None]).to(gl.float32), mask=ok[:, None])
    if DOTS:
        at = (b*tiles + tile)*2*KV + c
        gl.store(dots_ptr + at, dot); gl.store(dots_ptr + at + KV, dot_e)


@gluon.jit(do_not_specialize=["n"])
def row_kernel(crow_ptr, col_ptr, val_ptr, V_ptr, scale_ptr, p_ptr, e_ptr, out_ptr, next_ptr, dots_ptr, gate_ptr, n,
               KV: tl.constexpr, NE: tl.constexpr, VE: tl.constexpr, EARLY: tl.constexpr, DEEP: tl.constexpr, SUB: tl.constexpr, NEXT: tl.constexpr, DOTS: tl.constexpr, GATE: tl.constexpr, CHAIN: tl.constexpr):
    "One row a program of one warp."
    T: gl.constexpr = KV//4; L: gl.constexpr = gl.BlockedLayout([VE, 4], [32//T, T], [1, 1], [1, 0]); E: gl.constexpr = gl.SliceLayout(1, L); C: gl.constexpr = gl.SliceLayout(0, L)
    if CHAIN:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = gl.program_id(0).to(gl.int64); c = gl.arange(0, KV, C); entry = gl.arange(0, NE, E)
    begin = gl.load(crow_ptr + row); end = gl.load(crow_ptr + row + 1)
    if GATE: end = gl.where(gl.load(gate_ptr) > 0, end, begin)
    begin = gl.multiple_of(begin, 8); end = gl.multiple_of(end, 8)
    cell = row*KV + c; size = gl.load(scale_ptr + row); p = gl.load(p_ptr + cell)
    if EARLY: acc = gl.zeros([KV], gl.float32, C)
    else: acc = gl.zeros([NE, KV], gl.float32, L)
    at = begin + entry; inside = at < end
    j = gl.load(col_ptr + at, mask=inside, other=0); w = gl.load(val_ptr + at, mask=inside, other=0.0)
    if DEEP:
        at += NE; inside = at < end
        j1 = gl.load(col_ptr + at, mask=inside, other=0); w1 = gl.load(val_ptr + at, mask=inside, other=0.0)
    for e in range(begin, end, NE):
        at += NE; inside = at < end
        jn = gl.load(col_ptr + at, mask=inside, other=0); wn = gl.load(val_ptr + at, mask=inside, other=0.0)
        live = e + entry < end; jj = j.to(gl.int32) & 0xFFFF
        t = w[:, None]*gl.load(V_ptr + (jj*KV)[:, None] + c[None, :], mask=live[:, None], other=0.0)
        if EARLY: acc += gl.sum(t, 0)
        else: acc += t
        if DEEP:
            j = j1; w = w1; j1 = jn; w1 = wn
        else:
            j = jn; w = wn
    if EARLY: out = acc.to(gl.float64)
    else: out = gl.sum(acc, 0).to(gl.float64)
    out *= size
    if SUB: out = p - out
    gl.store(out_ptr + cell, out)
    if NEXT: gl.store(next_ptr + cell, (out*size).to(gl.float32))
    if DOTS:
        at = row*2*KV + c
        gl.store(dots_ptr + at, p*out); gl.store(dots_ptr + at + KV, out*gl.load(e_ptr + row))
