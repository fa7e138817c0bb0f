import triton, triton.language as tl
from flash_sinkhorn_hessian.kernels_truncated import columns_at
@triton.jit(do_not_specialize=["rows", "width", "ka", "kb", "k", "e", "q"])
def weighted_kernel(crow_ptr, col_ptr, val_ptr, A_ptr, B_ptr, alpha_ptr, beta_ptr, V_ptr, last_ptr, scale_ptr, out_ptr, rows, width, ka, kb, k, e, q,
                    KD: tl.constexpr, KE: tl.constexpr, KQ: tl.constexpr, FE: tl.constexpr, FQ: tl.constexpr, LAST: tl.constexpr, SCALE: tl.constexpr, NE: tl.constexpr, SHORT: tl.constexpr, F: tl.constexpr, PREC: tl.constexpr, SAME: tl.constexpr, FK: tl.constexpr):
    "sum_j val_ij (<A_i, B_j> + alpha_i + beta_j) V_j for one row and KD directions, which share B if they are several; LAST: one more column on its own; SCALE: by a factor of the row; FE, FQ: one block holds all features, all columns."
    row = tl.program_id(0).to(tl.int64); h0 = tl.program_id(1).to(tl.int64)*KD; h = h0 + tl.arange(0, KD); q0 = tl.program_id(2)*KQ; some = h < k
    begin = tl.load(crow_ptr + row); end = tl.load(crow_ptr + row + 1); deep = KE if FE else e; wide = KQ if FQ else q; many = KD if FK else k
    ke = tl.arange(0, KE); kq = q0 + tl.arange(0, KQ); has = kq < q
    A = A_ptr + ((h % ka)*rows + row)*deep; B = B_ptr
    if KD == 1: B += (h0 % kb)*width*deep
    alpha = tl.load(alpha_ptr + row*many + h, mask=some, other=0.0).to(F)
    if KD == 1: acc = tl.zeros([NE, KQ], F)
    else: acc = tl.zeros([KQ, KD], F)
    last = tl.zeros([NE, KD], F)
    if FE: a = tl.load(A[None, :] + ke[:, None], mask=some[None, :], other=0.0)
    for t in range(begin, end, NE):
        at = t + tl.arange(0, NE); live = at < end
        j = columns_at(col_ptr, at, live, SHORT)
        ok = live[:, None]
        if not FK: ok = ok & some[None, :]
        w = alpha[None, :] + tl.load(beta_ptr + (j*many)[:, None] + h[None, :], mask=ok, other=0.0)
        for e0 in tl.static_range(0, KE, KE):
            if not FE: a = tl.load(A[None, :] + e0 + ke[:, None], mask=(e0 + ke < e)[:, None] & some[None, :], other=0.0)
            ok = live[:, None]
            if not FE: ok = ok & (e0 + ke < e)[None, :]
            b = tl.load(B + (j*deep)[:, None] + (e0 + ke)[None, :], mask=ok, other=0.0)
            if KD == 1: w += tl.sum(tl.trans(a)*b, 1)[:, None]
            else: w = tl.dot(b, a, w, input_precision=PREC)
        w *= tl.load(val_ptr + at, mask=live, other=0.0).to(F)[:, None]
        ok = live[:, None]
        if not FQ: ok = ok & has[None, :]
        f = tl.load(last_ptr + j, mask=live, other=0.0)
        if SAME:
            v = b; w *= f[:, None]
        else: v = tl.load(V_ptr + (j*wide)[:, None] + kq[None, :], mask=ok, other=0.0)
        if KD == 1: acc += v*w
        else: acc = tl.dot(tl.trans(v), w, acc, input_precision=PREC)
        if SAME: last += w
        elif LAST: last += w*f[:, None]
    if KD == 1: acc = tl.sum(acc, 0)[:, None]
    out = out_ptr + (h*rows + row)*(q + LAST); acc = acc.to(tl.float64); tail = tl.sum(last, 0).to(tl.float64)
    if SCALE:
        size = tl.load(scale_ptr + row)
        acc *= size; tail *= size
    tl.store(out[None, :] + kq[:, None], acc, mask=has[:, None] & some[None, :])
    if LAST: tl.store(out + q, tail, mask=some & (q0 == 0))

