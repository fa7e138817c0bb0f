"Write gpu_weighted.py: the weighted kernel with its precision and SAME as constants."
s = open("flash_sinkhorn_hessian/kernels_truncated.py").read()
k = s[s.index('@triton.jit(do_not_specialize=["rows", "width", "ka", "kb", "k", "e", "q"])'):]; k = k[:k.index("# %%")]
def sub(a, b):
    global k
    assert a in k, a; k = k.replace(a, b)
sub('input_precision="ieee"', "input_precision=PREC"); sub("G: tl.constexpr):", "PREC: tl.constexpr, SAME: tl.constexpr, FK: tl.constexpr):")
sub("deep = KE if FE else e; wide = KQ if FQ else q", "deep = KE if FE else e; wide = KQ if FQ else q; many = KD if FK else k")
sub("A = A_ptr + ((h % ka)*rows + row)*e; B = B_ptr + (tl.program_id(1).to(tl.int64)*KD % kb)*width*e", "A = A_ptr + ((h % ka)*rows + row)*deep; B = B_ptr\n    if KD == 1: B += (h0 % kb)*width*deep")
sub("h = tl.program_id(1)*KD + tl.arange(0, KD)", "h0 = tl.program_id(1).to(tl.int64)*KD; h = h0 + tl.arange(0, KD)"); sub("some = h < k; h = h.to(tl.int64)", "some = h < k")
sub("alpha_ptr + row*k + h, mask=some", "alpha_ptr + row*many + h, mask=some")
sub("    last = tl.zeros([NE, KD], F)\n", "    last = tl.zeros([NE, KD], F)\n    if FE: a = tl.load(A[None, :] + ke[:, None], mask=some[None, :], other=0.0)\n")
sub("        w = alpha[None, :] + tl.load(beta_ptr + (j*k)[:, None] + h[None, :], mask=live[:, None] & some[None, :], other=0.0)\n", "        ok = live[:, None]\n        if not FK: ok = ok & some[None, :]\n        w = alpha[None, :] + tl.load(beta_ptr + (j*many)[:, None] + h[None, :], mask=ok, other=0.0)\n")
sub("            a = tl.load(A[None, :] + e0 + ke[:, None], mask=(e0 + ke < e)[:, None] & some[None, :], other=0.0)\n", "            if not FE: a = tl.load(A[None, :] + e0 + ke[:, None], mask=(e0 + ke < e)[:, None] & some[None, :], other=0.0)\n")
sub("        v = tl.load(V_ptr + (j*wide)[:, None] + kq[None, :], mask=ok, other=0.0)\n        if KD == 1",
"""        f = tl.load(last_ptr + j, mask=live, other=0.0)
        if SAME:
            v = b; w *= f[:, None]
        else: v = tl.load(V_ptr + (j*wide)[:, None] + kq[None, :], mask=ok, other=0.0)
        if KD == 1""")
sub("if LAST: last += w*tl.load(last_ptr + j, mask=live, other=0.0)[:, None]", "if SAME: last += w\n        elif LAST: last += w*f[:, None]")
if __import__("sys").argv[1:]: k = k.replace("for e0 in range(0, deep, KE):", "for e0 in tl.static_range(0, KE, KE):")
open("gpu_weighted.py", "w").write("import triton, triton.language as tl\nfrom flash_sinkhorn_hessian.kernels_truncated import columns_at\n" + k)
