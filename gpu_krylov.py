import triton, triton.language as tl
from flash_sinkhorn_hessian.krylov import _INTS, in_turn
@triton.jit
def total(ptr, P, step, has, KC: tl.constexpr, BLOCK: tl.constexpr):
    "Sums of P numbers, `step` apart, for each of KC pointers."
    acc = tl.zeros([BLOCK, KC], tl.float64)
    for i in range(0, P, BLOCK):
        at = i + tl.arange(0, BLOCK)
        acc += tl.load(ptr[None, :] + (at*step)[:, None], mask=(at < P)[:, None] & has[None, :], other=0.0)
    return tl.sum(acc, 0)

@triton.jit
def total_pair(ptr, P, k, has, BOTH: tl.constexpr, KC: tl.constexpr, BLOCK: tl.constexpr):
    "Sums of P pairs of numbers, k apart and in turn; BOTH: the second ones too, else zero."
    one = tl.zeros([BLOCK, KC], tl.float64); two = tl.zeros([BLOCK, KC], tl.float64)
    for i in range(0, P, BLOCK):
        at = i + tl.arange(0, BLOCK); where = ptr[None, :] + (at*2*k)[:, None]; ok = (at < P)[:, None] & has[None, :]
        one += tl.load(where, mask=ok, other=0.0)
        if BOTH: two += tl.load(where + k, mask=ok, other=0.0)
    return tl.sum(one, 0), tl.sum(two, 0)

@triton.jit(do_not_specialize=_INTS)
def dots_kernel(p_ptr, q_ptr, e_ptr, dots_ptr, m, k, per, KC: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    "Partial products of q with p and e, KC columns at a time."
    in_turn(CHAIN)
    g = tl.program_id(0); b = tl.program_id(1).to(tl.int64); c = tl.program_id(2)*KC + tl.arange(0, KC); has = c < k
    dot = tl.zeros([BLOCK, KC], tl.float64); dot_e = tl.zeros([BLOCK, KC], tl.float64)
    for h in range(per):
        j = (g*per + h)*BLOCK + tl.arange(0, BLOCK); live = (j < m)[:, None] & has[None, :]; i = (b*m + j)[:, None]*k + c[None, :]
        q = tl.load(q_ptr + i, mask=live, other=0.0)
        dot += q*tl.load(p_ptr + i, mask=live, other=0.0); dot_e += q*tl.load(e_ptr + b*m + j, mask=j < m, other=0.0)[:, None]
    out = dots_ptr + (b*tl.num_programs(0) + g)*2*k + c
    tl.store(out, tl.sum(dot, 0), mask=has); tl.store(out + k, tl.sum(dot_e, 0), mask=has)

@triton.jit(do_not_specialize=_INTS)
def start_kernel(rhs_ptr, e_ptr, dots_ptr, goal_ptr, r_ptr, x_ptr, p_ptr, U_ptr, norm_ptr, rr_ptr, table_ptr, gate_ptr, n, m, k, per, systems, NULL: tl.constexpr, KC: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    "Right-hand sides without e and of norm one, zero solutions and directions, and a table in which a step before the first would begin."
    in_turn(CHAIN)
    g = tl.program_id(0); b = tl.program_id(1).to(tl.int64); c = tl.program_id(2)*KC + tl.arange(0, KC); has = c < k; G = tl.num_programs(0)
    square, off = total_pair(dots_ptr + b*G*2*k + c, G, k, has, NULL, KC, 256); left = square - off*off
    size = tl.sqrt(tl.where(left < 1e-20*square, 1e-20*square, left)); some = size > 0; zero = tl.zeros([BLOCK, KC], tl.float64); acc = zero
    for h in range(per):
        j = (g*per + h)*BLOCK + tl.arange(0, BLOCK); live = (j < m)[:, None] & has[None, :]; i = (b*m + j)[:, None]*k + c[None, :]
        r = tl.load(rhs_ptr + i, mask=live, other=0.0)
        if NULL: r -= off[None, :]*tl.load(e_ptr + b*m + j, mask=j < m, other=0.0)[:, None]
        r = tl.where(some[None, :], r/tl.where(some, size, 1.0)[None, :], 0.0); acc += r*r
        tl.store(r_ptr + i, r, mask=live)
        tl.store(x_ptr + i, zero, mask=live); tl.store(p_ptr + i, zero, mask=live)
        tl.store(U_ptr + (b*n + j)[:, None]*k + c[None, :], zero, mask=(j < n)[:, None] & has[None, :])
    tl.store(rr_ptr + (b*G + g)*k + c, tl.sum(acc, 0), mask=has)
    if g == 0:
        o = table_ptr + (systems + b*k + c)*8; none = tl.zeros([KC], tl.float64)
        tl.store(o, none + float("inf"), mask=has); tl.store(o + 1, none + tl.load(goal_ptr), mask=has); tl.store(o + 2, none + float("inf"), mask=has); tl.store(o + 3, none, mask=has)
        tl.store(o + 4, none - 1, mask=has); tl.store(o + 5, none, mask=has); tl.store(o + 6, tl.where(some, 1.0, none), mask=has); tl.store(o + 7, size, mask=has)
        tl.store(norm_ptr + b*k + c, size, mask=has)
        if (b == 0) & (tl.program_id(2) == 0): tl.store(gate_ptr, systems)

# %% ../nbs/16_krylov.ipynb #7b1ea725
@triton.jit(do_not_specialize=_INTS)
def residual_kernel(x_ptr, r_ptr, p_ptr, q_ptr, e_ptr, U_ptr, u_ptr, dots_ptr, rp_ptr, rr_ptr, table_ptr, aw_ptr, c_ptr, kp_ptr, kq_ptr, n, m, k, per, P, slot, systems, cap,
                    NULL: tl.constexpr, KM: tl.constexpr, KEEP: tl.constexpr, KC: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr, PB: tl.constexpr = 128):
    "Step length; the solution moves along p, its image along u = N p, the residual along q; partial sums of its square. KM: its products with A times so many slow modes, in parts too; KEEP: p and q of the first system are stored for the next ones."
    in_turn(CHAIN)
    g = tl.program_id(0); b = tl.program_id(1).to(tl.int64); c = tl.program_id(2)*KC + tl.arange(0, KC); has = c < k; G = tl.num_programs(0); wide = KC if FULL else k
    t = table_ptr + (slot*systems + b*k + c)*8; going = tl.load(t + 5, mask=has, other=1.0) == 0
    acc = tl.zeros([BLOCK, KC], tl.float64); row = tl.load(table_ptr + slot*systems*8 + 4).to(tl.int64); kk = tl.arange(0, 4096//BLOCK)
    for h in range(per):
        j = (g*per + h)*BLOCK + tl.arange(0, BLOCK); inside = j < m
        i = (b*m + j)[:, None]*wide + c[None, :]; live = inside[:, None] & has[None, :]; i2 = (b*n + j)[:, None]*wide + c[None, :]; live2 = (j < n)[:, None] & has[None, :]
        q = tl.load(q_ptr + i, mask=live, other=0.0); r = tl.load(r_ptr + i, mask=live, other=0.0); p = tl.load(p_ptr + i, mask=live, other=0.0); x = tl.load(x_ptr + i, mask=live, other=0.0)
        U = tl.load(U_ptr + i2, mask=live2, other=0.0); u = tl.load(u_ptr + i2, mask=live2, other=0.0)
        bend, off = total_pair(dots_ptr + b*P*2*k + c, P, k, has, NULL, KC, PB); good = going & (bend > 0)
        alpha = tl.where(good, total(rp_ptr + b*G*k + c, G, k, has, KC, PB)/tl.where(good, bend, 1.0), 0.0); live = live & good[None, :]
        if NULL: q -= off[None, :]*tl.load(e_ptr + b*m + j, mask=inside, other=0.0)[:, None]
        r -= alpha[None, :]*q
        tl.store(r_ptr + i, r, mask=live); acc += tl.where(live, r*r, 0.0)
        tl.store(x_ptr + i, x + alpha[None, :]*p, mask=live)
        if KEEP:
            first = live & (c == 0)[None, :]; at = row*m + j; ok = (tl.max(first.to(tl.int32), 1) > 0) & (b == 0) & (row < cap)
            tl.store(kp_ptr + at, tl.sum(tl.where(first, p, 0.0), 1), mask=ok); tl.store(kq_ptr + at, tl.sum(tl.where(first, q, 0.0), 1), mask=ok)
        if KM > 0:
            low = tl.where(live, r, 0.0).to(tl.float32)
            for k0 in tl.static_range(0, KM, 4096//BLOCK):
                aw = tl.load(aw_ptr + ((k0 + kk).to(tl.int64)*m)[:, None] + j[None, :], mask=inside[None, :], other=0.0)
                if KC == 1: part = tl.sum(aw*tl.trans(low), 1)[:, None]
                else: part = tl.dot(aw, low, input_precision="tf32x3")
                if KC == 1: c_at = c_ptr + ((b*KM + k0 + kk)*G + g)[:, None]
                else: c_at = c_ptr + ((b*G + g)*KM + k0 + kk)[:, None]*k + c[None, :]
                if h > 0: part += tl.load(c_at, mask=has[None, :], other=0.0)
                tl.store(c_at, part, mask=has[None, :])
        tl.store(U_ptr + i2, U + alpha[None, :]*u, mask=live2 & good[None, :])
    tl.store(rr_ptr + (b*G + g)*k + c, tl.where(good, tl.sum(acc, 0), -1.0), mask=has)

# %% ../nbs/16_krylov.ipynb #d26a3f39
@triton.jit(do_not_specialize=_INTS)
def direction_kernel(r_ptr, p_ptr, mode_ptr, c_ptr, w_ptr, next_ptr, rr_ptr, rp_ptr, table_ptr, gate_ptr, m, k, stride, patience, per, slot, systems,
                     F: tl.constexpr, W: tl.constexpr, GP: tl.constexpr, KM: tl.constexpr, KC: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr, PB: tl.constexpr = 128):
    "Turn p, conjugate to KM slow modes; `next` is p times the factors w, what the next product reads. The first program of a system keeps its account."
    in_turn(CHAIN)
    g = tl.program_id(0); b = tl.program_id(1).to(tl.int64); c = tl.program_id(2)*KC + tl.arange(0, KC); has = c < k; G = tl.num_programs(0); wide = KC if FULL else k
    t = table_ptr + (slot*systems + b*k + c)*8; rr = tl.load(t, mask=has, other=1.0); state = tl.load(t + 5, mask=has, other=1.0); going = state == 0
    acc = tl.zeros([BLOCK, KC], tl.float64); kk = tl.arange(0, 4096//BLOCK); gg = tl.arange(0, GP)
    for h in range(per):
        j = (g*per + h)*BLOCK + tl.arange(0, BLOCK); live = (j < m)[:, None] & has[None, :]; i = (b*m + j)[:, None]*wide + c[None, :]
        r = tl.load(r_ptr + i, mask=live, other=0.0); p = tl.load(p_ptr + i, mask=live, other=0.0); factor = tl.load(w_ptr + b*stride + j, mask=j < m, other=0.0)[:, None]
        new = total(rr_ptr + b*G*k + c, G, k, has, KC, PB); good = going & (new >= 0); beta = tl.where(good, new/rr, 0.0); live = live & good[None, :]
        p = r + beta[None, :]*p
        if KM > 0:
            fix = tl.zeros([BLOCK, KC], tl.float32)
            for k0 in tl.static_range(0, KM, 4096//BLOCK):
                mode = tl.load(mode_ptr + ((k0 + kk).to(tl.int64)*m)[:, None] + j[None, :], mask=(j < m)[None, :], other=0.0)
                if KC == 1:
                    share = tl.sum(tl.load(c_ptr + ((b*KM + k0 + kk)*G)[:, None] + gg[None, :], mask=(gg < G)[None, :], other=0.0), 1)
                    fix += tl.sum(share[:, None]*mode, 0)[:, None]
                else:
                    share = tl.load(c_ptr + (b*KM + k0 + kk)[:, None]*k + c[None, :], mask=has[None, :], other=0.0)
                    fix = tl.dot(tl.trans(mode), share, fix, input_precision="tf32x3")
            p -= fix.to(tl.float64)
        tl.store(p_ptr + i, p, mask=live); acc += tl.where(live, r*p, 0.0)
        tl.store(next_ptr + (b*stride + j)[:, None]*wide + c[None, :], (p*factor).to(F), mask=live)
    tl.store(rp_ptr + (b*G + g)*k + c, tl.sum(acc, 0), mask=has)
    if g == 0:
        goal = tl.load(t + 1, mask=has, other=0.0); best = tl.load(t + 2, mask=has, other=0.0); since = tl.load(t + 3, mask=has, other=0.0); steps = tl.load(t + 4, mask=has, other=0.0)
        since = tl.where(new < 0.9*best, 0.0, since + 1)
        after = tl.where(going, tl.where(good & (new <= goal), 1.0, tl.where(good & (since < patience), 0.0, 2.0)), state)
        o = table_ptr + ((1 - slot)*systems + b*k + c)*8
        tl.store(o, tl.where(good, new, rr), mask=has); tl.store(o + 1, goal, mask=has); tl.store(o + 2, tl.where(good, tl.minimum(best, new), best), mask=has)
        tl.store(o + 3, since, mask=has); tl.store(o + 4, tl.where(good, steps + 1, steps), mask=has); tl.store(o + 5, after, mask=has)
        for z in tl.static_range(6, 8): tl.store(o + z, tl.load(t + z, mask=has, other=0.0), mask=has)
        tl.atomic_add(gate_ptr, -tl.sum((going & (after != 0)).to(tl.int32), 0))

@triton.jit(do_not_specialize=_INTS)
def shares_kernel(part_ptr, out_ptr, G, k, KM: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    "Products of several residuals with the slow modes, their parts added."
    in_turn(CHAIN)
    at = tl.program_id(0)*BLOCK + tl.arange(0, BLOCK); b = tl.program_id(1).to(tl.int64); size = KM*k; acc = tl.zeros([BLOCK], tl.float32)
    for g in range(0, G, 32):
        part = g + tl.arange(0, 32)
        acc += tl.sum(tl.load(part_ptr + ((b*G + part)*size)[:, None] + at[None, :], mask=(part < G)[:, None] & (at < size)[None, :], other=0.0), 0)
    tl.store(out_ptr + b*size + at, acc, mask=at < size)

