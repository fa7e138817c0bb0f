"Write gpu_krylov.py: the kernels of a step with their loads before their sums."
s = open("flash_sinkhorn_hessian/krylov.py").read()
k = s[s.index("@triton.jit\ndef total("):]; k = k[:k.index("@triton.jit(do_not_specialize=_INTS)\ndef total_kernel")]
def sub(a, b, count=1):
    global k
    assert k.count(a) >= 1, a; k = k.replace(a, b)
# residual
sub("""    bend, off = total_pair(dots_ptr + b*P*2*k + c, P, k, has, NULL, KC, 2048 if KC == 1 else 256); good = going & (bend > 0)
    alpha = tl.where(good, total(rp_ptr + b*G*k + c, G, k, has, KC, 256)/tl.where(good, bend, 1.0), 0.0)
""", "")
sub("""        live = inside[:, None] & good[None, :]; i = (b*m + j)[:, None]*wide + c[None, :]
        q = tl.load(q_ptr + i, mask=live, other=0.0)
""", """        i = (b*m + j)[:, None]*wide + c[None, :]; live = inside[:, None] & has[None, :]; i2 = (b*n + j)[:, None]*wide + c[None, :]; live2 = (j < n)[:, None] & has[None, :]
        q = tl.load(q_ptr + i, mask=live, other=0.0); r = tl.load(r_ptr + i, mask=live, other=0.0); p = tl.load(p_ptr + i, mask=live, other=0.0); x = tl.load(x_ptr + i, mask=live, other=0.0)
        U = tl.load(U_ptr + i2, mask=live2, other=0.0); u = tl.load(u_ptr + i2, mask=live2, other=0.0)
        bend, off = total_pair(dots_ptr + b*P*2*k + c, P, k, has, NULL, KC, PB); good = going & (bend > 0)
        alpha = tl.where(good, total(rp_ptr + b*G*k + c, G, k, has, KC, PB)/tl.where(good, bend, 1.0), 0.0); live = live & good[None, :]
""")
sub("r = tl.load(r_ptr + i, mask=live, other=0.0) - alpha[None, :]*q", "r -= alpha[None, :]*q")
sub("        p = tl.load(p_ptr + i, mask=live, other=0.0)\n        tl.store(x_ptr + i, tl.load(x_ptr + i, mask=live, other=0.0) + alpha[None, :]*p, mask=live)\n", "        tl.store(x_ptr + i, x + alpha[None, :]*p, mask=live)\n")
sub("        live = (j < n)[:, None] & good[None, :]; i = (b*n + j)[:, None]*wide + c[None, :]\n        tl.store(U_ptr + i, tl.load(U_ptr + i, mask=live, other=0.0) + alpha[None, :]*tl.load(u_ptr + i, mask=live, other=0.0), mask=live)\n", "        tl.store(U_ptr + i2, U + alpha[None, :]*u, mask=live2 & good[None, :])\n")
# direction
sub("    new = total(rr_ptr + b*G*k + c, G, k, has, KC, 256); good = going & (new >= 0); beta = tl.where(good, new/rr, 0.0)\n", "")
sub("""        j = (g*per + h)*BLOCK + tl.arange(0, BLOCK); live = (j < m)[:, None] & good[None, :]; i = (b*m + j)[:, None]*wide + c[None, :]
        r = tl.load(r_ptr + i, mask=live, other=0.0); p = r + beta[None, :]*tl.load(p_ptr + i, mask=live, other=0.0)
""", """        j = (g*per + h)*BLOCK + tl.arange(0, BLOCK); live = (j < m)[:, None] & has[None, :]; i = (b*m + j)[:, None]*wide + c[None, :]
        r = tl.load(r_ptr + i, mask=live, other=0.0); p = tl.load(p_ptr + i, mask=live, other=0.0); factor = tl.load(w_ptr + b*stride + j, mask=j < m, other=0.0)[:, None]
        new = total(rr_ptr + b*G*k + c, G, k, has, KC, PB); good = going & (new >= 0); beta = tl.where(good, new/rr, 0.0); live = live & good[None, :]
        p = r + beta[None, :]*p
""")
sub("        factor = tl.load(w_ptr + b*stride + j, mask=j < m, other=0.0)[:, None]\n        tl.store(next_ptr", "        tl.store(next_ptr")
# no atomic on the gate where nothing changed? kept
sub("BLOCK: tl.constexpr, CHAIN: tl.constexpr):\n    \"Step length", "BLOCK: tl.constexpr, CHAIN: tl.constexpr, PB: tl.constexpr = 128):\n    \"Step length"); sub("BLOCK: tl.constexpr, CHAIN: tl.constexpr):\n    \"Turn p", "BLOCK: tl.constexpr, CHAIN: tl.constexpr, PB: tl.constexpr = 128):\n    \"Turn p")
open("gpu_krylov.py", "w").write("import triton, triton.language as tl\nfrom flash_sinkhorn_hessian.krylov import _INTS, in_turn\n" + k)
